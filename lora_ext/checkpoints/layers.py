"""The layers that adapters update, with their factors and the base's weights. Tensors are read when asked for."""

from __future__ import annotations

import dataclasses
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from typing import NamedTuple

from torch import Tensor

from lora_ext._common.printable import listed, shown
from lora_ext._common.wrapped import KEY_PREFIX
from lora_ext.checkpoints.changes import find_changes
from lora_ext.checkpoints.checkpoint import Checkpoint
from lora_ext.checkpoints.contents import AdapterContents, LowRankUpdate
from lora_ext.files.adapter_file import AdapterFile


class LayerWeight(NamedTuple):
    """A matrix of a checkpoint: the tensor ``key``, or the matrix number ``index`` of the stack that it holds.

    ``shape`` is ``(rows, columns)`` as stored, which is ``[in, out]`` if ``transposed``, as in Conv1D and Embedding.
    """

    checkpoint: Checkpoint
    key: str
    shape: tuple[int, int]
    index: int
    transposed: bool

    def read(self) -> Tensor:
        """Reads the matrix as stored, into new memory."""
        rows, columns = self.shape
        return self.checkpoint.rows(self.key, columns, self.index * rows, (self.index + 1) * rows)


class LayerFactors(NamedTuple):
    """One adapter's update of a layer: the matrix number ``index`` of the stack that ``update`` names in ``file``."""

    file: AdapterFile
    update: LowRankUpdate
    index: int

    def read(self) -> tuple[Tensor, Tensor]:
        """Reads ``lora_A [r, in]`` and ``lora_B [out, r]``, without the scaling."""
        pairs = self.update.split(self.file.tensors[self.update.lora_A], self.file.tensors[self.update.lora_B])
        return pairs[self.index]


class Layer(NamedTuple):
    """A weight that at least one adapter updates."""

    name: str  # path of the module, followed by ``[i]`` if it holds several matrices
    factors: Mapping[int, LayerFactors]  # by the number of the adapter, for the adapters that update this layer
    weight: LayerWeight | None  # None if there is no base


def find_layers(
    adapters: Sequence[AdapterContents], base: Checkpoint | None, *, fan_in_fan_out: bool | None = None
) -> list[Layer]:
    """Finds the layers that adapters update by low-rank factors, in the order of the adapters' files; reads no tensor.

    ValueError: an adapter does not fit ``base``, or the adapters do not fit each other (the message lists all misfits);
    an adapter rescales weights (DoRA).
    """
    factors: dict[str, dict[int, LayerFactors]] = {}
    weights: dict[str, dict[int, LayerWeight]] = {}
    for number, contents in enumerate(adapters):
        if contents.file.config.get("use_dora"):
            raise ValueError(
                f"{contents.file.directory} is a DoRA adapter (use_dora), which rescales the weights that it is added "
                "to; give one without it"
            )
        found = _weights(contents, base, fan_in_fan_out) if base is not None else {}
        for name, one in _named(contents):
            factors.setdefault(name, {})[number] = one
            if one.update.lora_A in found:
                weights.setdefault(name, {})[number] = found[one.update.lora_A][one.index]
    problems = []
    for name, by_adapter in factors.items():
        shapes = {one.update.shape for one in by_adapter.values()}
        places = {(one.key, one.transposed) for one in weights.get(name, {}).values()}
        if len(shapes) > 1:
            problems.append(f"{name} has the shapes {shown(sorted(map(list, shapes)))}")
        elif len(places) > 1:
            found = " and ".join(f"{key} {'[in, out]' if flag else '[out, in]'}" for key, flag in sorted(places))
            problems.append(f"{name} is {found}: say which (--fan-in-fan-out)")
    if problems:
        raise ValueError(f"the adapters are not of one model:{listed(problems)}")
    return [Layer(name, by, next(iter(weights.get(name, {}).values()), None)) for name, by in factors.items()]


def _weights(contents: AdapterContents, base: Checkpoint, fan_in_fan_out: bool | None) -> dict[str, list[LayerWeight]]:
    """The matrices that the adapter updates, by the key of ``lora_A``."""
    updates = [dataclasses.replace(update, others={}) for update in contents.updates]
    factors = [AdapterContents(contents.file, updates, [], {})]
    found: dict[str, list[LayerWeight]] = {}
    for change in find_changes(base, factors, fan_in_fan_out=fan_in_fan_out).values():
        for term in change.terms:
            shape = term.update.shape[::-1] if term.transposed else term.update.shape
            count = range(term.update.matrices)
            found[term.update.lora_A] = [LayerWeight(base, change.source, shape, i, term.transposed) for i in count]
    return found


def _named(contents: AdapterContents) -> Iterator[tuple[str, LayerFactors]]:
    counts = Counter(update.path for update in contents.updates)
    for update in contents.updates:
        name = update.path
        if counts[name] > 1:  # several parameters of one module: the file distinguishes them by their depth of wrapping
            name = update.lora_A.removeprefix(KEY_PREFIX).rpartition(".lora_")[0]
        for index in range(update.matrices):
            yield (f"{name}[{index}]" if update.matrices > 1 else name), LayerFactors(contents.file, update, index)
