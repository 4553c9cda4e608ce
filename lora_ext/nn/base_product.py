"""The product of a frozen linear layer by our kernels, where they are faster than PyTorch's."""

from __future__ import annotations

import functools

import torch
import torch.nn.functional as F
from torch import Tensor

from lora_ext import _load, functional
from lora_ext._ops.checks import dtype_name
from lora_ext._ops.fast_path import takes_fast_path

LEAST_ELEMENTS = 1 << 20
"""Elements of a weight for few tokens. For smaller ones the call takes as long as what the kernel saves."""

MANY_TOKENS = 33
"""Least tokens for which the CPU may have a product that packs the weight (csrc/cpu/gemm/many_tokens.inc)."""


@functools.cache
def few_tokens(dtype: torch.dtype) -> int:
    """Returns for how many tokens this machine's kernel reads the weight once (csrc/cpu/gemm); 0: none."""
    return _load.few_tokens(dtype_name(dtype)) if dtype in (torch.float32, torch.bfloat16) else 0


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

    Without gradients and on the CPU it is ``lora_grouped_linear`` in which no row has an adapter, if that has a kernel
    for so many tokens.

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
        or not takes_fast_path(x, weight, bias)
    ):
        return F.linear(x, weight, bias)
    return functional.lora_grouped_linear(x, weight, bias, *_no_adapters(*weight.shape, weight.dtype))


@functools.lru_cache(64)
def _no_adapters(out_features: int, in_features: int, dtype: torch.dtype) -> tuple[Tensor, ...]:
    """Returns the factors of no group, the choice of none of them for all rows, and the groups' scalings."""
    with torch.inference_mode(False):
        lora_As = torch.empty(0, 1, in_features, dtype=dtype)
        lora_Bs = torch.empty(0, out_features, 1, dtype=dtype)
        return lora_As, lora_Bs, torch.tensor(-1), torch.empty(0, dtype=torch.float64)
