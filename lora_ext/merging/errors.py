"""How much of an update rounding left in a merged weight."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from lora_ext._ops.dora import row_parts

_LEAST_KEPT = 0.95  # the share of an update below which a merge into 16 bits is worth a warning
_SAMPLED_ELEMENTS, _SAMPLED_ROWS = 1 << 13, 16  # so few that no other thread is woken for them


@dataclasses.dataclass(frozen=True)
class MergeError:
    """The distance of a merged weight ``W'`` from the sum that was merged, the weight ``W`` plus the update ``D``.

    A quantised weight counts with its dequantised values.

    Attributes:
        largest: the largest absolute difference of an element.
        relative: Frobenius norm of the difference, over the norm of the sum.
        of_update: the same, over the norm of the update: at 1 and above, rounding hides the update.
        kept: the share of the update that the weight moved along it, ``<W' - W, D> / |D|^2``: 1 where rounding errors
            cancel, near 0 where rounding takes the update back.
        unchanged: the share of elements that are what they were.
    """

    largest: float
    relative: float
    of_update: float
    kept: float
    unchanged: float


class ErrorSums:
    """Adds up the errors of parts of a layer's weight: in the dtype of a sum within a part, in float64 over parts."""

    def __init__(self) -> None:
        self._sums, self._largest, self._numel = [], [], 0

    def add(self, old: Tensor, wanted: Tensor, new: Tensor) -> None:
        """Adds ``[rows, cols]`` of the weight, of the sum and of the merged weight; computes in the sum's dtype."""
        for before, target, after in zip(*map(row_parts, (old, wanted, new)), strict=True):
            before, after = before.to(target.dtype), after.to(target.dtype)
            update, change, error = target - before, after - before, target - after
            pairs = (change, update), (update, update), (error, error), (target, target)
            sums = [torch.dot(one.flatten(), other.flatten()) for one, other in pairs]
            self._sums.append(torch.stack([*sums, (change == 0).sum().to(target.dtype)]))
            if error.numel():
                self._largest.append(error.abs_().max())
        self._numel += old.numel()

    def error(self) -> MergeError:
        sums = torch.stack(self._sums).double().sum(0).tolist() if self._sums else [0.0] * 5
        inner, update, error, total, unchanged = sums
        return MergeError(
            largest=float(torch.stack(self._largest).max()) if self._largest else 0.0,
            relative=(error / total) ** 0.5 if total else 0.0,
            of_update=(error / update) ** 0.5 if update else 0.0,
            kept=inner / update if update else 1.0,
            unchanged=unchanged / self._numel if self._numel else 1.0,
        )


class Sample(NamedTuple):
    """Some rows of a weight before its merge, from which :func:`kept_by` estimates what of the update is kept."""

    weight: Tensor  # the weight that is merged into
    step: int
    old: Tensor
    update: Tensor

    @classmethod
    def of(cls, weight: Tensor, A: Tensor, B: Tensor) -> Sample:
        """``weight [rows, cols]``, ``A [r, cols]``, ``B [rows, r]`` scaled."""
        rows = min(_SAMPLED_ROWS, max(1, _SAMPLED_ELEMENTS // max(1, weight.shape[1])))
        step = max(1, -(-len(weight) // rows))
        with torch.autocast(weight.device.type, enabled=False):
            return cls(weight, step, weight[::step].to(A.dtype, copy=True), B[::step] @ A)


def kept_by(samples: Sequence[Sample]) -> list[float]:
    """Returns, after the merge, for each weight :attr:`MergeError.kept` of the rows in its sample. Waits once."""
    kept = []
    for sample in samples:
        size = sample.update.square().sum()
        change = sample.weight[:: sample.step].to(sample.old.dtype) - sample.old
        kept.append(torch.where(size > 0, (change * sample.update).sum() / size, 1.0).cpu())
    return torch.stack(kept).tolist() if kept else []


def poorly_kept(kept: Mapping[str, float], remedy: str) -> str | None:
    """Returns a line on the weights where rounding to 16 bits keeps too little; None if there are none.

    Args:
        kept: the share of the update that each weight keeps, by name.
    """
    worst = sorted((share, name) for name, share in kept.items() if share < _LEAST_KEPT)
    if not worst:
        return None
    names = ", ".join(f"{share:.0%} in {name!r}" for share, name in worst[:3])
    return (
        f"rounding to 16 bits keeps less than {_LEAST_KEPT:.0%} of the update in {len(worst)} of {len(kept)} weights "
        f"({names}); {remedy}"
    )
