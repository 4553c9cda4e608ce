"""Which adapters a layer's base weight contains, and how that set changes.

The weight is a function of the set: the pristine weight plus the updates of just those adapters, added up in the order
of their names and rounded once. To change the set, every bit of the pristine weight is restored first.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Collection, Mapping
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from .._checks import check_merge_layer
from .._interrupts import uninterrupted
from ..exact_merge import MergeRecord, check_unmerge, merge_all_, pack_factors, plan_unmerge, remerge, run_unmerge

if TYPE_CHECKING:
    from .linear import LoraLinear


@dataclasses.dataclass(frozen=True, eq=False)
class MergedAdapters:
    """The adapters merged into one weight.

    Attributes:
        ranks: by adapter name, sorted: the record's factors have them side by side.
        record: how to restore the weight. It holds the factors as they were when merged.
        lost: why the weight can no longer be restored, or None.
    """

    ranks: Mapping[str, int]
    record: MergeRecord
    lost: str | None = None

    @property
    def names(self) -> tuple[str, ...]:
        return tuple(self.ranks)

    def factors(self, name: str, device: torch.device) -> tuple[Tensor, Tensor, float]:
        """What was merged under ``name``, as :func:`~lora_ext.exact_merge.pack_factors` takes it."""
        begin = sum(rank for other, rank in self.ranks.items() if other < name)
        end = begin + self.ranks[name]
        return self.record.lora_A[begin:end].to(device), self.record.lora_B[:, begin:end].to(device), 1.0


@torch.no_grad()
def change_merged(caller: str, wanted: Mapping[LoraLinear, Collection[str]], labels: Mapping[LoraLinear, str]) -> None:
    """Gives every layer the adapters ``wanted`` of it, merged, and no others; or leaves all layers as they are.

    Adapters that stay merged keep the values they were merged with. ``labels`` name the layers' weights in messages.
    Ctrl-C takes effect once all layers are changed.

    Raises:
        ValueError: a result would be NaN or infinite, or two weights share memory.
        RuntimeError: a weight was converted to another dtype while merged, or is computed by a parametrization.
    """
    for layer in wanted:
        check_is_stored(caller, layer, labels[layer])
    restore = {layer: layer._merged for layer in wanted if layer._merged is not None}
    for layer, merged in restore.items():
        if merged.lost:
            raise RuntimeError(f"{caller}: {labels[layer]} {merged.lost}; forget_merge() takes it as it is now")
        check_unmerge(caller, layer.weight, merged.record, labels[layer])
    merge = {layer: sorted(names) for layer, names in wanted.items() if names}
    ranks = {layer: {name: _rank(layer, name) for name in names} for layer, names in merge.items()}
    for layer, names in merge.items():
        for name in names:
            if not _stays(layer, name):
                adapter = layer.adapters[name]
                check_merge_layer(f"{caller}: {labels[layer]}", layer.weight, adapter.lora_A, adapter.lora_B)
    factors = [pack_factors(layer.weight.dtype, _adapters(layer, names)) for layer, names in merge.items()]

    launches = plan_unmerge(
        caller,
        [layer.weight for layer in restore],
        [merged.record for merged in restore.values()],
        [labels[layer] for layer in restore],
    )

    with uninterrupted():  # from here on the weights and what is noted about them change in step
        run_unmerge(launches)
        for layer in restore:
            layer._merged = None
        try:
            records = merge_all_(
                caller,
                [layer.weight for layer in merge],
                [A for A, _ in factors],
                [B for _, B in factors],
                [labels[layer] for layer in merge],
            )
        except BaseException:  # nothing was merged: what was there before goes back in
            remerge(launches)
            for layer, merged in restore.items():
                layer._merged = merged
            raise
        for (layer, own), record in zip(ranks.items(), records, strict=True):
            layer._merged = MergedAdapters(own, record)


def check_is_stored(caller: str, layer: LoraLinear, label: str) -> None:
    """Merging into a weight that is computed on every access would be lost: RuntimeError."""
    if layer.base_layer._parameters.get("weight") is None:
        raise RuntimeError(
            f"{caller}: {label} is not a parameter but computed, by a parametrization perhaps; remove that first"
        )


def _adapters(layer: LoraLinear, names: list[str]) -> list[tuple[Tensor, Tensor, float]]:
    adapters = []
    for name in names:
        if _stays(layer, name):
            adapters.append(layer._merged.factors(name, layer.weight.device))
        else:
            adapter = layer.adapters[name]
            adapters.append((adapter.lora_A, adapter.lora_B, adapter.scaling))
    return adapters


def _rank(layer: LoraLinear, name: str) -> int:
    return layer._merged.ranks[name] if _stays(layer, name) else layer.adapters[name].r


def _stays(layer: LoraLinear, name: str) -> bool:
    return layer._merged is not None and name in layer._merged.ranks
