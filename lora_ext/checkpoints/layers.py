"""The layers that adapters update, with their factors and the base's weights. Tensors are read when asked for."""

from __future__ import annotations

import collections
import dataclasses
import math
from collections.abc import Iterator, Mapping, Sequence

from torch import Tensor

from lora_ext._common.wrapped import KEY_PREFIX
from lora_ext.checkpoints.changes import MergeChanges, Term, find_changes
from lora_ext.checkpoints.checkpoint_files import Checkpoint
from lora_ext.checkpoints.contents import AdapterContents, LowRankUpdate
from lora_ext.checkpoints.layouts import num_matrices
from lora_ext.checkpoints.merged_rows import matrix_shape, split_stack
from lora_ext.files.adapter_file import AdapterFile


@dataclasses.dataclass(frozen=True)
class LayerWeight:
    """A matrix of a checkpoint: a whole tensor, or one matrix of a stack.

    Attributes:
        key: key of the tensor in the checkpoint.
        shape: ``(rows, cols)`` of the matrix as stored.
        index: number of the matrix in the stack.
        transposed: the matrix is stored as ``[in, out]``, as in Conv1D and Embedding.
    """

    checkpoint: Checkpoint
    key: str
    shape: tuple[int, int]
    index: int
    transposed: bool

    @property
    def nbytes(self) -> int:
        """Bytes of the matrix."""
        return math.prod(self.shape) * self.checkpoint.info(self.key).torch_dtype.itemsize

    def read(self) -> Tensor:
        """Reads the matrix as stored, into new memory."""
        size = math.prod(self.shape)
        return self.checkpoint.elements(self.key, self.index * size, (self.index + 1) * size).view(self.shape)


@dataclasses.dataclass(frozen=True)
class LayerFactors:
    """One adapter's update of a layer: the matrix number ``index`` of the stack that ``update`` names in ``file``."""

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
        """Bytes of both factors."""
        return self.update.r * sum(self.shape) * self.file.dtype(self.update.lora_A).itemsize

    def read(self) -> tuple[Tensor, Tensor]:
        """Reads ``lora_A [r, in]`` and ``lora_B [out, r]``, without the scaling."""
        A, B = self.file.tensor(self.update.lora_A), self.file.tensor(self.update.lora_B)
        pairs = split_stack(A, B, num_matrices(self.file, self.update), self.update.kind == "parameter")
        return pairs[self.index]


@dataclasses.dataclass(frozen=True)
class Layer:
    """A weight that at least one adapter updates.

    Attributes:
        name: path of the module, followed by ``[i]`` if it holds several matrices.
        factors: number of the adapter -> its factors, for the adapters that update this layer.
        weight: weight of the base; None if there is no base, or if the base has it under another layer's name.
    """

    name: str
    factors: Mapping[int, LayerFactors]
    weight: LayerWeight | None

    @property
    def shape(self) -> tuple[int, int]:
        """``(out, in)``"""
        return next(iter(self.factors.values())).shape

    @property
    def nbytes(self) -> int:
        """Bytes of the factors and the weight."""
        return sum(one.nbytes for one in self.factors.values()) + (self.weight.nbytes if self.weight else 0)

    def release(self) -> None:
        """Frees the memory of factors that were read."""
        for one in self.factors.values():
            one.file.release()


def find_layers(
    adapters: Sequence[AdapterContents], base: Checkpoint | None, *, fan_in_fan_out: bool | None = None
) -> list[Layer]:
    """Finds the layers that adapters update, in the order of the adapters' files. Reads no tensor.

    Ignores tensors that an adapter replaces in full, biases, and rows of embeddings.

    Args:
        fan_in_fan_out: see :func:`~lora_ext.checkpoints.merge`.

    Raises:
        ValueError: an adapter does not fit ``base``, or the adapters do not fit each other; the message lists all
            misfits.
    """
    found: dict[str, dict[int, LayerFactors]] = {}
    weights: dict[str, dict[int, LayerWeight]] = {}
    for number, contents in enumerate(adapters):
        updates = [dataclasses.replace(update, lora_bias=None) for update in contents.updates]
        changes = None
        if base is not None:
            bare = AdapterContents(contents.file, updates, [], {})
            changes = find_changes(base, [bare], fan_in_fan_out=fan_in_fan_out, untie=True)
        targets = dict(_targets(changes)) if changes is not None else {}
        for name, factors in _named(contents.file, updates):
            found.setdefault(name, {})[number] = factors
            if (target := targets.get(factors.update.lora_A)) is not None:
                key, term = target
                weights.setdefault(name, {})[number] = _weight(base, changes, key, term, factors.index)
    problems = []
    for name, by_adapter in found.items():
        weights = list(weights.get(name, {}).values())
        for what, values in (
            ("is {} in one adapter and {} in another", [list(factors.shape) for factors in by_adapter.values()]),
            ("is {} for one adapter and {} for another", [weight.key for weight in weights]),
            (
                "is stored [in, out] for one adapter ({}) and [out, in] for another ({}): say which (--fan-in-fan-out)",
                [weight.transposed for weight in weights],
            ),
        ):
            problems += [f"{name} {what.format(values[0], other)}" for other in values if other != values[0]][:1]
    if problems:
        raise ValueError("the adapters are not of one model:\n  " + "\n  ".join(problems))
    return [
        Layer(name, by_adapter, next(iter(weights.get(name, {}).values()), None)) for name, by_adapter in found.items()
    ]


def _targets(changes: MergeChanges) -> Iterator[tuple[str, tuple[str, Term]]]:
    """Yields the key of each update's ``lora_A``, with the tensor it belongs to."""
    for key in changes.changed:
        for term in changes.tensors[key].terms:
            yield term.lora_A, (key, term)


def _weight(base: Checkpoint, changes: MergeChanges, key: str, term: Term, index: int) -> LayerWeight:
    tensor = changes.tensors[key]
    rows, cols = matrix_shape(tensor)
    return LayerWeight(base, tensor.source, (rows // term.matrices, cols), index, term.layout == "transposed")


def _named(file: AdapterFile, updates: Sequence[LowRankUpdate]) -> Iterator[tuple[str, LayerFactors]]:
    counts = collections.Counter(update.path for update in updates)
    for update in updates:
        name = update.path
        if counts[name] > 1:  # several parameters of one module: the file distinguishes them by their depth of wrapping
            name = update.lora_A.removeprefix(KEY_PREFIX).rpartition(".lora_")[0]
        matrices = num_matrices(file, update)
        for index in range(matrices):
            yield (f"{name}[{index}]" if matrices > 1 else name), LayerFactors(file, update, index)
