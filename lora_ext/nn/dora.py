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


def linear_output(x: Tensor, weight: Tensor, bias: Tensor | None, update: DoraUpdate) -> Tensor:
    """Returns ``factor * (x @ weight.T + scaling * x @ lora_A.T @ lora_B.T) + bias``.

    With dropout, the adapter changes the dropped-out input's part of the output only, as in PEFT:
    ``(x - d) @ weight.T + factor * (d @ weight.T + scaling * d @ lora_A.T @ lora_B.T) + bias`` with ``d = dropout(x)``.

    Args:
        x: ``[..., in_features]``, dtype of ``weight``, or under autocast any.
        weight: ``[out_features, in_features]``.
    """
    factor, base, dropped = update.factor(weight), bias, x
    if update.dropout_p:
        dropped = F.dropout(x, update.dropout_p)
    z = functional.lora_linear(dropped, weight, None, update.lora_A, update.lora_B, update.scaling)
    if update.dropout_p:
        base = F.linear(x - dropped, weight, bias)
    return rescale(z, factor, base)


def called_output(
    x: Tensor, base_layer: Callable[[Tensor], Tensor], bias: Tensor | None, weight: Tensor, update: DoraUpdate
) -> Tensor:
    """Returns what :func:`linear_output` does for a base layer that multiplies by its weight itself.

    Args:
        base_layer: returns the product and the ``bias``.
        weight: the weight, dequantised, for the norms.
    """
    factor, base, dropped = update.factor(weight), bias, x
    if update.dropout_p:
        dropped = F.dropout(x, update.dropout_p)
        base = base_layer(x - dropped)
    z = base_layer(dropped)
    z = z.clone() if bias is None else z - bias.to(z.dtype)
    dropped = dropped.to(device=z.device, dtype=z.dtype)
    z = functional.plus_lora_delta(z, dropped, update.lora_A, update.lora_B, update.scaling)
    return rescale(z, factor, base)
