"""Which adapters a layer's base weights contain, and how that set changes.

A weight is a function of the set: the pristine weight plus the updates of just those adapters, added up in the order of
their names and rounded once. To change the set, every bit of the pristine weights is restored first.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Collection, Iterator, Mapping
from typing import Protocol

import torch
from torch import Tensor

from .._checks import check_merge_layer
from .._interrupts import uninterrupted
from ..exact_merge import MergeRecord, check_unmerge, merge_all_, pack_factors, plan_unmerge, remerge, run_unmerge

Factors = tuple[Tensor, Tensor, float]  # lora_A [r, cols], lora_B [rows, r], scaling


class Mergeable(Protocol):
    """What merging needs of a layer; :class:`~lora_ext.nn.layer.LoraLayer` has it all."""

    _merged: MergedAdapters | None

    def matrices(self) -> Mapping[str, object]:
        """The matrices that adapters update: :class:`~lora_ext.nn.layer.Matrix` by a key."""

    def factors(self, name: str) -> Mapping[str, Factors]:
        """The update of an adapter to each matrix it updates, by the same keys."""


@dataclasses.dataclass(frozen=True, eq=False)
class MergedMatrix:
    """The updates merged into one matrix.

    Attributes:
        ranks: by adapter name, sorted: the record's factors have them side by side.
        record: how to restore the matrix. It holds the factors as they were when merged.
    """

    ranks: Mapping[str, int]
    record: MergeRecord

    @property
    def numel(self) -> int:
        """Elements of the matrix."""
        return self.record.lora_B.shape[0] * self.record.lora_A.shape[1]

    def factors(self, name: str, device: torch.device) -> Factors:
        """What was merged under ``name``, as :func:`~lora_ext.exact_merge.pack_factors` takes it."""
        begin = sum(rank for other, rank in self.ranks.items() if other < name)
        end = begin + self.ranks[name]
        return self.record.lora_A[begin:end].to(device), self.record.lora_B[:, begin:end].to(device), 1.0


@dataclasses.dataclass(frozen=True, eq=False)
class MergedAdapters:
    """The adapters merged into one layer.

    Attributes:
        names: sorted.
        matrices: by key, those of the layer's matrices that an update was merged into.
        lost: why the weights can no longer be restored, or None.
    """

    names: tuple[str, ...]
    matrices: Mapping[str, MergedMatrix]
    lost: str | None = None

    @property
    def nbytes(self) -> int:
        return sum(matrix.record.nbytes for matrix in self.matrices.values())


@dataclasses.dataclass
class _Matrices:
    """Matrices that go into one call of the ops, with what they are called and whose they are."""

    layers: list[Mergeable] = dataclasses.field(default_factory=list)
    keys: list[str] = dataclasses.field(default_factory=list)
    views: list[Tensor] = dataclasses.field(default_factory=list)
    labels: list[str] = dataclasses.field(default_factory=list)

    def append(self, layer: Mergeable, key: str, view: Tensor, label: str) -> None:
        for column, value in zip(vars(self).values(), (layer, key, view, label), strict=True):
            column.append(value)


@torch.no_grad()
def change_merged(caller: str, wanted: Mapping[Mergeable, Collection[str]], where: Mapping[Mergeable, str]) -> None:
    """Gives every layer the adapters ``wanted`` of it, merged, and no others; or leaves all layers as they are.

    Adapters that stay merged keep the values they were merged with. ``where`` says in messages which layer it is, after
    "the weight": " of 'path'", or nothing. Ctrl-C takes effect once all layers are changed.

    Raises:
        ValueError: a result would be NaN or infinite, two weights share memory, or an update cannot be merged.
        RuntimeError: a weight was converted to another dtype while merged, or is computed by a parametrization.
    """
    restore, records = _Matrices(), []
    merge, factors, ranks = _Matrices(), [], []
    for layer in wanted:
        for key, _, view, label in stored_matrices(caller, layer, where[layer]):
            if layer._merged is not None and key in layer._merged.matrices:
                if layer._merged.lost:
                    raise RuntimeError(f"{caller}: {label} {layer._merged.lost}; forget_merge() takes it as it is now")
                check_unmerge(caller, view, layer._merged.matrices[key].record, label)
                restore.append(layer, key, view, label)
                records.append(layer._merged.matrices[key].record)
            updates = _updates(caller, layer, key, view, label, sorted(wanted[layer]))
            if updates:
                merge.append(layer, key, view, label)
                factors.append(pack_factors(view.dtype, list(updates.values())))
                ranks.append({name: A.shape[0] for name, (A, _, _) in updates.items()})

    before = {layer: layer._merged for layer in wanted}
    launches = plan_unmerge(caller, restore.views, records, restore.labels)

    with uninterrupted():  # from here on the weights and what is noted about them change in step
        run_unmerge(launches)
        for layer in wanted:
            layer._merged = None
        try:
            made = merge_all_(caller, merge.views, [A for A, _ in factors], [B for _, B in factors], merge.labels)
        except BaseException:  # nothing was merged: what was there before goes back in
            remerge(launches)
            for layer, merged in before.items():
                layer._merged = merged
            raise
        matrices: dict[Mergeable, dict[str, MergedMatrix]] = {layer: {} for layer, names in wanted.items() if names}
        for layer, key, own, record in zip(merge.layers, merge.keys, ranks, made, strict=True):
            matrices[layer][key] = MergedMatrix(own, record)
        for layer, own in matrices.items():
            layer._merged = MergedAdapters(tuple(sorted(wanted[layer])), own)


@torch.no_grad()
def merge_for_good(caller: str, wanted: Mapping[Mergeable, Collection[str]], where: Mapping[Mergeable, str]) -> None:
    """Merges the adapters ``wanted`` of each layer, of which none is merged, and keeps nothing to unmerge them by.

    Errors as :func:`change_merged`; all layers are then unchanged.
    """
    merge, factors = _Matrices(), []
    for layer, names in wanted.items():
        for key, _, view, label in stored_matrices(caller, layer, where[layer]):
            updates = _updates(caller, layer, key, view, label, sorted(names))
            if updates:
                merge.append(layer, key, view, label)
                factors.append(pack_factors(view.dtype, list(updates.values())))
    merge_all_(caller, merge.views, [A for A, _ in factors], [B for _, B in factors], merge.labels, record=False)


def stored_matrices(caller: str, layer: Mergeable, where: str) -> Iterator[tuple[str, object, Tensor, str]]:
    """``(key, matrix, its view, what it is called)`` of each matrix.

    Raises:
        RuntimeError: it is computed on every access, so that what is merged into it would be lost.
    """
    for key, matrix in layer.matrices().items():
        label = f"the {matrix.name}{where}"
        if matrix.owner._parameters.get(matrix.name) is None:
            raise RuntimeError(
                f"{caller}: {label} is not a parameter but computed, by a parametrization perhaps; remove that first"
            )
        yield key, matrix, matrix.view, label


def _updates(caller: str, layer: Mergeable, key: str, view: Tensor, label: str, names: list[str]) -> dict[str, Factors]:
    """What each adapter adds to one matrix: as it was merged where it is, else as it is now."""
    updates = {}
    for name in names:
        if layer._merged is not None and name in layer._merged.names:
            if (matrix := layer._merged.matrices.get(key)) is not None and name in matrix.ranks:
                updates[name] = matrix.factors(name, view.device)
        elif (factors := layer.factors(name).get(key)) is not None:
            check_merge_layer(f"{caller}: {label}", view, *factors[:2])
            updates[name] = factors
    return updates
