"""Merges updates into quantised weights: dequantises, adds, quantises again. Unmerging restores the bytes."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import torch
from torch import Tensor

from lora_ext.merging.errors import ErrorSums, MergeError
from lora_ext.merging.feedback import LayerInputs, quantize_for
from lora_ext.quantized import QuantizedWeight


@dataclasses.dataclass(eq=False)
class QuantizedRecord:
    """Restores a quantised weight; takes the place of a :class:`~lora_ext.merging.weights.MergeRecord`.

    Attributes:
        lora_A: ``[r, in_features]``, float32.
        lora_B: ``[out_features, r]``, float32, multiplied by the scaling.
        stored: the bytes before the merge.
        error: what quantising the sum lost; None: the weight is not quantised, only rescaled.
    """

    lora_A: Tensor
    lora_B: Tensor
    stored: dict[str, Tensor]
    error: MergeError | None

    @property
    def nbytes(self) -> int:
        return sum(tensor.nbytes for tensor in (self.lora_A, self.lora_B, *self.stored.values()))


@torch.no_grad()
def merge_quantized_(
    caller: str,
    weights: Sequence[QuantizedWeight],
    lora_As: Sequence[Tensor],
    lora_Bs: Sequence[Tensor],
    labels: Sequence[str],
    inputs: Sequence[LayerInputs | None] = (),
) -> list[QuantizedRecord]:
    """Merges factors of :func:`~lora_ext.merging.weights.pack_factors` into all of the weights, or into none.

    Args:
        inputs: of each weight's layer, for which the sum is quantised by error feedback; None: to nearest.

    Raises:
        ValueError: an element would become NaN or infinite, or an update does not fit its weight. All weights then have
            the bytes they had.
    """
    records: list[QuantizedRecord] = []
    inputs = inputs or [None] * len(weights)
    following = [*inputs, None][1:]
    try:
        for weight, A, B, label, of_layer, of_next in zip(
            weights, lora_As, lora_Bs, labels, inputs, following, strict=True
        ):
            old = weight.dequantize() if weight.rounds else None
            values = updated(caller, weight, A, B, label)
            new = weight.quantize(values) if of_layer is None else quantize_for(weight, values, of_layer)
            if of_layer is not None and of_layer is not of_next:
                of_layer.forget()  # layers that share inputs follow each other
            if not weight.rounds and not all(tensor.isfinite().all() for tensor in new.values()):
                raise ValueError(f"{caller}: merging would make elements of {label} infinite: the sum overflows")
            record = QuantizedRecord(A, B, copied(weight), None)
            records.append(record)
            weight.write(new)
            if weight.rounds:
                sums = ErrorSums()
                sums.add(old, values, weight.dequantize())
                record.error = sums.error()
    except BaseException:
        restore(weights[: len(records)], [record.stored for record in records])
        raise
    return records


@torch.no_grad()
def updated(caller: str, weight: QuantizedWeight, A: Tensor, B: Tensor, label: str) -> Tensor:
    """The dequantised weight plus ``B @ A``: new, float32. ValueError: an element is NaN or infinite."""
    if (len(B), A.shape[1]) != weight.shape:
        raise ValueError(f"{caller}: the update of {label} is {[len(B), A.shape[1]]}, the weight {list(weight.shape)}")
    values = weight.values_to_update()
    with torch.autocast(values.device.type, enabled=False):
        values.addmm_(B.to(values.device), A.to(values.device))
    if wrong := values.numel() - int(values.isfinite().sum()):
        why = "sum overflows" if A.isfinite().all() and B.isfinite().all() else "adapter has NaN or infinite values"
        raise ValueError(
            f"{caller}: merging would make {wrong} of {values.numel()} elements of {label} NaN or infinite: the {why}"
        )
    return values


@torch.no_grad()
def restore(weights: Sequence[QuantizedWeight], stored: Sequence[dict[str, Tensor]]) -> None:
    """Gives each weight these bytes."""
    for weight, tensors in zip(weights, stored, strict=True):
        weight.write(tensors)


def check_restorable(caller: str, weight: QuantizedWeight | None, record: object, label: str) -> None:
    """Checks that ``weight`` still has the format that was merged into. RuntimeError: it has another one."""
    now = None if weight is None else {name: (t.shape, t.dtype) for name, t in weight.stored().items()}
    if not isinstance(record, QuantizedRecord) or now != {n: (t.shape, t.dtype) for n, t in record.stored.items()}:
        raise RuntimeError(
            f"{caller}: {label} was converted or quantised in another way while merged, so that its bytes cannot be "
            "restored; forget_merge() accepts it as it is now"
        )


def copied(weight: QuantizedWeight) -> dict[str, Tensor]:
    """A copy of the weight's bytes."""
    return {name: tensor.detach().clone() for name, tensor in weight.stored().items()}
