"""The product of a frozen linear layer for few tokens, which reads the weight once."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from lora_ext import functional
from lora_ext._ops.usual_calls import is_usual_call

MOST_TOKENS = {torch.float32: 32, torch.bfloat16: 8}
"""Tokens for which the CPU's kernel (csrc/cpu/few_tokens.inc) is used, by dtype; with AMX more would be possible."""

LEAST_ELEMENTS = 1 << 20
"""Elements of a weight. For smaller ones the call takes as long as what the kernel saves."""


def product(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """``F.linear(x, weight, bias)``, to rounding.

    Without gradients and for few tokens on the CPU it is ``lora_linear`` of a zero adapter, whose kernel reads the
    weight once (``benchmarks/bench_grouped.py``: "stack, our base"). There an infinity in a row makes the row NaN.

    Args:
        x: ``[..., in_features]``.
        weight: ``[out_features, in_features]``.
        bias: ``[out_features]`` or None.
    """
    if (
        x.numel() > MOST_TOKENS.get(weight.dtype, 0) * x.shape[-1]
        or weight.numel() < LEAST_ELEMENTS
        or x.device.type != "cpu"
        or x.dtype != weight.dtype
        or not weight.is_contiguous()
        or torch.is_autocast_enabled("cpu")
        or (torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in (x, weight, bias)))
        or not is_usual_call(x, weight, bias)
    ):
        return F.linear(x, weight, bias)
    out_features, in_features = weight.shape
    lora_A, lora_B = weight.new_zeros(1, in_features), weight.new_zeros(out_features, 1)
    return functional.lora_linear(x, weight, bias, lora_A, lora_B, 0.0)
