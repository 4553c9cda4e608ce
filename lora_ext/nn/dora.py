"""The output of a linear layer with a DoRA adapter."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

from torch import Tensor
from torch.nn import functional as F

from lora_ext import functional
from lora_ext._ops.dora import rescale, row_norms, scale_of_rows


class DoraUpdate(NamedTuple):
    """A DoRA adapter in use.

    Attributes:
        lora_A, lora_B: ``[r, in_features]`` and ``[out_features, r]``.
        magnitude: ``[out_features]``, the norms that the rows of the updated weight are scaled to.
        scaling: of the low-rank update.
        dropout_p: probability that an element of the adapter's input is zeroed.
    """

    lora_A: Tensor
    lora_B: Tensor
    magnitude: Tensor
    scaling: float
    dropout_p: float

    def factor(self, weight: Tensor) -> Tensor:
        """Returns what each feature of the updated weight's product is multiplied by."""
        return scale_of_rows(self.magnitude, row_norms(weight, self.lora_A, self.lora_B, self.scaling))


def output(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    update: DoraUpdate,
    base_layer: Callable[[Tensor], Tensor] | None = None,
) -> Tensor:
    """Returns ``factor * (x @ weight.T + scaling * x @ lora_A.T @ lora_B.T) + bias``.

    With dropout, the adapter changes the dropped-out input's part of the output only, as in PEFT:
    ``(x - d) @ weight.T + factor * (d @ weight.T + scaling * d @ lora_A.T @ lora_B.T) + bias`` with ``d = dropout(x)``.

    Args:
        x: ``[..., in_features]``, dtype of ``weight``, or under autocast any.
        weight: ``[out_features, in_features]``, dequantised for the norms if it is quantised.
        base_layer: multiplies by the weight and adds the ``bias``, where a product here would compute something else.
    """
    factor, low_rank = update.factor(weight), (update.lora_A, update.lora_B, update.scaling)
    dropped = F.dropout(x, update.dropout_p) if update.dropout_p else x
    if base_layer is None:
        z = functional.lora_linear(dropped, weight, None, *low_rank)
    else:
        z = base_layer(dropped)
        z = z.clone() if bias is None else z - bias.to(z.dtype)
        z = functional.plus_lora_delta(z, dropped.to(device=z.device, dtype=z.dtype), *low_rank)
    if not update.dropout_p:
        return rescale(z, factor, bias)
    rest = x - dropped
    return rescale(z, factor, F.linear(rest, weight, bias) if base_layer is None else base_layer(rest))
