"""Merges updates into weights in place and takes them out again, restoring every bit.

A merged weight is ``round(W + d)``: the update ``d = scaling * lora_B @ lora_A`` is accumulated in float32 (float64 for
float64 weights), added in that dtype, and the sum rounded to the weight's, to nearest or stochastically
(rounding.py). Rounding loses bits. The record keeps them: wherever ``round(merged - d)`` is not ``W``, it holds the
difference in units in the last place.
csrc/common/merge_params.h defines every bit, the same on all devices; csrc/common/merge_record.h the record's layout.

On the CPU a merge takes one pass, which restores the weights from the record if a result is NaN or infinite. On CUDA a
first pass finds such results and the length of the record, if there is to be one. One op call takes a list of weights.

On CUDA a merge with a record waits for the GPU once. A merge without one never does, and a CUDA graph can capture it:
then nobody sees whether a result is finite, unless the caller asks for a check, which reads the weights once more.
"""

from __future__ import annotations

import dataclasses
from collections import defaultdict
from collections.abc import Callable, Iterable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from lora_ext import _load
from lora_ext._common.arguments import checked
from lora_ext._ops import checks, errors
from lora_ext._ops.checks import (
    check_merge,
    check_merge_layer,
    check_not_lazy,
    check_tensors,
    merge_segments,
)
from lora_ext._ops.in_place import check_inference
from lora_ext._ops.merge import refuse_weight_that_requires_grad
from lora_ext.merging.rounding import Draws, check_rounds_stochastically, signed_seed


class Unmerge(NamedTuple):
    """The arguments of one call of the op ``lora_unmerge_`` (csrc/schemas.h): one entry per weight in each list.

    Attributes:
        weights: ``[out_features, in_features]``, all of the same device and dtype.
        lora_A: ``[r, in_features]``, accumulation dtype.
        lora_B: ``[out_features, r]``, accumulation dtype, multiplied by the scaling.
        words: int16 ``[out_features, segments]``; no entries if no weight needs corrections.
        corrections: int16 ``[words.sum()]``; no entries if no weight needs corrections.
        seeds, first_rows: of :class:`Draws`; no entries if the weights were rounded to nearest.
    """

    weights: list[Tensor]
    lora_A: list[Tensor]
    lora_B: list[Tensor]
    words: list[Tensor]
    corrections: list[Tensor]
    seeds: list[int]
    first_rows: list[int]


class _Merge(NamedTuple):
    """The arguments of one call of a merge op, as in :class:`Unmerge`."""

    weights: list[Tensor]
    lora_A: list[Tensor]
    lora_B: list[Tensor]
    seeds: list[int]
    first_rows: list[int]


@dataclasses.dataclass(eq=False)
class MergeRecord:
    """The data to restore a merged weight: copies of the update's factors, and the bits lost to rounding.

    It stays valid if the adapter changes. It does not refer to the weight, and can be copied, pickled and moved
    (:meth:`to`) like a tensor.

    Attributes:
        lora_A: ``[r, in_features]``, float32 (float64 for a float64 weight).
        lora_B: ``[out_features, r]`` in the same dtype, multiplied by the scaling.
        dtype: the weight's dtype.
        words: int16 ``[out_features, segments]``, number of 16-bit words of each segment's corrections; None if no
            element needs a correction.
        corrections: int16 ``[words.sum()]``, or None.
        draws: the random numbers that rounded the sums, or None: to nearest.
    """

    lora_A: Tensor
    lora_B: Tensor
    dtype: torch.dtype
    words: Tensor | None = None
    corrections: Tensor | None = None
    draws: Draws | None = None

    @property
    def nbytes(self) -> int:
        """Bytes of the factors, lengths and corrections."""
        return sum(tensor.nbytes for tensor in self._tensors().values())

    def to(self, device: torch.device) -> MergeRecord:
        """Returns the record on ``device``: itself if it is there already."""
        if self.lora_A.device == device:
            return self
        return dataclasses.replace(self, **{name: tensor.to(device) for name, tensor in self._tensors().items()})

    def _tensors(self) -> dict[str, Tensor]:
        fields = {"lora_A": self.lora_A, "lora_B": self.lora_B, "words": self.words, "corrections": self.corrections}
        return {name: tensor for name, tensor in fields.items() if tensor is not None}


MergeRecord.__init__ = checked(MergeRecord.__init__)  # type: ignore[method-assign]


@checked
def lora_merge_(
    weight: Tensor, lora_A: Tensor, lora_B: Tensor, scaling: float, record: bool = True, seed: int | None = None
) -> MergeRecord | None:
    """Computes ``weight += scaling * lora_B @ lora_A`` in place; :func:`lora_unmerge_` restores every bit.

    Args:
        weight: ``[out_features, in_features]``, float64, float32, bfloat16 or float16; any row stride.
        lora_A: ``[r, in_features]``, in any of the four dtypes.
        lora_B: ``[out_features, r]``, dtype of ``lora_A``.
        scaling: any finite number.
        record: keep the bits that rounding loses; without them the merge cannot be undone. The CPU makes a record in
            any case, to restore the weight if a result is not finite: False saves memory afterwards, but no time. On
            CUDA, False is one launch that the host does not wait for, and a CUDA graph can capture it; as in
            ``weight.addmm_``, results that are not finite are then written. To have them refused, merge with a record
            and drop it.
        seed: round bfloat16 and float16 stochastically, with the random numbers of this seed: the mean of the merged
            weights is the exact sum, however small the update is. None: to nearest.

    Returns:
        The record, or None without one. In addition to the copied factors it takes 0.03 to 0.25 bytes per float32
        element for updates of 0.5 % to 10 % of the weight's size (standard deviations), and never more than the weight.

    Raises:
        ValueError: a result would be NaN or infinite (on CUDA only with a record); or an argument is wrong, which the
            message names.
        TypeError: a wrong dtype.
        RuntimeError: a CUDA graph is being captured, and a record is wanted. After each of these errors every bit of
            the weight is unchanged.
    """
    op = "lora_merge_"
    check_merge_layer(op, weight, lora_A, lora_B)
    checks.check_scaling(op, scaling)
    refuse_weight_that_requires_grad(op, weight)
    if seed is not None:
        check_rounds_stochastically(op, weight.dtype, "weight")
    draws = None if seed is None else [Draws(signed_seed(op, seed))]
    # float(): PyTorch cannot multiply by an integer of more than 63 bits.
    A, B = pack_factors(weight.dtype, [(lora_A, lora_B, float(scaling))])
    return merge_all_(op, [weight], [A], [B], record=record, check=record, draws=draws)[0]


@checked
def lora_unmerge_(weight: Tensor, record: MergeRecord) -> Tensor:
    """Takes the update of :func:`lora_merge_` out of ``weight`` in place and restores every bit.

    ``weight`` must be as the merge left it, on any device; a record on another device is copied.

    Returns:
        ``weight``.

    Raises:
        ValueError, TypeError: ``weight`` has another shape or dtype than the merged one. It is then unchanged.
    """
    check_tensors("lora_unmerge_", {"weight": weight})
    refuse_weight_that_requires_grad("lora_unmerge_", weight)
    unmerge_all_("lora_unmerge_", [weight], [record])
    return weight


@torch.no_grad()
def pack_factors(dtype: torch.dtype, adapters: Sequence[tuple[Tensor, Tensor, float]]) -> tuple[Tensor, Tensor]:
    """Copies ``(lora_A, lora_B, scaling)`` into the form that the ops read for a weight of ``dtype``.

    Returns ``lora_A [r, in_features]`` and ``scaling * lora_B [out_features, r]`` in the accumulation dtype; several
    adapters are concatenated along the rank, in the order given.
    """
    acc = checks.accumulation_dtype(dtype)
    # Scaled factors (scaling 1) are not multiplied: under torch.set_flush_denormal that would flush their subnormals.
    if len(adapters) == 1:
        ((A, B, scaling),) = adapters
        A, scaled = A.detach().to(acc, copy=True, memory_format=torch.contiguous_format), B.detach().to(acc)
        return A, scaled * scaling if scaling != 1.0 else scaled.clone(memory_format=torch.contiguous_format)
    return (
        torch.cat([A.detach().to(acc) for A, _, _ in adapters]),
        torch.cat([B.detach().to(acc) * s if s != 1.0 else B.detach().to(acc) for _, B, s in adapters], dim=1),
    )


@torch.no_grad()
def merge_all_(
    caller: str,
    weights: Sequence[Tensor],
    lora_A: Sequence[Tensor],
    lora_B: Sequence[Tensor],
    labels: Sequence[str] | None = None,
    record: bool = True,
    check: bool = True,
    draws: Sequence[Draws | None] | None = None,
) -> list[MergeRecord | None]:
    """Merges factors of :func:`pack_factors` into all of their weights, or into none.

    The weights are restored if a result is not finite or a launch fails. ``labels`` name the weights in messages.
    Errors are those of :func:`lora_merge_`; RuntimeError also if two weights share memory.

    Args:
        check: refuse results that are not finite also on CUDA without a record, which waits for the GPU. Everywhere
            else they are always refused.
        draws: for each weight the random numbers that round it; None: to nearest.
    """
    labels = ["weight"] * len(weights) if labels is None else labels
    draws = [None] * len(weights) if draws is None else draws
    parts = list(_groups(caller, weights, labels, draws).values())
    merges = [
        _Merge(*([values[i] for i in part] for values in (weights, lora_A, lora_B)), *_lists(draws[i] for i in part))
        for part in parts
    ]
    if record or check:
        for part, merge in zip(parts, merges, strict=True):
            if merge.weights[0].is_cpu:
                continue
            _refuse_capture(caller)
            if not record:
                non_finite = _run(torch.ops.lora_ext.lora_merge_check.default, *merge)
                _refuse_non_finite(caller, merge, [labels[i] for i in part], non_finite)
    records: list[MergeRecord | None] = [None] * len(weights)
    done: list[Unmerge] = []
    try:
        for part, merge in zip(parts, merges, strict=True):
            if not (record or merge.weights[0].is_cpu):
                _run(torch.ops.lora_ext.lora_merge_.default, *merge)
                continue
            # On the CPU always with a record, from which the op restores the weights if a result is not finite.
            non_finite, words, corrections = _run(torch.ops.lora_ext.lora_merge_record_.default, *merge)
            if not words:
                _refuse_non_finite(caller, merge, [labels[i] for i in part], non_finite)
            done.append(Unmerge(*merge[:3], words, corrections, *merge[3:]))
            for i, *kept in zip(part, words, corrections, strict=True) if record else ():
                kept = kept if kept[1].numel() else (None, None)
                records[i] = MergeRecord(lora_A[i], lora_B[i], weights[i].dtype, *kept, draws[i])
    except BaseException:  # the caller sees an error and must find no change
        run_unmerge(done)
        raise
    return records


def _refuse_capture(caller: str) -> None:
    if torch.cuda.is_current_stream_capturing():
        raise RuntimeError(
            f"{caller}: this merge waits for the GPU, which a CUDA graph cannot capture; merge before the capture, or "
            "capture lora_ext.functional.lora_merge_(..., record=False)"
        )


@torch.no_grad()
def unmerge_all_(
    caller: str, weights: Sequence[Tensor], records: Sequence[MergeRecord], labels: Sequence[str] | None = None
) -> None:
    """Takes each record's update out of its weight: out of all of them, or out of none if a record does not match."""
    run_unmerge(prepare_unmerge(caller, weights, records, labels))


@torch.no_grad()
def prepare_unmerge(
    caller: str, weights: Sequence[Tensor], records: Sequence[MergeRecord], labels: Sequence[str] | None = None
) -> list[Unmerge]:
    """Checks that every weight can be restored, allocates memory, and returns the input of :func:`run_unmerge`."""
    if not weights:
        return []
    labels = ["weight"] * len(weights) if labels is None else labels
    for weight, record, label in zip(weights, records, labels, strict=True):
        check_unmerge(caller, weight, record, label)
    unmerges: list[Unmerge] = []
    for members in _groups(caller, weights, labels, [record.draws for record in records]).values():
        moved = [records[i].to(weights[i].device) for i in members]
        drawn = _lists(r.draws for r in moved)
        arguments = [weights[i] for i in members], [r.lora_A for r in moved], [r.lora_B for r in moved]
        if all(r.words is None for r in moved):
            unmerges.append(Unmerge(*arguments, [], [], *drawn))
            continue
        empty = moved[0].lora_A.new_empty(0, dtype=torch.int16)
        words = [
            empty.new_zeros(weight.shape[0], merge_segments(weight.shape[1])) if r.words is None else r.words
            for weight, r in zip(arguments[0], moved, strict=True)
        ]
        corrections = [empty if r.corrections is None else r.corrections for r in moved]
        unmerges.append(Unmerge(*arguments, words, corrections, *drawn))
    return unmerges


@torch.no_grad()
def run_unmerge(unmerges: Sequence[Unmerge]) -> None:
    """Restores all of the weights, or none if a launch fails."""
    done: list[Unmerge] = []
    try:
        for unmerge in unmerges:
            _run(torch.ops.lora_ext.lora_unmerge_.default, *unmerge)
            done.append(unmerge)
    except BaseException:
        remerge(done)
        raise


@torch.no_grad()
def remerge(unmerges: Sequence[Unmerge]) -> None:
    """Reverts :func:`run_unmerge`, to the same bits; allocates nothing."""
    for unmerge in unmerges:
        _run(torch.ops.lora_ext.lora_merge_.default, *unmerge[:3], unmerge.seeds, unmerge.first_rows)


def _lists(draws: Iterable[Draws | None]) -> tuple[list[int], list[int]]:
    """Returns the seeds and first rows of weights that all have random numbers, or empty lists."""
    drawn = [one for one in draws if one is not None]
    return [one.seed for one in drawn], [one.first_row for one in drawn]


def _run(op: Callable, *arguments: Sequence) -> Any:
    try:
        return op(*arguments)
    except RuntimeError as error:
        errors.check_memory(error)
        raise


def check_unmerge(caller: str, weight: Tensor, record: MergeRecord, label: str = "weight") -> None:
    """Checks that ``record`` was made for a weight like this. ValueError, TypeError: it was not."""
    check_tensors(caller, {f"the record's {name}": tensor for name, tensor in record._tensors().items()})
    if record.lora_A.is_meta:
        raise ValueError(f"{caller}: the record of {label} is on the meta device, where it has no values")
    for name, factor in (("lora_A", record.lora_A), ("lora_B", record.lora_B)):
        if factor.dim() != 2:
            raise ValueError(f"{caller}: the record's {name} has shape {list(factor.shape)}, want 2 dimensions")
    shape = record.lora_B.shape[0], record.lora_A.shape[1]
    if tuple(weight.shape) != shape:
        raise ValueError(f"{caller}: {label} has shape {list(weight.shape)}, but {list(shape)} was merged")
    if weight.dtype != record.dtype:
        raise TypeError(
            f"{caller}: {label} is {weight.dtype} now, but {record.dtype} was merged: its bits cannot be restored"
        )
    check_merge(caller, label, weight, record.lora_A.shape, record.lora_B.shape)


def _groups(
    caller: str, weights: Sequence[Tensor], labels: Sequence[str], draws: Sequence[Draws | None]
) -> dict[object, list[int]]:
    """Groups the indices of the weights by device, dtype and kind of rounding, for one op call each."""
    groups: dict[object, list[int]] = defaultdict(list)
    for i, (weight, label) in enumerate(zip(weights, labels, strict=True)):
        check_inference(caller, label, weight)
        check_not_lazy(caller, label, weight)
        groups[weight.device, weight.dtype, draws[i] is None].append(i)
    for device, *_ in groups:
        _load.check_kernels_exist(caller, device)
        if device.type == "meta":
            raise RuntimeError(f"{caller}: a weight is on the meta device, where it has no values to merge into")
    return groups


def _refuse_non_finite(caller: str, merge: _Merge, labels: Sequence[str], non_finite: Tensor) -> None:
    """Raises ValueError for the first weight with a nonzero count. The weights are unchanged or restored."""
    for weight, lora_A, lora_B, label, count in zip(*merge[:3], labels, non_finite.tolist(), strict=True):
        if count == 0:
            continue
        if not (lora_A.isfinite().all() and lora_B.isfinite().all()):
            reason = "the adapter has NaN or infinite values"
        elif not weight.isfinite().all():
            reason = "the weight has NaN or infinite values"
        else:
            limit = torch.finfo(weight.dtype).max
            reason = f"the sum overflows {weight.dtype} (at most {limit:g}); convert to a wider dtype first"
        raise ValueError(
            f"{caller}: merging would make {count} of {weight.numel()} elements of {label} NaN or infinite: {reason}"
        )
