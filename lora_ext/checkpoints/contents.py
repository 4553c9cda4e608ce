"""The layers that an adapter's file changes, read from its keys alone.

PEFT's keys, after ``base_model.model.``. ``.base_layer`` may follow any module that is wrapped:

    <path>.lora_A.weight, <path>.lora_B.weight       Linear, Conv1D, ConvNd, MultiheadAttention.in_proj_weight
    <path>.lora_B.bias                               with lora_bias
    <path>.lora_magnitude_vector                     with use_dora
    <path>.lora_embedding_A, <path>.lora_embedding_B Embedding
    <path>.lora_A.weight, <path>.base_layer.lora_A.weight ...   target_parameters of one module, the first innermost
    <path>.token_adapter.trainable_tokens_delta      rows of an Embedding
    <path>.<name>                                    a parameter or buffer that replaces the base's
"""

from __future__ import annotations

import dataclasses
import os
import re
from collections.abc import Mapping
from typing import Any, Literal

from lora_ext._common.printable import LONGEST_NAME, check_name, listed, shown
from lora_ext._common.wrapped import KEY_PREFIX
from lora_ext.config import LoraConfig
from lora_ext.files.adapter_file import CONFIG_FILE, AdapterFile
from lora_ext.files.file_bytes import fingerprint
from lora_ext.matching.path_names import EndTable

Kind = Literal["linear", "embedding", "conv", "attention", "parameter"]

_FACTOR = re.compile(
    r"(?:(?P<path>.*)\.)?lora_(?P<side>A\.weight|B\.weight|B\.bias|embedding_A|embedding_B|magnitude_vector)"
)
_MOST_PARAMETERS = 64  # in a module, without those of its children
_TOKENS = re.compile(r"(?P<path>.*?)(?:\.token_adapter)?\.trainable_tokens_delta")


@dataclasses.dataclass(frozen=True)
class LowRankUpdate:
    """One pair of factors.

    Attributes:
        path: path of the module, without ``.base_layer``.
        kind: kind of layer, as far as the file shows it: ``conv`` follows from the number of dimensions, ``attention``
            from the out_proj next to it, ``parameter`` from the config.
        lora_A: key in the file; ``[r, in]``, for a convolution ``[r, in / groups, *kernel]``, for an embedding
            ``[r, num_embeddings]``, for a parameter of ``experts`` matrices ``[experts * r, in]``.
        lora_B: key in the file; ``[out, r]``, ``[out, r / groups, 1...]``, ``[dim, r]``, ``[out, r * experts]``.
        r: the rank.
        scaling: factor of the update.
        lora_bias: key of the update of the bias, which is scaled too; or None.
        magnitude: key of the norms that the updated weight's rows get, ``[out]`` (DoRA); or None.
        parameters: for a parameter, the names that it may have: no key says which.
    """

    path: str
    kind: Kind
    lora_A: str
    lora_B: str
    r: int
    scaling: float
    lora_bias: str | None = None
    magnitude: str | None = None
    parameters: tuple[str, ...] = ()


@dataclasses.dataclass(frozen=True)
class TokenRows:
    """Rows that replace those of an embedding: the tensor ``key [len(indices), dim]``."""

    path: str
    key: str
    indices: tuple[int, ...]


@dataclasses.dataclass(frozen=True)
class AdapterContents:
    """The contents of an adapter file. Each of its keys is in one entry.

    Attributes:
        file: the opened file and its config.
        updates: low-rank updates.
        tokens: rows of embeddings that are replaced.
        replaced: path and name of a base tensor -> key in the file of the tensor that replaces it.
    """

    file: AdapterFile
    updates: list[LowRankUpdate]
    tokens: list[TokenRows]
    replaced: dict[str, str]

    @property
    def is_dora(self) -> bool:
        return any(update.magnitude is not None for update in self.updates)

    def fingerprint(self) -> list[list[Any]]:
        """Path and SHA-256 of the adapter's two files. A continued run compares them with those it was started with."""
        return fingerprint([self.file.path, self.file.directory / CONFIG_FILE], contents=True)


def open_adapter(
    directory: str | os.PathLike[str],
    *,
    allow_pickle: bool = False,
    with_dora: bool = False,
    caller: str = "open_adapter",
) -> AdapterContents:
    """Opens an adapter's directory in PEFT's format; reads no tensor.

    Args:
        allow_pickle: read ``adapter_model.bin`` where there is no safetensors file.
        with_dora: the caller knows what to do with magnitudes.
        caller: the command that error messages name.

    Raises:
        FileNotFoundError: a file is missing.
        ValueError: a file is corrupted, or :func:`read_contents` refuses it; or it is a DoRA adapter, which the caller
            does not take.
    """
    contents = read_contents(AdapterFile.open(directory, caller=caller))
    if not with_dora and contents.is_dora:
        raise ValueError(
            f"{caller}: {contents.file.directory} is a DoRA adapter (use_dora), which rescales the weights that it is "
            "added to; this takes plain low-rank updates"
        )
    return contents


def read_contents(file: AdapterFile) -> AdapterContents:
    """Sorts the keys of ``file`` by kind; reads no tensor.

    Raises:
        ValueError: the adapter is not LoRA, or of a kind that is not supported; one of two factors is missing; shapes
            of factors do not fit each other, or the rank in the config. The message lists all of these.
    """
    config = _config(file)
    parameters, indices = _TargetParameters(config), _TokenIndices(file)
    factors: dict[str, dict[str, str]] = {}  # by the path with its .base_layer
    tokens, replaced, problems = [], {}, []
    for key in file.keys():  # noqa: SIM118  file is no mapping
        check_name(key, str(file.path))
        name = key.removeprefix(KEY_PREFIX)
        if match := _FACTOR.fullmatch(name):
            factors.setdefault(match["path"] or "", {})[match["side"]] = key
        elif match := _TOKENS.fullmatch(name):
            path = strip_base_layer(match["path"])
            tokens.append(TokenRows(path, key, indices.of(path)))
        elif "lora_" in name.rpartition(".")[0] + name.rpartition(".")[2]:
            problems.append(f"unknown key: {key}")
        elif not {"original_module", "modules_to_save"} & set(name.split(".")):
            # With bias="all", PEFT also writes the wrapper's copies of the biases in a module to save.
            replaced[strip_base_layer(name)] = key

    layers: dict[str, list[str]] = {}
    for wrapped in factors:
        layers.setdefault(strip_base_layer(wrapped), []).append(wrapped)
    updates = []
    for path, levels in layers.items():
        for wrapped in levels:
            try:
                updates.append(_update(file, config, parameters.of(path), path, wrapped, factors, nested=len(levels)))
            except ValueError as error:
                problems.append(str(error))
    if problems:
        raise ValueError(f"{file.path} is not an adapter that can be used here:{listed(problems)}")
    if not updates and not tokens and not replaced:
        raise ValueError(f"{file.path} holds no tensor")
    return AdapterContents(file, updates, tokens, replaced)


def strip_base_layer(path: str) -> str:
    """The path in the model without adapters."""
    return ".".join(part for part in path.split(".") if part != "base_layer")


def _update(
    file: AdapterFile,
    config: LoraConfig,
    parameters: tuple[str, ...],
    path: str,
    wrapped: str,
    factors: Mapping[str, dict[str, str]],
    nested: int,
) -> LowRankUpdate:
    sides = factors[wrapped]
    embedding = "embedding_A" in sides or "embedding_B" in sides
    A, B = (sides.get(side) for side in (("embedding_A", "embedding_B") if embedding else ("A.weight", "B.weight")))
    if A is None or B is None:
        raise ValueError(f"missing key: the other half of {next(iter(sides.values()))}")
    shape_A, shape_B = file.shape(A), file.shape(B)
    if len(shape_A) < 2 or len(shape_B) != len(shape_A) or 0 in shape_A + shape_B or set(shape_B[2:]) - {1}:
        raise ValueError(f"shapes of {path}: lora_A {shown(list(shape_A))}, lora_B {shown(list(shape_B))}")
    if not (file.dtype(A).is_floating_point and file.dtype(B).is_floating_point):
        raise ValueError(f"dtypes of {path}: lora_A {file.dtype(A)}, lora_B {file.dtype(B)}, want floating point")
    if nested > 1 and len(parameters) < nested:
        raise ValueError(
            f"{path} has {nested} updates, but the config's target_parameters are {shown(list(parameters))}"
        )
    if _is_attention(wrapped, factors):
        kind, parameters = "attention", ()
    elif parameters and not embedding:
        kind = "parameter"
    else:
        kind, parameters = "embedding" if embedding else "linear" if len(shape_A) == 2 else "conv", ()

    magnitude = sides.get("magnitude_vector")
    if (magnitude is not None) != config.use_dora:
        has = "no lora_magnitude_vector" if magnitude is None else "a lora_magnitude_vector"
        raise ValueError(f"{path} has {has}, but the config's use_dora is {config.use_dora}")
    if magnitude is not None and kind != "linear":
        raise ValueError(f"{path}: use_dora is supported for linear layers only; this is of the kind {kind!r}")
    if magnitude is not None and (file.shape(magnitude) != shape_B[:1] or not file.dtype(magnitude).is_floating_point):
        raise ValueError(f"shape of {magnitude}: {shown(list(file.shape(magnitude)))}, want {[shape_B[0]]} numbers")
    names = [f"{path}.{name}" for name in parameters] or [path]
    settings = {(config.rank_for(name), config.scaling_for(name)) for name in names}
    if len(settings) > 1:
        raise ValueError(f"{path}: rank_pattern or alpha_pattern tell its parameters {shown(list(parameters))} apart")
    r, scaling = settings.pop()
    fits = shape_A[0] == shape_B[1] == r
    if kind == "parameter":
        fits = shape_A[0] == shape_B[1] and shape_A[0] % r == 0
    elif kind == "conv":
        fits = shape_A[0] == r and r % shape_B[1] == 0
    if not fits:
        raise ValueError(
            f"rank of {path}: lora_A {list(shape_A)} and lora_B {list(shape_B)}, but the config gives it r={r}"
        )
    if _is_attention(wrapped.removesuffix(".base_layer.out_proj"), factors) and wrapped.endswith(".out_proj"):
        scaling *= 2  # as in PEFT, merged or not: its attention merges this update, and then the layer adds it again
    return LowRankUpdate(path, kind, A, B, r, scaling, sides.get("B.bias"), magnitude, parameters)


def _is_attention(wrapped: str, factors: Mapping[str, Any]) -> bool:
    """Returns whether this is a MultiheadAttention: it has an update, and so has the out_proj in it."""
    return wrapped in factors and f"{wrapped}.base_layer.out_proj" in factors


class _TargetParameters:
    """Finds the parameters of a module that ``target_parameters`` may mean."""

    def __init__(self, config: LoraConfig) -> None:
        self._names: dict[str, dict[str, int]] = {}  # by module: names, and their places in the config
        for place, target in enumerate(config.target_parameters or ()):
            module, _, name = target.rpartition(".")
            if len(name) <= LONGEST_NAME:
                self._names.setdefault(module, {}).setdefault(name, place)
        self._modules = EndTable(module for module in self._names if module)

    def of(self, path: str) -> tuple[str, ...]:
        """Their names, in the order of the config. Raises ValueError for more names than any module has."""
        places: dict[str, int] = {}
        for module in ("", *self._modules.find(path)):
            for name, place in self._names.get(module, {}).items():
                places[name] = min(place, places.get(name, place))
        if len(places) > _MOST_PARAMETERS:
            raise ValueError(f"target_parameters names {len(places)} of {path}, want at most {_MOST_PARAMETERS}")
        return tuple(sorted(places, key=places.__getitem__))


class _TokenIndices:
    """Finds the rows of an embedding that ``trainable_token_indices`` names."""

    def __init__(self, file: AdapterFile) -> None:
        self._directory, indices = file.directory, file.config.get("trainable_token_indices")
        self._by_name = indices if isinstance(indices, dict) else {}
        self._names = EndTable(self._by_name)
        self._of_all = tuple(indices) if isinstance(indices, list) else None

    def of(self, path: str) -> tuple[int, ...]:
        if self._of_all is not None:
            return self._of_all
        names = self._names.find(path)
        if not names or not isinstance(self._by_name[names[0]], list):
            raise ValueError(f"{self._directory}: trainable_token_indices of the config does not name {path}'s rows")
        return tuple(self._by_name[names[0]])


def _config(file: AdapterFile) -> LoraConfig:
    try:
        return LoraConfig.from_dict(file.config)
    except (TypeError, ValueError) as error:
        raise ValueError(f"{file.directory}: {error}") from error
