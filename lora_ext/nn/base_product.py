"""The product of a frozen linear layer by our kernels, where they are faster than PyTorch's."""

from __future__ import annotations

import functools

import torch
import torch.nn.functional as F
from torch import Tensor

from lora_ext import _load, functional
from lora_ext._ops.usual_calls import is_usual_call

LEAST_ELEMENTS = 1 << 20
"""Elements of a weight for few tokens. For smaller ones the call takes as long as what the kernel saves."""

MANY_TOKENS = 33
"""Least tokens for which the CPU may have a product that packs the weight (csrc/cpu/base_product.inc)."""


@functools.cache
def few_tokens(dtype: torch.dtype) -> int:
    """Returns for how many tokens this machine's kernel reads the weight once (csrc/cpu/few_tokens.inc); 0: none."""
    if dtype == torch.float32 or _multiplies_pairs(dtype):
        return 32
    return 8 if dtype == torch.bfloat16 else 0


@functools.cache
def multiplies_many_tokens(dtype: torch.dtype) -> bool:
    """Returns whether this machine multiplies many tokens of a dtype by our kernel."""
    return (dtype == torch.float32 or _multiplies_pairs(dtype)) and _load.base_product() == "own"


def _multiplies_pairs(dtype: torch.dtype) -> bool:
    return dtype == torch.bfloat16 and _load.cpu_isa() == "avx512_bf16"


def has_kernel(x: Tensor, weight: Tensor) -> bool:
    """Returns whether a kernel of ours multiplies this many tokens by a weight of this size and dtype."""
    tokens = x.numel() // max(x.shape[-1], 1)
    if tokens >= MANY_TOKENS:
        return multiplies_many_tokens(weight.dtype)
    return tokens <= few_tokens(weight.dtype) and weight.numel() >= LEAST_ELEMENTS


def product(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """``F.linear(x, weight, bias)``, to rounding.

    Without gradients and on the CPU it is ``lora_linear`` scaled by zero, if that has a kernel for so many tokens
    (``benchmarks/bench_grouped.py``: "stack, our base"). For few tokens, an infinity in a row makes the row NaN there.

    Args:
        x: ``[..., in_features]``.
        weight: ``[out_features, in_features]``.
        bias: ``[out_features]`` or None.
    """
    if (
        x.device.type != "cpu"
        or x.dtype != weight.dtype
        or not weight.is_contiguous()
        or not has_kernel(x, weight)
        or torch.is_autocast_enabled("cpu")
        or (torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in (x, weight, bias)))
        or not is_usual_call(x, weight, bias)
    ):
        return F.linear(x, weight, bias)
    return functional.lora_linear(x, weight, bias, *_no_adapter(*weight.shape, weight.dtype), 0.0)


@functools.lru_cache(64)
def _no_adapter(out_features: int, in_features: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Factors for a scaling of zero; making and filling them takes 90 us when the caches hold a layer's weight.

    Not a lora_B of zeros: with it the op keeps the bits of F.linear, and calls that.
    """
    with torch.inference_mode(False):
        return torch.zeros(1, in_features, dtype=dtype), torch.ones(out_features, 1, dtype=dtype)
