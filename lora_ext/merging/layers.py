"""Changes the set of adapters that a layer's base weights contain.

The set determines the weight: the pristine weight plus the updates of its adapters, summed in the order of their names
in float32 (or float64) and then rounded to the weight's dtype. To change the set, every bit of the pristine weights is
restored first.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Collection, Iterable, Iterator, Mapping
from types import MappingProxyType
from typing import TYPE_CHECKING, NamedTuple, Protocol

import torch
from torch import Tensor

from lora_ext._common.sharded import any_rank, is_sharded, local, part_like, whole
from lora_ext._ops.checks import check_merge_layer
from lora_ext.merging.errors import ErrorSums, MergeError, Sample, kept_by
from lora_ext.merging.feedback import LayerInputs
from lora_ext.merging.quantized import (
    QuantizedRecord,
    check_restorable,
    copied,
    merge_quantized_,
    restore,
)
from lora_ext.merging.rounding import Draws, LayerSeed, check_rounds_stochastically, draws_for
from lora_ext.merging.weights import (
    MergeRecord,
    check_unmerge,
    merge_all_,
    pack_factors,
    prepare_unmerge,
    remerge,
    run_unmerge,
    unmerge_all_,
)
from lora_ext.quantized import QuantizedWeight

if TYPE_CHECKING:
    from lora_ext.nn.layer import Matrix

Factors = tuple[Tensor, Tensor, float]  # lora_A [r, cols], lora_B [rows, r], scaling
Inputs = Mapping["Mergeable", LayerInputs]
Seeds = Mapping["Mergeable", LayerSeed | None]


class Mergeable(Protocol):
    """The part of :class:`~lora_ext.nn.layer.LoraLayer` that merging needs."""

    _merged: MergeState | None

    def matrices(self) -> Mapping[str, Matrix]:
        """The matrices that adapters update: :class:`~lora_ext.nn.layer.Matrix` by key."""

    def weight_to_merge(self, matrix: Matrix, names: list[str]) -> Tensor | QuantizedWeight:
        """The matrix that the updates of the adapters ``names`` are added to."""

    def factors(self, name: str) -> Mapping[str, Factors]:
        """The updates of adapter ``name``, by the keys of the matrices."""


@dataclasses.dataclass(frozen=True, eq=False)
class MergedMatrix:
    """The updates merged into one matrix.

    Attributes:
        ranks: by adapter name, sorted. The record's factors are concatenated along the rank in this order.
        record: restores the matrix; holds the factors as merged.
    """

    ranks: Mapping[str, int]
    record: MergeRecord | QuantizedRecord

    @property
    def numel(self) -> int:
        """Number of elements of the matrix."""
        return self.record.lora_B.shape[0] * self.record.lora_A.shape[1]

    def factors(self, name: str, device: torch.device) -> Factors:
        """The update merged under ``name``, in the form that :func:`~lora_ext.merging.weights.pack_factors` takes."""
        begin = sum(rank for other, rank in self.ranks.items() if other < name)
        end = begin + self.ranks[name]
        return self.record.lora_A[begin:end].to(device), self.record.lora_B[:, begin:end].to(device), 1.0


@dataclasses.dataclass(frozen=True, eq=False)
class MergeState:
    """The adapters merged into one layer.

    Attributes:
        names: sorted.
        matrices: by key, the layer's matrices that contain an update.
        seed: of the random numbers that rounded the weights, or None: to nearest.
        lost: why the weights can no longer be restored, or None.
    """

    names: tuple[str, ...]
    matrices: Mapping[str, MergedMatrix]
    seed: LayerSeed | None = None
    lost: str | None = None

    @property
    def nbytes(self) -> int:
        return sum(matrix.record.nbytes for matrix in self.matrices.values())


class Outcome(NamedTuple):
    """The rounding error of a layer's merge.

    Attributes:
        error: of quantising its weight again, or None if it is not quantised.
        kept: :attr:`MergeError.kept`, for 16-bit weights that are rounded to nearest an estimate from some rows of the
            first one. 1 for others: rounding takes nothing away, or ``error`` says what.
    """

    error: MergeError | None
    kept: float


@dataclasses.dataclass(eq=False)
class _Target:
    """A matrix to merge into.

    Attributes:
        layer, key: the layer that holds the matrix, and the matrix's key there.
        view, label: the matrix, and its name in messages. A view is a tensor, or a quantised weight.
        sharded: the DTensor, if the view is this rank's part of one.
        factors: the packed updates.
        ranks: by adapter name, sorted.
        draws: the random numbers that round the matrix, or None: to nearest.
        record: restores the matrix, once it is merged.
        kept: of a plain matrix that was sampled, the share of its update that rounding kept.
    """

    layer: Mergeable
    key: str
    view: Tensor | QuantizedWeight
    label: str
    sharded: Tensor | None
    factors: tuple[Tensor, Tensor]
    ranks: dict[str, int]
    draws: Draws | None
    record: MergeRecord | QuantizedRecord | None = None
    kept: float = 1.0


@torch.no_grad()
def change_merged(
    caller: str,
    wanted: Mapping[Mergeable, Collection[str]],
    where: Mapping[Mergeable, str],
    inputs: Inputs = MappingProxyType({}),
    seeds: Seeds = MappingProxyType({}),
    measure: bool = False,
) -> dict[Mergeable, Outcome]:
    """Merges exactly the adapters ``wanted`` into each layer; on an error, all layers stay as they are.

    Adapters that stay merged keep the values they were merged with.

    Args:
        where: names each layer in messages, after "the weight": " of 'path'", or nothing.
        inputs: of layers whose quantised weights are rounded for these inputs.
        seeds: how each layer is rounded: stochastically with this seed, or to nearest. Others as they are merged now.
        measure: return the rounding error of each layer; otherwise the result is empty.

    Raises:
        ValueError: a result would be NaN or infinite, or an update cannot be merged.
        RuntimeError: a weight was converted to another dtype while merged, is offloaded or shares memory with another
            one, or a parametrization computes it.
    """
    seeds = {layer: seeds.get(layer, layer._merged and layer._merged.seed) for layer in wanted}
    merged = _find_merged(caller, wanted, where)
    targets = _find_targets(caller, wanted, where, seeds)
    before = {layer: layer._merged for layer in wanted}
    launches = prepare_unmerge(caller, merged.views, merged.records, merged.labels)
    merged_bytes = [copied(weight) for weight in merged.quantized]

    run_unmerge(launches)  # from here on the weights and their records change together
    restore(merged.quantized, [record.stored for record in merged.quantized_records])
    for layer in wanted:
        layer._merged = None
    try:
        _merge(caller, targets, inputs, measure=measure)
    except BaseException:  # nothing was merged: restore the previous state
        remerge(launches)
        restore(merged.quantized, merged_bytes)
        for layer, state in before.items():
            layer._merged = state
        raise
    matrices: dict[Mergeable, dict[str, MergedMatrix]] = {layer: {} for layer, names in wanted.items() if names}
    for target in targets:
        matrices[target.layer][target.key] = MergedMatrix(target.ranks, target.record)
    for layer, held in matrices.items():
        layer._merged = MergeState(tuple(sorted(wanted[layer])), held, seeds[layer])
    return _outcomes(targets) if measure else {}


@torch.no_grad()
def merge_for_good(
    caller: str,
    wanted: Mapping[Mergeable, Collection[str]],
    where: Mapping[Mergeable, str],
    inputs: Inputs = MappingProxyType({}),
    seeds: Seeds = MappingProxyType({}),
) -> dict[Mergeable, Outcome]:
    """Merges the adapters ``wanted`` into each layer, without a record. No layer has merged adapters yet.

    Errors are those of :func:`change_merged`; all layers are then unchanged.
    """
    targets = _find_targets(caller, wanted, where, seeds)
    _merge(caller, targets, inputs, record=False)
    return _outcomes(targets)


def _outcomes(targets: list[_Target]) -> dict[Mergeable, Outcome]:
    outcomes: dict[Mergeable, Outcome] = {}
    for target in targets:  # a layer's first matrix is its weight, or a part of it
        if isinstance(target.view, QuantizedWeight):
            outcome = Outcome(target.record.error, 1.0)
        else:
            outcome = Outcome(None, target.kept)
        outcomes.setdefault(target.layer, outcome)
    return outcomes


@torch.no_grad()
def merge_error(layer: Mergeable) -> MergeError | None:
    """Returns the error of what is merged into ``layer``, or None of a DoRA adapter on a plain weight.

    Of plain weights it is computed by taking the update out of a copy.
    """
    sums, merged = ErrorSums(), layer._merged.matrices
    for key, _, view, label in stored_matrices("merge_errors", layer, ""):
        if key not in merged:
            continue
        record = merged[key].record
        if isinstance(record, QuantizedRecord):
            return record.error
        old = view.clone()
        unmerge_all_("merge_errors", [old], [record], [label])
        record = record.to(view.device)
        with torch.autocast(view.device.type, enabled=False):
            sums.add(old, old.to(record.lora_A.dtype).addmm(record.lora_B, record.lora_A), view)
    return sums.error()


class _Merged(NamedTuple):
    """The matrices that contain updates, plain and quantised ones, and the records that restore them."""

    views: list[Tensor]
    records: list[MergeRecord]
    labels: list[str]
    quantized: list[QuantizedWeight]
    quantized_records: list[QuantizedRecord]


def _find_merged(caller: str, layers: Iterable[Mergeable], where: Mapping[Mergeable, str]) -> _Merged:
    """Finds what is merged into the layers, and checks that it can be restored."""
    found = _Merged([], [], [], [], [])
    for layer in layers:
        for key, matrix, view, label in stored_matrices(caller, layer, where[layer]):
            if layer._merged is None or key not in layer._merged.matrices:
                continue
            if layer._merged.lost:
                raise RuntimeError(f"{caller}: {label} {layer._merged.lost}; forget_merge() accepts it as it is now")
            record = layer._merged.matrices[key].record
            if matrix.quantized is not None or isinstance(record, QuantizedRecord):
                check_restorable(caller, matrix.quantized, record, label)
                found.quantized.append(matrix.quantized)
                found.quantized_records.append(record)
                continue
            check_unmerge(caller, view, record, label)
            found.views.append(view)
            found.records.append(record)
            found.labels.append(label)
    return found


def _find_targets(
    caller: str, wanted: Mapping[Mergeable, Collection[str]], where: Mapping[Mergeable, str], seeds: Seeds
) -> list[_Target]:
    """Finds the matrices that the adapters ``wanted`` update, and packs the updates."""
    targets = []
    for layer, names in wanted.items():
        for key, matrix, view, label in stored_matrices(caller, layer, where[layer]):
            updates = updates_of(caller, layer, key, matrix, label, sorted(names))
            if not updates:
                continue
            dtype = view.dtype if matrix.quantized is None else matrix.quantized.sum_dtype
            into = local(layer.weight_to_merge(matrix, sorted(names)))
            target = _Target(
                layer=layer,
                key=key,
                view=into,
                label=label,
                sharded=matrix.view if is_sharded(matrix.view) else None,
                factors=pack_factors(dtype, list(updates.values())),
                ranks={name: A.shape[0] for name, (A, _, _) in updates.items()},
                draws=None if seeds.get(layer) is None else _draws(caller, seeds[layer], key, matrix, into, label),
            )
            targets.append(target)
    return targets


def _draws(caller: str, seed: LayerSeed, key: str, matrix: Matrix, into: Tensor | QuantizedWeight, label: str) -> Draws:
    """Returns the random numbers of a matrix, in which this rank's part has its place. ValueError: it has none."""
    if isinstance(into, QuantizedWeight):
        why = "is quantised: there, calibration= keeps the update" if into.rounds else "gets a DoRA adapter"
        raise ValueError(f"{caller}: {label} {why}; leave out rounding='stochastic'")
    check_rounds_stochastically(caller, into.dtype, label)
    if not is_sharded(matrix.view):
        return draws_for(seed, key)
    if any(getattr(placement, "dim", 0) != 0 for placement in matrix.view.placements):
        raise ValueError(
            f"{caller}: the columns of {label} are split over ranks, and rounding='stochastic' is for rows; round to "
            "nearest, or merge the checkpoint on disk (lora-ext merge)"
        )
    rows = part_like(matrix.view, torch.arange(matrix.view.shape[0], device=into.device).unsqueeze(1), [0])
    return draws_for(seed, key, int(rows[0]) if len(rows) else 0)


def _merge(caller: str, targets: list[_Target], inputs: Inputs, record: bool = True, measure: bool = True) -> None:
    """Merges into all matrices, on all ranks, or into none; sets their records.

    Quantised matrices always have a record, which holds the error; sharded ones too, because another rank may fail.
    """
    sharded = [target.sharded for target in targets if target.sharded is not None]
    try:
        _merge_here(caller, targets, inputs, record or bool(sharded), measure)
    except BaseException:
        any_rank(sharded, True)
        raise
    if any_rank(sharded, False):
        views, records, labels = zip(*[(target.view, target.record, target.label) for target in targets], strict=True)
        unmerge_all_(caller, views, records, labels)
        raise ValueError(f"{caller}: another rank cannot merge into its part of the weights; its message says why")


def _merge_here(caller: str, targets: list[_Target], inputs: Inputs, record: bool, measure: bool) -> None:
    quantized = [target for target in targets if isinstance(target.view, QuantizedWeight)]
    dense = [target for target in targets if not isinstance(target.view, QuantizedWeight)]
    made = merge_quantized_(caller, *_arguments(quantized), [inputs.get(target.layer) for target in quantized])
    samples = _samples(dense) if measure else {}
    try:
        draws = [target.draws for target in dense]
        others = merge_all_(caller, *_arguments(dense), record=record, draws=draws)
    except BaseException:
        restore([target.view for target in quantized], [record.stored for record in made])
        raise
    for target, its_record in zip([*quantized, *dense], [*made, *others], strict=True):
        target.record = its_record
    for target, kept in zip(samples, kept_by(list(samples.values())), strict=True):
        target.kept = kept


def _samples(targets: list[_Target]) -> dict[_Target, Sample]:
    """Takes samples of the weights, one of each layer, from which rounding to nearest may take the update away."""
    firsts: dict[Mergeable, _Target] = {}
    for target in targets:
        firsts.setdefault(target.layer, target)
    rounded = [target for target in firsts.values() if target.view.dtype.itemsize == 2 and target.draws is None]
    return {target: Sample.of(target.view, *target.factors) for target in rounded}


def _arguments(targets: list[_Target]) -> tuple[list, list[Tensor], list[Tensor], list[str]]:
    lora_As, lora_Bs = [target.factors[0] for target in targets], [target.factors[1] for target in targets]
    return [target.view for target in targets], lora_As, lora_Bs, [target.label for target in targets]


def stored_matrices(caller: str, layer: Mergeable, where: str) -> Iterator[tuple[str, Matrix, Tensor, str]]:
    """Yields ``(key, matrix, its view, its name in messages)`` for each matrix; the view is this rank's part of it.

    Raises:
        RuntimeError: a matrix is computed on every access, so an update merged into it would be lost.
    """
    for key, matrix in layer.matrices().items():
        label = f"the {matrix.name}{where}"
        if matrix.owner._parameters.get(matrix.name) is None:
            raise RuntimeError(f"{caller}: {label} is not a parameter but computed; remove its parametrization first")
        if matrix.view.is_meta and "_hf_hook" in vars(matrix.owner):
            raise RuntimeError(
                f"{caller}: {label} is offloaded by accelerate, and a change would be lost; load the model without "
                "offloading (device_map), or save the adapter and merge the checkpoint on disk (lora-ext merge)"
            )
        yield key, matrix, local(matrix.view), label


def updates_of(
    caller: str, layer: Mergeable, key: str, matrix: Matrix, label: str, names: list[str]
) -> dict[str, Factors]:
    """The update of each adapter to one matrix: as it was merged, or its present value if it is not merged.

    The rows of a sharded matrix need their rows of ``lora_B`` and the whole ``lora_A``; its columns the reverse.
    """
    updates, view = {}, local(matrix.view)
    for name in names:
        if layer._merged is not None and name in layer._merged.names:
            if (merged := layer._merged.matrices.get(key)) is not None and name in merged.ranks:
                updates[name] = merged.factors(name, view.device)
        elif (factors := layer.factors(name).get(key)) is not None:
            if is_sharded(matrix.view):
                A, B, scaling = factors
                factors = part_like(matrix.view, A, [1]), part_like(matrix.view, B, [0]), scaling
            else:
                factors = whole(factors[0]), whole(factors[1]), factors[2]
            if matrix.quantized is None:
                check_merge_layer(f"{caller}: {label}", view, *factors[:2])
            updates[name] = factors
    return updates
