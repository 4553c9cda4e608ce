"""Computes the exact result of a merge and makes hard weights, for the tests of merging."""

from __future__ import annotations

import itertools
import math
import struct
from collections.abc import Iterable, Sequence

import torch
from torch import Tensor

from lora_ext.merging.weights import pack_factors

FLOATING = [torch.float64, torch.float32, torch.bfloat16, torch.float16]
INTEGERS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


def bits(tensor: Tensor) -> Tensor:
    """Returns the elements' bits as integers, which distinguish -0.0 from 0.0."""
    return tensor.detach().contiguous().view(INTEGERS[tensor.element_size()])


def same_bits(a: Tensor, b: Tensor) -> bool:
    return a.dtype == b.dtype and torch.equal(bits(a), bits(b))


def updates(lora_A: Tensor, lora_B: Tensor) -> Tensor:
    """Computes updates as csrc/common/merge_params.h defines them: fused multiply-adds over the ranks, in order.

    Takes factors from :func:`~lora_ext.merging.weights.pack_factors`; small ones, because every step runs in Python.
    """
    round_to = float if lora_A.dtype == torch.float64 else lambda v: struct.unpack("f", struct.pack("f", v))[0]
    A, B = lora_A.tolist(), lora_B.tolist()
    d = [[0.0] * lora_A.shape[1] for _ in B]
    for n, row in enumerate(B):
        for k in range(lora_A.shape[1]):
            for r, b in enumerate(row):
                d[n][k] = _fma(b, A[r][k], d[n][k], round_to)
    return torch.tensor(d, dtype=lora_A.dtype)


def _fma(a: float, b: float, c: float, round_to) -> float:
    if round_to is not float:
        # The product of float32 numbers is exact in float64; so is the error of its sum with c, which breaks ties.
        product = a * b
        total = product + c
        rest = math.fsum((product, c, -total))
        if rest and total != 0.0:
            total = _to_odd(total, rest)
        return round_to(total)
    from fractions import Fraction

    exact = Fraction(a) * Fraction(b) + Fraction(c)
    return float(exact) if exact else a * b + c


def _to_odd(total: float, rest: float) -> float:
    """Rounds a sum to odd, given its rounded value and error, so that rounding to fewer bits rounds only once."""
    pattern = struct.unpack("q", struct.pack("d", total))[0]
    if pattern & 1:
        return total
    return struct.unpack("d", struct.pack("q", pattern + (1 if (rest > 0) == (total > 0) else -1)))[0]


def merged(weight: Tensor, adapters: list[tuple[Tensor, Tensor, float]]) -> Tensor:
    """``round(weight + d)`` for the adapters' ``(lora_A, lora_B, scaling)``, with d from :func:`updates`."""
    d = updates(*pack_factors(weight.dtype, adapters))
    return (weight.detach().to(d.dtype) + d).to(weight.dtype)


def hard_weight(rows: int, cols: int, dtype: torch.dtype, scale: float = 1.0) -> Tensor:
    """Makes normal numbers of size ``scale``, with zeros of both signs, subnormals, and sizes far from ``scale``."""
    finfo = torch.finfo(dtype)
    weight = torch.randn(rows, cols, dtype=torch.float64) * scale
    kind = torch.rand(rows, cols)
    weight[kind < 0.30] *= 2.0 ** torch.randint(-12, 6, (int((kind < 0.30).sum()),))
    weight[kind < 0.10] = 0.0
    weight[kind < 0.05] = -0.0
    weight[kind < 0.03] = finfo.smallest_normal * 0.37
    weight[kind < 0.02] = -finfo.smallest_normal
    weight = weight.clamp(-finfo.max / 4, finfo.max / 4)
    return weight.to(dtype)


def update_factors(
    weight: Tensor, rank: int, size: float, dtype: torch.dtype = torch.float32
) -> tuple[Tensor, Tensor, float]:
    """Makes ``(lora_A, lora_B, scaling)`` of an update whose elements have standard deviation ``size``."""
    A = torch.randn(rank, weight.shape[1], dtype=torch.float64)
    B = torch.randn(weight.shape[0], rank, dtype=torch.float64)
    scaling = size / rank**0.5
    if dtype != torch.float64 and not 1e-30 < scaling < 1e30:
        A, scaling = A * 2.0 ** (math.log2(scaling) // 2), scaling / 2.0 ** (math.log2(scaling) // 2)
    return A.to(dtype), B.to(dtype), scaling


def packed_layers(
    dtype: torch.dtype, shapes: Sequence[tuple[int, int, int]], sizes: Iterable[float] = itertools.repeat(0.1)
) -> dict[str, list[Tensor]]:
    """Makes arguments of the merge ops: hard weights of these rows, columns and ranks, and updates of these sizes."""
    weights = [hard_weight(rows, columns, dtype) for rows, columns, _ in shapes]
    layers = zip(weights, shapes, sizes, strict=False)
    factors = [pack_factors(dtype, [update_factors(weight, rank, size)]) for weight, (*_, rank), size in layers]
    return {"weights": weights, "lora_As": [A for A, _ in factors], "lora_Bs": [B for _, B in factors]}
