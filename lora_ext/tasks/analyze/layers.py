"""The layers that adapters update, with their factors and the base's weight; tensors are read on demand."""

from __future__ import annotations

import collections
import dataclasses
import math
import re
from collections.abc import Iterator, Mapping, Sequence

import torch
from torch import Tensor

from lora_ext.checkpoints.changes import MergePlan, Term, plan_merge
from lora_ext.checkpoints.checkpoint_files import Checkpoint
from lora_ext.checkpoints.contents import AdapterContents, LowRankUpdate
from lora_ext.checkpoints.layouts import num_matrices
from lora_ext.checkpoints.merged_rows import matrix_shape, split_stack
from lora_ext.files.adapter_file import KEY_PREFIX, AdapterFile
from lora_ext.files.file_bytes import read_into
from lora_ext.files.regular_file import open_regular
from lora_ext.files.safetensors_format import TensorInfo

__all__ = ["Factors", "Layer", "Weight", "find_layers", "places"]


@dataclasses.dataclass(frozen=True)
class Weight:
    """A matrix of a checkpoint: a whole tensor, or one of several stacked in a tensor.

    Attributes:
        key: the tensor's name in the checkpoint.
        shape: ``(rows, cols)`` of the matrix as stored.
        index: the matrix's position in the stack.
        transposed: whether it is stored as ``[in, out]``, as in Conv1D and Embedding.
    """

    checkpoint: Checkpoint
    key: str
    shape: tuple[int, int]
    index: int
    transposed: bool

    @property
    def nbytes(self) -> int:
        return math.prod(self.shape) * self._info.torch_dtype.itemsize

    def read(self) -> Tensor:
        """Reads the matrix as stored, into new memory."""
        matrix = torch.empty(self.shape, dtype=self._info.torch_dtype)
        with open_regular(self.checkpoint.file(self.key)) as file:
            read_into(file, self._info.begin + self.index * self.nbytes, matrix)
        return matrix

    @property
    def _info(self) -> TensorInfo:
        return self.checkpoint.info(self.key)


@dataclasses.dataclass(frozen=True)
class Factors:
    """One adapter's update of a layer: matrix ``index`` of the stack that ``update`` names in ``file``."""

    file: AdapterFile
    update: LowRankUpdate
    index: int

    @property
    def shape(self) -> tuple[int, int]:
        """``(out, in)`` of the update."""
        A, B = self.file.shape(self.update.lora_A), self.file.shape(self.update.lora_B)
        out = B[0] if self.update.kind == "parameter" else B[0] // num_matrices(self.file, self.update)
        return out, math.prod(A[1:])

    @property
    def nbytes(self) -> int:
        return self.update.r * sum(self.shape) * self.file.dtype(self.update.lora_A).itemsize

    def read(self) -> tuple[Tensor, Tensor]:
        """Returns ``lora_A [r, in]`` and ``lora_B [out, r]``, without the scaling."""
        A, B = self.file.tensor(self.update.lora_A), self.file.tensor(self.update.lora_B)
        pairs = split_stack(A, B, num_matrices(self.file, self.update), self.update.kind == "parameter")
        return pairs[self.index]


@dataclasses.dataclass(frozen=True)
class Layer:
    """A weight that at least one adapter updates.

    Attributes:
        name: the module's path; with ``[i]`` if the module holds several matrices.
        factors: keyed by the adapter's number; adapters without this layer are missing.
        weight: the base's weight; None without a base, or if the base stores it under another layer's name.
    """

    name: str
    factors: Mapping[int, Factors]
    weight: Weight | None

    @property
    def shape(self) -> tuple[int, int]:
        """``(out, in)``"""
        return next(iter(self.factors.values())).shape

    @property
    def nbytes(self) -> int:
        """Bytes to read: the factors and the weight."""
        return sum(factors.nbytes for factors in self.factors.values()) + (self.weight.nbytes if self.weight else 0)

    def release(self) -> None:
        """Frees the memory of the factors that were read."""
        for factors in self.factors.values():
            factors.file.release()


def find_layers(
    adapters: Sequence[AdapterContents], base: Checkpoint | None, *, fan_in_fan_out: bool | None = None
) -> list[Layer]:
    """Returns the layers of all adapters, in the order of the first adapter's file; reads no tensor.

    Skips fully replaced modules, biases and token rows.

    Raises:
        ValueError: an adapter does not fit ``base``, or the adapters do not fit each other; lists every mismatch.
    """
    found: dict[str, dict[int, Factors]] = {}
    weights: dict[str, dict[int, Weight]] = {}
    for number, contents in enumerate(adapters):
        updates = [dataclasses.replace(update, lora_bias=None) for update in contents.updates]
        plan = None
        if base is not None:
            bare = AdapterContents(contents.file, updates, [], {})
            plan = plan_merge(base, [bare], fan_in_fan_out=fan_in_fan_out, untie=True)
        targets = dict(_targets(plan)) if plan is not None else {}
        for name, factors in _named(contents.file, updates):
            found.setdefault(name, {})[number] = factors
            if (target := targets.get(factors.update.lora_A)) is not None:
                key, term = target
                weights.setdefault(name, {})[number] = _weight(base, plan, key, term, factors.index)
    problems = []
    for name, by_adapter in found.items():
        base_weights = list(weights.get(name, {}).values())
        for what, values in (
            ("is {} in one adapter and {} in another", [list(factors.shape) for factors in by_adapter.values()]),
            ("is {} for one adapter and {} for another", [weight.key for weight in base_weights]),
            (
                "is stored [in, out] for one adapter ({}) and [out, in] for another ({}): say which (--fan-in-fan-out)",
                [weight.transposed for weight in base_weights],
            ),
        ):
            problems += [f"{name} {what.format(values[0], other)}" for other in values if other != values[0]][:1]
    if problems:
        raise ValueError("the adapters are not of one model:\n  " + "\n  ".join(problems))
    return [
        Layer(name, by_adapter, next(iter(weights.get(name, {}).values()), None)) for name, by_adapter in found.items()
    ]


def places(names: Sequence[str]) -> dict[str, tuple[int | None, str]]:
    """Returns each layer's block and kind: 3 and ``mlp.up_proj`` for ``model.layers.3.mlp.up_proj``.

    The first number in a path is the block; later numbers, such as an expert's, become ``*``. If several lists of
    blocks have layers of one kind, as in encoder and decoder, the list's name is part of the kind. A path without a
    number gives None and the whole name.
    """
    split: dict[str, tuple[str, int | None, str]] = {}
    for name in names:
        parts = re.sub(r"\[\d+\]$", "", name).split(".")
        at = next((i for i, part in enumerate(parts) if part.isdecimal()), None)
        if at is None:
            split[name] = "", None, ".".join(parts)
        else:
            kind = ["*" if part.isdecimal() else part for part in parts[at + 1 :]]
            split[name] = ".".join(parts[:at]), int(parts[at]), ".".join(kind) or "*"
    lists: dict[str, set[str]] = {}
    for blocks, _, kind in split.values():
        lists.setdefault(kind, set()).add(blocks)
    return {
        name: (block, f"{blocks}.*.{kind}" if len(lists[kind]) > 1 else kind)
        for name, (blocks, block, kind) in split.items()
    }


def _targets(plan: MergePlan) -> Iterator[tuple[str, tuple[str, Term]]]:
    """Yields the adapter key of each update and the tensor that it changes."""
    for key in plan.changed:
        for term in plan.tensors[key].terms:
            yield term.lora_A, (key, term)


def _weight(base: Checkpoint, plan: MergePlan, key: str, term: Term, index: int) -> Weight:
    tensor = plan.tensors[key]
    rows, cols = matrix_shape(tensor)
    return Weight(base, tensor.source, (rows // term.matrices, cols), index, term.layout == "transposed")


def _named(file: AdapterFile, updates: Sequence[LowRankUpdate]) -> Iterator[tuple[str, Factors]]:
    counts = collections.Counter(update.path for update in updates)
    for update in updates:
        name = update.path
        if counts[name] > 1:  # parameters of one module: the file tells them apart by the depth of their wrapper
            name = update.lora_A.removeprefix(KEY_PREFIX).rpartition(".lora_")[0]
        matrices = num_matrices(file, update)
        for index in range(matrices):
            yield (f"{name}[{index}]" if matrices > 1 else name), Factors(file, update, index)
