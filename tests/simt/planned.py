"""The launches of a call at the sizes of real layers, without executing them: no memory of that size is needed."""

from __future__ import annotations

import ctypes
from collections.abc import Sequence

import torch

from . import params
from .driver import Launch, kernels
from .ops import DTYPES

ALIGNED = 4096  # stands for the address of every tensor

Sizes = Sequence[tuple[int, int]]  # (out_features, rank) of every sibling


def _fill(p: ctypes.Structure, tokens: int, sizes: Sizes, dtype: torch.dtype, factor_dtype: torch.dtype) -> None:
    p.num_tokens, p.num_siblings, p.total_rank = tokens, len(sizes), sum(rank for _, rank in sizes)
    p.dtype, p.factor_dtype = DTYPES[dtype], DTYPES[factor_dtype]
    begin = 0
    for sibling, (out_features, rank) in zip(p.siblings, sizes, strict=False):
        sibling.rank, sibling.rank_begin = rank, begin
        begin += rank
        for name, type_ in sibling._fields_:
            if type_ is ctypes.c_void_p and name not in ("bias", "base"):
                setattr(sibling, name, ALIGNED)
        if hasattr(sibling, "out_features"):
            sibling.out_features = out_features


def _launches(p: ctypes.Structure, multiprocessors: int) -> list[Launch]:
    with kernels().recording(multiprocessors) as library:
        getattr(library.c, f"run_{type(p).__name__}")(ctypes.byref(p), ctypes.c_void_p(ALIGNED), multiprocessors)
        return library.launches()


def forward(
    tokens: int,
    in_features: int,
    sizes: Sizes,
    dtype: torch.dtype = torch.bfloat16,
    factor_dtype: torch.dtype = torch.bfloat16,
    dropout: bool = True,
    multiprocessors: int = 132,
) -> list[Launch]:
    p = params.LoraForwardParams()
    _fill(p.shrink, tokens, sizes, dtype, factor_dtype)
    _fill(p.expand, tokens, sizes, dtype, factor_dtype)
    p.shrink.in_features = p.shrink.x_stride = in_features
    p.shrink.x = p.shrink.xa = p.expand.xa = ALIGNED
    if dropout:
        p.shrink.seed = p.shrink.mask = ALIGNED
        p.shrink.threshold = 6554
    return _launches(p, multiprocessors)


def backward(
    tokens: int,
    in_features: int,
    sizes: Sizes,
    dtype: torch.dtype = torch.bfloat16,
    factor_dtype: torch.dtype = torch.bfloat16,
    dropout: bool = True,
    output_mask: tuple[bool, bool, bool] = (True, True, True),
    multiprocessors: int = 132,
) -> list[Launch]:
    p = params.LoraBackwardParams()
    expand, shrink = p.expand, p.shrink
    _fill(expand, tokens, sizes, dtype, factor_dtype)
    _fill(shrink, tokens, sizes, dtype, factor_dtype)
    shrink.wants_grad_x, shrink.wants_grad_lora_A, expand.wants_grad_lora_B = output_mask
    expand.wants_grad_xa = shrink.wants_grad_x or shrink.wants_grad_lora_A
    for sibling, (out_features, _) in zip(expand.siblings, sizes, strict=False):
        sibling.grad_y_stride = out_features
    shrink.in_features = shrink.x_stride = in_features
    expand.xa = shrink.x = shrink.grad_x = ALIGNED
    shrink.has_dropout, shrink.mask = dropout, ALIGNED if dropout else None
    return _launches(p, multiprocessors)


def kernel_names(launches: list[Launch]) -> list[str]:
    return [launch.kernel.removesuffix("_kernel") for launch in launches]
