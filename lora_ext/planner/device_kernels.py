"""Makes meta tensors use a device's kernels, which keep other tensors for the backward than the meta device's."""

from __future__ import annotations

import functools
import math
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.utils._pytree import tree_map

_one_thread = threading.RLock()  # functions are replaced for the whole process
_FLASH_MOST_FEATURES = 256  # per head, in PyTorch's FlashAttention kernels for CUDA


@contextmanager
def device_kernels(device: str) -> Iterator[None]:
    """Makes dropout and attention of meta tensors dispatch to the operators of ``device`` inside a ``with`` block.

    Dropout keeps one byte per element on CUDA, and a mask of the input's dtype on the CPU. Attention keeps its inputs,
    its output and one float32 per query in the kernel that PyTorch prefers: FlashAttention (Dao 2023, arXiv 2307.08691)
    or the memory-efficient kernel (Rabe and Staats 2021, arXiv 2112.05682) on CUDA, the CPU's FlashAttention there. If
    no such kernel supports the arguments, the probabilities are kept too.

    Two functions of ``torch.nn.functional`` are replaced, for meta tensors; other tensors, which other threads may
    compute meanwhile, take PyTorch's. A second thread waits for the end of the block. A ``TorchFunctionMode`` would not
    work: it is off during ``backward``, which computes checkpointed layers again.

    Under ``torch.autocast("cpu")`` attention casts its arguments (:mod:`lora_ext.planner.meta_autocast`).

    ValueError: ``device`` is neither ``"cuda"`` nor ``"cpu"``.
    """
    if device not in _KERNELS:
        raise ValueError(f"device is {device!r}, want one of {', '.join(_KERNELS)}")
    kernels = _KERNELS[device]
    with _one_thread:
        before = {name: getattr(F, name) for name in kernels}
        try:
            for name, kernel in kernels.items():
                setattr(F, name, _of_meta_tensors(kernel, before[name]))
            yield
        finally:
            for name, function in before.items():
                setattr(F, name, function)


_plain_attention = F.scaled_dot_product_attention


def _of_meta_tensors(kernel: Callable[..., Tensor], others: Callable[..., Tensor]) -> Callable[..., Tensor]:
    @functools.wraps(others)
    def chosen(*arguments: Any, **named: Any) -> Tensor:
        first = arguments[0] if arguments else next(iter(named.values()), None)
        return (kernel if isinstance(first, Tensor) and first.is_meta else others)(*arguments, **named)

    return chosen


def _autocast(attention: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """Casts the arguments of an attention as autocast does, whose operators do not include the fused kernels."""

    @functools.wraps(attention)
    def cast_attention(*arguments: Any, **named: Any) -> Tensor:
        if torch.is_autocast_enabled("cpu"):
            cast = lambda value: value.to(torch.get_autocast_dtype("cpu")) if _is_float(value) else value  # noqa: E731
            arguments, named = tree_map(cast, (arguments, named))
        return attention(*arguments, **named)

    return cast_attention


def _is_float(value: Any) -> bool:
    return isinstance(value, Tensor) and value.is_floating_point() and value.dtype != torch.float64


def _fused_dropout(input: Tensor, p: float = 0.5, training: bool = True, inplace: bool = False) -> Tensor:
    return torch.native_dropout(input, p, training)[0] if training and p > 0 else input


@_autocast
def _cuda_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> Tensor:
    is_16_bit = query.dtype in (torch.float16, torch.bfloat16)
    if is_16_bit and attn_mask is None and query.shape[-1] == value.shape[-1] <= _FLASH_MOST_FEATURES:
        flash = torch.ops.aten._scaled_dot_product_flash_attention.default
        return flash(query, key, value, dropout_p, is_causal, False, scale=scale)[0]
    if key.shape[1] == query.shape[1] and query.dtype != torch.float64:
        efficient = torch.ops.aten._scaled_dot_product_efficient_attention.default
        bias = _as_bias(attn_mask, query, key)
        return efficient(query, key, value, bias, query.requires_grad, dropout_p, is_causal, scale=scale)[0]
    return _plain_attention(query, key, value, attn_mask, dropout_p, is_causal, scale=scale, enable_gqa=enable_gqa)


@_autocast
def _cpu_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> Tensor:
    if dropout_p == 0 and query.shape[-1] == value.shape[-1]:
        flash = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu.default
        bias = _as_bias(attn_mask, query, key)
        return flash(query, key, value, dropout_p, is_causal, attn_mask=bias, scale=scale)[0]
    return _plain_attention(query, key, value, attn_mask, dropout_p, is_causal, scale=scale, enable_gqa=enable_gqa)


def _as_bias(mask: Tensor | None, query: Tensor, key: Tensor) -> Tensor | None:
    """Converts the mask to the numbers that kernels add to the scores, as PyTorch does."""
    if mask is None:
        return None
    if mask.dtype == torch.bool:
        mask = torch.zeros_like(mask, dtype=query.dtype).masked_fill_(mask.logical_not(), -math.inf)
    return mask.expand(*query.shape[:2], query.shape[2], key.shape[2])


_KERNELS = {
    "cuda": {"scaled_dot_product_attention": _cuda_attention, "dropout": _fused_dropout},
    "cpu": {"scaled_dot_product_attention": _cpu_attention},
}
