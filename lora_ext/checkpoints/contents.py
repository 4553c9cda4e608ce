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
import math
import os
import re
from collections import Counter
from collections.abc import Callable, Mapping
from typing import Literal

from torch import Tensor

from lora_ext._common.printable import listed, shown
from lora_ext._common.wrapped import KEY_PREFIX
from lora_ext.config import LoraConfig
from lora_ext.files.adapter_file import AdapterFile
from lora_ext.matching.path_names import EndTable

Kind = Literal["linear", "embedding", "conv", "attention", "parameter"]

_FACTOR = re.compile(
    r"(?:(?P<path>.*)\.)?lora_(?P<side>A\.weight|B\.weight|B\.bias|embedding_A|embedding_B|magnitude_vector)"
)
_TOKENS = re.compile(r"(?P<path>.*?)(?:\.token_adapter)?\.trainable_tokens_delta")
_MOST_PARAMETERS = 4  # with updates, in one module; real ones have up to 3


@dataclasses.dataclass(frozen=True)
class LowRankUpdate:
    """One pair of factors."""

    path: str  # of the module, without ``.base_layer``
    kind: Kind  # conv: by the number of dimensions; attention: by the out_proj next to it; parameter: by the config
    lora_A: str
    lora_B: str
    # [r, in] and [out, r]; of a conv [r, in, *kernel] and [out, r / groups, 1...]; of an embedding [r, num_embeddings]
    # and [dim, r]; of a parameter [matrices * r, in] and [out, r * matrices].
    shape_A: tuple[int, ...]
    shape_B: tuple[int, ...]
    r: int
    scaling: float
    matrices: int = 1  # that have factors each: experts, or groups of a convolution
    lora_bias: str | None = None  # key of the update of the bias, which is scaled too
    magnitude: str | None = None  # key of the norms [out] that the updated weight's rows get (DoRA)
    parameters: tuple[str, ...] = ()  # for a parameter, the names that it may have: no key says which

    @property
    def prefix(self) -> str:
        """The start of the names of the weight (not of a bare parameter) and of the bias."""
        return f"{self.path}.in_proj_" if self.kind == "attention" else f"{self.path}."

    @property
    def shape(self) -> tuple[int, int]:
        """``(out, in)`` of one matrix."""
        out = self.shape_B[0] if self.kind == "parameter" else self.shape_B[0] // self.matrices
        return out, math.prod(self.shape_A[1:])

    def layouts(self, shape: tuple[int, ...]) -> set[bool]:
        """The layouts in which the update fits a tensor of ``shape``: False for ``[out, in]``, True for ``[in, out]``.

        Conv1D and Embedding are ``[in, out]``.
        """
        A, B = self.shape_A, self.shape_B
        if self.kind == "conv":  # with groups, lora_A reaches across them
            return {False} if shape == (B[0], *A[1:]) and self.matrices == 1 else set()
        if self.kind == "parameter" and len(shape) == 3 and shape[0] == self.matrices:
            shape = shape[1:]
        elif self.matrices != 1:
            return set()
        if self.kind == "embedding":
            return {True} if shape == (A[1], B[0]) else set()
        return {transposed for transposed in (False, True) if shape == (self.shape[::-1] if transposed else self.shape)}

    def split(self, A: Tensor, B: Tensor) -> list[tuple[Tensor, Tensor]]:
        """Splits the file's factors into ``(lora_A [r, in], lora_B [out, r])`` for each matrix."""
        if self.kind == "parameter":  # the matrix is the slower index of A's rows and the faster one of B's columns
            As = A.reshape(self.matrices, -1, A.shape[-1]).unbind()
            Bs = B.reshape(B.shape[0], -1, self.matrices).unbind(-1)
        else:
            As, Bs = A.flatten(1).chunk(self.matrices), B.flatten(1).chunk(self.matrices)
        return list(zip(As, Bs, strict=True))


@dataclasses.dataclass(frozen=True)
class TokenRows:
    """Rows that replace those of an embedding: the tensor ``key [len(indices), dim]``."""

    path: str
    key: str
    indices: tuple[int, ...]


@dataclasses.dataclass(frozen=True)
class AdapterContents:
    """The contents of an adapter file. Each of its keys is in one entry."""

    file: AdapterFile
    updates: list[LowRankUpdate]
    tokens: list[TokenRows]
    replaced: dict[str, str]  # path and name of a base tensor -> key in the file of the tensor that replaces it


def open_adapter(directory: str | os.PathLike[str], *, caller: str = "open_adapter") -> AdapterContents:
    """Opens an adapter's directory in PEFT's format, and sorts its keys by kind; reads no tensor.

    Raises:
        FileNotFoundError: a file is missing.
        ValueError: a file is corrupted; the adapter is not LoRA, or of a kind that is not supported; one of two factors
            is missing; shapes of factors do not fit each other, or the rank in the config. The message begins with
            ``caller`` and lists all of these.
    """
    file = AdapterFile.open(directory, caller=caller)
    config = file.lora_config(caller)
    indices_of = _token_indices(file)
    factors: dict[str, dict[str, str]] = {}  # by the path with its .base_layer
    tokens: list[TokenRows] = []
    replaced: dict[str, str] = {}
    problems: list[str] = []
    for key in file.tensors:
        name = key.removeprefix(KEY_PREFIX)
        if match := _FACTOR.fullmatch(name):
            factors.setdefault(match["path"] or "", {})[match["side"]] = key
        elif match := _TOKENS.fullmatch(name):
            path = _without_base_layer(match["path"])
            tokens.append(TokenRows(path, key, indices_of(path)))
        elif "lora_" in name:
            problems.append(f"unknown key: {key}")
        elif not {"original_module", "modules_to_save"} & set(name.split(".")):
            # With bias="all", PEFT also writes the wrapper's copies of the biases in a module to save.
            replaced[_without_base_layer(name)] = key
    updates = []
    parameters_of = _target_parameters(file, config)
    for wrapped in factors:
        try:
            updates.append(_update(file, config, parameters_of, wrapped, factors))
        except ValueError as error:
            problems.append(str(error))
    paths = Counter(update.path for update in updates if update.kind != "parameter")
    problems += [f"{path} has two updates, and no target_parameters" for path, count in paths.items() if count > 1]
    if problems:
        raise ValueError(f"{file.path} is not an adapter that can be used here:{listed(problems)}")
    if not updates and not tokens and not replaced:
        raise ValueError(f"{file.path} holds no tensor")
    return AdapterContents(file, updates, tokens, replaced)


def _without_base_layer(path: str) -> str:
    return ".".join(part for part in path.split(".") if part != "base_layer")


def _update(
    file: AdapterFile,
    config: LoraConfig,
    parameters_of: Callable[[str], tuple[str, ...]],
    wrapped: str,
    factors: Mapping[str, Mapping[str, str]],
) -> LowRankUpdate:
    sides, path = factors[wrapped], _without_base_layer(wrapped)
    is_embedding = "embedding_A" in sides or "embedding_B" in sides
    A, B = (sides.get(side) for side in (("embedding_A", "embedding_B") if is_embedding else ("A.weight", "B.weight")))
    if A is None or B is None:
        raise ValueError(f"missing key: the other half of {next(iter(sides.values()))}")
    factor_A, factor_B = file.tensors[A], file.tensors[B]
    shape_A, shape_B = tuple(factor_A.shape), tuple(factor_B.shape)
    if len(shape_A) < 2 or len(shape_B) != len(shape_A) or 0 in shape_A + shape_B or set(shape_B[2:]) - {1}:
        raise ValueError(f"shapes of {path}: lora_A {shown(list(shape_A))}, lora_B {shown(list(shape_B))}")
    if not (factor_A.is_floating_point() and factor_B.is_floating_point()):
        raise ValueError(f"dtypes of {path}: lora_A {factor_A.dtype}, lora_B {factor_B.dtype}, want floating point")
    is_attention = _is_attention(wrapped, factors)
    parameters = () if is_embedding or is_attention else parameters_of(path)
    if is_attention:
        kind = "attention"
    elif parameters:
        kind = "parameter"
    else:
        kind = "embedding" if is_embedding else "linear" if len(shape_A) == 2 else "conv"
    names = [f"{path}.{name}" for name in parameters] or [path]
    settings = {(config.rank_for(name), config.scaling_for(name)) for name in names}
    if len(settings) > 1:
        raise ValueError(f"{path}: rank_pattern or alpha_pattern tell its parameters {shown(list(parameters))} apart")
    r, scaling = settings.pop()
    if kind == "parameter":
        matrices = shape_A[0] // r
        fits = shape_A[0] == shape_B[1] == matrices * r
    else:
        matrices = r // shape_B[1] if kind == "conv" else 1
        fits = shape_A[0] == shape_B[1] * matrices == r
    if not fits:
        raise ValueError(
            f"rank of {path}: lora_A {list(shape_A)} and lora_B {list(shape_B)}, but the config gives it r={r}"
        )
    if wrapped.endswith(".out_proj") and _is_attention(wrapped.removesuffix(".base_layer.out_proj"), factors):
        scaling *= 2  # as in PEFT, merged or not: its attention merges this update, and then the layer adds it again
    magnitude, bias = sides.get("magnitude_vector"), sides.get("B.bias")
    if (magnitude is not None) != config.use_dora:
        has = "no lora_magnitude_vector" if magnitude is None else "a lora_magnitude_vector"
        raise ValueError(f"{path} has {has}, but the config's use_dora is {config.use_dora}")
    if magnitude is not None and kind != "linear":
        raise ValueError(f"{path}: use_dora is supported for linear layers only; this is of the kind {kind!r}")
    norms = None if magnitude is None else file.tensors[magnitude]
    if norms is not None and (tuple(norms.shape) != shape_B[:1] or not norms.is_floating_point()):
        raise ValueError(f"shape of {magnitude}: {shown(list(norms.shape))}, want {[shape_B[0]]} numbers")
    return LowRankUpdate(path, kind, A, B, shape_A, shape_B, r, scaling, matrices, bias, magnitude, parameters)


def _is_attention(wrapped: str, factors: Mapping[str, object]) -> bool:
    """Returns whether this is a MultiheadAttention: it has an update, and so has the out_proj in it."""
    return wrapped in factors and f"{wrapped}.base_layer.out_proj" in factors


def _target_parameters(file: AdapterFile, config: LoraConfig) -> Callable[[str], tuple[str, ...]]:
    """Returns a function from the path of a module to its parameters that ``target_parameters`` may mean."""
    names: dict[str, dict[str, None]] = {}  # of the module that a target names
    for target in config.target_parameters or ():
        module, _, name = target.rpartition(".")
        names.setdefault(module, {})[name] = None
        if len(names[module]) > _MOST_PARAMETERS:
            text = f"{file.directory}: target_parameters names too many parameters of {shown(module)}"
            raise ValueError(f"{text}, want at most {_MOST_PARAMETERS}")
    modules = EndTable(names)
    return lambda path: tuple(
        dict.fromkeys(name for module in ("", *modules.find(path)) for name in names.get(module, ()))
    )


def _token_indices(file: AdapterFile) -> Callable[[str], tuple[int, ...]]:
    """Returns a function from the path of an embedding to its rows in ``trainable_token_indices``."""
    given = file.config.get("trainable_token_indices")
    by_name = given if isinstance(given, dict) else {}
    modules = EndTable(by_name)

    def indices_of(path: str) -> tuple[int, ...]:
        found = given if isinstance(given, list) else next((by_name[name] for name in modules.find(path)), None)
        if not isinstance(found, list):
            raise ValueError(f"{file.directory}: trainable_token_indices of the config does not name {path}'s rows")
        return tuple(found)

    return indices_of
