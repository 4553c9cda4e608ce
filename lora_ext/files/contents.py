"""What an adapter's file changes, told from its keys and its config alone.

PEFT's keys, after ``base_model.model.``. ``.base_layer`` may follow any module that is wrapped:

    <path>.lora_A.weight, <path>.lora_B.weight       Linear, Conv1D, ConvNd
    <path>.lora_embedding_A, <path>.lora_embedding_B Embedding
    <path>.lora_A.weight, <path>.base_layer.lora_A.weight ...   target_parameters of one module, the first innermost
    <path>.lora_B.bias, <path>.lora_magnitude_vector lora_bias and use_dora
    <path>.token_adapter.trainable_tokens_delta      rows of an Embedding
    <path>.<name>                                    a parameter or buffer that replaces the base's
"""

from __future__ import annotations

import dataclasses
import math
import os
import re
from collections import Counter
from collections.abc import Mapping
from typing import Literal

from torch import Tensor

from lora_ext._common.matching import path_ends
from lora_ext._common.messages import listed, shown
from lora_ext._common.modules import KEY_PREFIX
from lora_ext.config import LoraConfig
from lora_ext.files.adapter_file import AdapterFile, is_duplicate

Kind = Literal["linear", "embedding", "conv", "parameter"]

_FACTOR = re.compile(
    r"(?:(?P<path>.*)\.)?lora_(?P<side>A\.weight|B\.weight|B\.bias|embedding_A|embedding_B|magnitude_vector)"
)
_OPTIONS = {"B.bias": "lora_bias", "magnitude_vector": "use_dora"}  # what an option trains next to the factors
_TOKENS = re.compile(r"(?P<path>.*?)(?:\.token_adapter)?\.trainable_tokens_delta")
_MOST_PARAMETERS = 4  # with updates, in one module; real ones have up to 3


@dataclasses.dataclass(frozen=True, eq=False)
class LowRankUpdate:
    """One pair of factors. They are mapped: their bytes are read when they are used."""

    path: str  # of the module, without ``.base_layer``
    kind: Kind  # conv: by the number of dimensions; parameter: by the config
    key: str  # of lora_A
    # [r, in] and [out, r]; of a conv [r, in, *kernel] and [out, r, 1...]; of an embedding [r, num_embeddings] and
    # [dim, r]; of a parameter [matrices * r, in] and [out, r * matrices].
    lora_A: Tensor
    lora_B: Tensor
    r: int
    scaling: float
    matrices: int = 1  # of a parameter: experts, which have factors each
    parameters: tuple[str, ...] = ()  # for a parameter, the names that it may have: no key says which

    @property
    def names(self) -> list[str]:
        """The names of the weight, or of the parameters that it may be."""
        return [f"{self.path}.{name}" for name in self.parameters or ("weight",)]

    @property
    def shape(self) -> tuple[int, int]:
        """``(out, in)`` of one matrix."""
        return self.lora_B.shape[0], math.prod(self.lora_A.shape[1:])

    def layouts(self, shape: tuple[int, ...]) -> set[bool]:
        """The layouts in which the update fits a tensor of ``shape``: False for ``[out, in]``, True for ``[in, out]``.

        Conv1D and Embedding are ``[in, out]``.
        """
        if self.kind == "conv":
            return {False} if shape == (self.lora_B.shape[0], *self.lora_A.shape[1:]) else set()
        if self.kind == "embedding":
            return {True} if shape == self.shape[::-1] else set()
        if self.kind == "parameter" and len(shape) == 3 and shape[0] == self.matrices:
            shape = shape[1:]
        elif self.matrices != 1:
            return set()
        return {transposed for transposed in (False, True) if shape == (self.shape[::-1] if transposed else self.shape)}

    def factors(self) -> list[tuple[Tensor, Tensor]]:
        """``(lora_A [r, in], lora_B [out, r])`` of each matrix."""
        A, B = self.lora_A.flatten(1), self.lora_B.flatten(1)
        if self.kind != "parameter":
            return [(A, B)]
        # The matrix is the slower index of A's rows and the faster one of B's columns.
        return list(zip(A.chunk(self.matrices), B.unflatten(1, (-1, self.matrices)).unbind(-1), strict=True))


@dataclasses.dataclass(frozen=True)
class AdapterContents:
    """The contents of an adapter file."""

    file: AdapterFile
    updates: list[LowRankUpdate]
    tokens: dict[str, Tensor]  # trained rows of embeddings, by path; the config says which
    replaced: dict[str, Tensor]  # by path and name of the base's tensor
    options: frozenset[str]  # use_dora, lora_bias, trainable_token_indices: merged in memory only


def open_adapter(directory: str | os.PathLike[str], *, caller: str = "open_adapter") -> AdapterContents:
    """Opens an adapter's directory (:meth:`AdapterFile.open`), and sorts its keys (:func:`contents_of`)."""
    return contents_of(AdapterFile.open(directory, caller=caller), caller=caller)


def contents_of(file: AdapterFile, *, caller: str) -> AdapterContents:
    """Sorts the keys of an adapter by kind; reads no tensor.

    ValueError: the adapter is not LoRA, or of a kind that is not supported; one of two factors is missing; shapes of
    factors do not fit each other, or the rank in the config. The message begins with ``caller`` and lists all of these.
    """
    config = file.lora_config(caller)
    factors: dict[str, dict[str, str]] = {}  # by the path with its .base_layer
    tokens: dict[str, Tensor] = {}
    replaced: dict[str, Tensor] = {}
    problems: list[str] = []
    for key, tensor in file.tensors.items():
        name = key.removeprefix(KEY_PREFIX)
        if match := _FACTOR.fullmatch(name):
            factors.setdefault(match["path"] or "", {})[match["side"]] = key
        elif match := _TOKENS.fullmatch(name):
            tokens[_without_base_layer(match["path"])] = tensor
        elif "lora_" in name:
            problems.append(f"unknown key: {key}")
        elif not is_duplicate(name):
            replaced[_without_base_layer(name)] = tensor
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
    if not (updates or tokens or replaced):
        raise ValueError(f"{file.path} holds no tensor")
    options = {_OPTIONS[side] for sides in factors.values() for side in sides if side in _OPTIONS}
    options |= {option for option in _OPTIONS.values() if file.config.get(option)}
    options |= {"trainable_token_indices"} if tokens else set()
    return AdapterContents(file, updates, tokens, replaced, frozenset(options))


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
    keys = [sides.get(side) for side in (("embedding_A", "embedding_B") if is_embedding else ("A.weight", "B.weight"))]
    if None in keys:
        raise ValueError(f"missing key: the other half of {next(iter(sides.values()))}")
    A, B = (file.tensors[key] for key in keys)
    if A.dim() < 2 or B.dim() != A.dim() or 0 in A.shape + B.shape or set(B.shape[2:]) - {1}:
        raise ValueError(f"shapes of {path}: lora_A {shown(list(A.shape))}, lora_B {shown(list(B.shape))}")
    if not (A.is_floating_point() and B.is_floating_point()):
        raise ValueError(f"dtypes of {path}: lora_A {A.dtype}, lora_B {B.dtype}, want floating point")
    targets = dict.fromkeys(name for end in (*path_ends(path), "") for name in parameters_of.get(end, ()))
    parameters = () if is_embedding else tuple(targets)
    names = [f"{path}.{name}" for name in parameters] or [path]
    settings = {(config.rank_for(name), config.scaling_for(name)) for name in names}
    if len(settings) > 1:
        raise ValueError(f"{path}: rank_pattern or alpha_pattern tell its parameters {shown(parameters)} apart")
    r, scaling = settings.pop()
    kind = "parameter" if parameters else "embedding" if is_embedding else "linear" if A.dim() == 2 else "conv"
    matrices = A.shape[0] // r if parameters else 1
    if not A.shape[0] == B.shape[1] == matrices * r:
        text = f"lora_A {list(A.shape)} and lora_B {list(B.shape)}, but the config gives it r={r}"
        if kind == "conv":
            text += "; an update of a grouped convolution reaches across the groups, which no weight of it can hold"
        raise ValueError(f"rank of {path}: {text}")
    return LowRankUpdate(path, kind, keys[0], A, B, r, scaling, matrices, parameters)


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
