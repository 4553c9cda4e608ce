"""The machine's ceilings, as PyTorch's operations reach them: bytes moved and operations computed a second.

A ceiling is the best of several calls, because other processes can slow a call down.
"""

from __future__ import annotations

from collections.abc import Callable

import torch

from harness.timing import Clock

WARMUP, REPEATS = 3, 10


def _least_seconds(call: Callable[[], object], clock: Clock) -> float:
    for _ in range(WARMUP):
        call()
    return min(clock(call) for _ in range(REPEATS))


def copy_rate(size: int, device: str, clock: Clock) -> float:
    """Bytes a second, read plus written, of copying ``size`` bytes."""
    source = torch.empty(size, dtype=torch.uint8, device=device).random_()
    target = torch.empty_like(source)
    return 2 * size / _least_seconds(lambda: target.copy_(source), clock)


def matrix_rate(dtype: torch.dtype, n: int, device: str, clock: Clock) -> float:
    """Floating-point operations a second of the product of two random ``[n, n]`` matrices."""
    a, b = (torch.randn(n, n, dtype=dtype, device=device) for _ in range(2))
    out = torch.empty_like(a)
    return 2 * n**3 / _least_seconds(lambda: torch.mm(a, b, out=out), clock)
