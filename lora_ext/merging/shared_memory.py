"""Finds weights that share memory."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor


def check_disjoint(caller: str, weights: Sequence[Tensor], labels: Sequence[str]) -> None:
    """Refuses weights that share memory: the record of one would not know the update of the other."""
    if len(weights) < 2:
        return
    begins = sorted((str(w.device), w.data_ptr(), i) for i, w in enumerate(weights) if w.numel())
    open_weights: list[int] = []  # weights that begin before the present one and end after its begin
    for device, begin, i in begins:
        open_weights = [j for j in open_weights if str(weights[j].device) == device and _end(weights[j]) > begin]
        for j in open_weights:
            if _overlap(weights[j], weights[i]):
                raise ValueError(
                    f"{caller}: {labels[min(i, j)]} shares memory with {labels[max(i, j)]}, which would change too; "
                    "give one a clone of the weight"
                )
        open_weights.append(i)


def _end(weight: Tensor) -> int:
    rows, cols = weight.shape
    return weight.data_ptr() + ((rows - 1) * weight.stride(0) + cols) * weight.element_size()


def _overlap(first: Tensor, second: Tensor) -> bool:
    """Returns whether two weights share elements. The second must begin before the end of the first."""
    size, stride = first.element_size(), first.stride(0)
    distance = second.data_ptr() - first.data_ptr()
    if second.element_size() != size or second.stride(0) != stride or distance % size:
        return True
    column = distance // size % stride  # two blocks of columns of one matrix lie side by side
    return column < first.shape[1] or column + second.shape[1] > stride
