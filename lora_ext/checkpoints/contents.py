"""The layers that an adapter's file changes, read from its keys alone.

PEFT's keys, after ``base_model.model.``. ``.base_layer`` may follow any module that is wrapped:

    <path>.lora_A.weight, <path>.lora_B.weight       Linear, Conv1D, ConvNd
    <path>.lora_embedding_A, <path>.lora_embedding_B Embedding
    <path>.lora_A.weight, <path>.base_layer.lora_A.weight ...   target_parameters of one module, the first innermost
    <path>.lora_B.bias, <path>.lora_magnitude_vector lora_bias and use_dora, which are merged in memory only
    <path>.token_adapter.trainable_tokens_delta      rows of an Embedding
    <path>.<name>                                    a parameter or buffer that replaces the base's
"""

from __future__ import annotations

import dataclasses
import math
import os
import re
from collections import Counter
from collections.abc import Iterator, Mapping
from typing import Literal

from torch import Tensor

from lora_ext._common.printable import listed, shown
from lora_ext._common.wrapped import KEY_PREFIX
from lora_ext.config import LoraConfig
from lora_ext.files.adapter_file import AdapterFile, is_duplicate

Kind = Literal["linear", "embedding", "conv", "parameter"]

_FACTOR = re.compile(
    r"(?:(?P<path>.*)\.)?lora_(?P<side>A\.weight|B\.weight|B\.bias|embedding_A|embedding_B|magnitude_vector)"
)
_OTHERS = {"B.bias": "lora_bias", "magnitude_vector": "use_dora"}  # what an option trains next to the factors
_TOKENS = re.compile(r"(?P<path>.*?)(?:\.token_adapter)?\.trainable_tokens_delta")
_MOST_PARAMETERS = 4  # with updates, in one module; real ones have up to 3


@dataclasses.dataclass(frozen=True)
class LowRankUpdate:
    """One pair of factors."""

    path: str  # of the module, without ``.base_layer``
    kind: Kind  # conv: by the number of dimensions; parameter: by the config
    lora_A: str
    lora_B: str
    # [r, in] and [out, r]; of a conv [r, in, *kernel] and [out, r / groups, 1...]; of an embedding [r, num_embeddings]
    # and [dim, r]; of a parameter [matrices * r, in] and [out, r * matrices].
    shape_A: tuple[int, ...]
    shape_B: tuple[int, ...]
    r: int
    scaling: float
    matrices: int = 1  # that have factors each: experts, or groups of a convolution
    others: dict[str, str] = dataclasses.field(default_factory=dict, hash=False)  # key of what an option trains, too
    parameters: tuple[str, ...] = ()  # for a parameter, the names that it may have: no key says which

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
            tokens.append(TokenRows(path, key, _token_indices(file, path)))
        elif "lora_" in name:
            problems.append(f"unknown key: {key}")
        elif not is_duplicate(name):
            replaced[_without_base_layer(name)] = key
    updates = []
    parameters = _target_parameters(file, config)
    for wrapped, sides in factors.items():
        try:
            updates.append(_update(file, config, parameters, _without_base_layer(wrapped), sides))
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
    parameters_of: Mapping[str, Mapping[str, None]],
    path: str,
    sides: Mapping[str, str],
) -> LowRankUpdate:
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
    targets = dict.fromkeys(name for end in _ends(path) for name in parameters_of.get(end, ()))
    parameters = [] if is_embedding else list(targets)
    names = [f"{path}.{name}" for name in parameters] or [path]
    settings = {(config.rank_for(name), config.scaling_for(name)) for name in names}
    if len(settings) > 1:
        raise ValueError(f"{path}: rank_pattern or alpha_pattern tell its parameters {shown(parameters)} apart")
    r, scaling = settings.pop()
    if parameters:
        kind, matrices = "parameter", shape_A[0] // r
        fits = shape_A[0] == shape_B[1] == matrices * r
    else:
        kind = "embedding" if is_embedding else "linear" if len(shape_A) == 2 else "conv"
        matrices = r // shape_B[1] if kind == "conv" else 1
        fits = shape_A[0] == shape_B[1] * matrices == r
    if not fits:
        raise ValueError(
            f"rank of {path}: lora_A {list(shape_A)} and lora_B {list(shape_B)}, but the config gives it r={r}"
        )
    others = {option: sides[side] for side, option in _OTHERS.items() if side in sides}
    return LowRankUpdate(path, kind, A, B, shape_A, shape_B, r, scaling, matrices, others, tuple(parameters))


def _target_parameters(file: AdapterFile, config: LoraConfig) -> dict[str, dict[str, None]]:
    """Returns the parameters in ``target_parameters`` by the module that a target names."""
    names: dict[str, dict[str, None]] = {}
    for target in config.target_parameters or ():
        module, _, name = target.rpartition(".")
        names.setdefault(module, {})[name] = None
        if len(names[module]) > _MOST_PARAMETERS:
            text = f"{file.directory}: target_parameters names too many parameters of {shown(module)}"
            raise ValueError(f"{text}, want at most {_MOST_PARAMETERS}")
    return names


def _token_indices(file: AdapterFile, path: str) -> tuple[int, ...]:
    """Returns the rows of the embedding ``path`` in ``trainable_token_indices``."""
    given = file.config.get("trainable_token_indices")
    if isinstance(given, dict):
        given = next((given[end] for end in _ends(path) if end in given), None)
    if not isinstance(given, list):
        raise ValueError(f"{file.directory}: trainable_token_indices of the config does not name {path}'s rows")
    return tuple(given)


def _ends(path: str) -> Iterator[str]:
    """Yields ``path`` and its ends after a dot, the longest first, down to the empty one."""
    while path:
        yield path
        path = path.partition(".")[2]
    yield ""
