"""Arguments that the typed functions of the ops choose for their callers."""

from __future__ import annotations

import torch
from torch import Tensor, distributed

from lora_ext._ops.fast_path import autocast_device

_INT64_MAX = torch.iinfo(torch.int64).max
_RANGE = 2**62  # of the seeds of a rank other than 0
_GOLDEN_RATIO = 0x9E3779B97F4A7C15  # spreads consecutive ranks over all bits


def draw_seed(device: torch.device, rank: int | None = None) -> Tensor:
    """A fresh dropout seed, int64 ``[]``, from PyTorch's default generator of ``device`` (``torch.manual_seed``).

    In a process group the rank is mixed in: ranks seeded alike, as trainers do, still draw different masks. Rank 0
    draws the masks of a single process. ``rank``: another number to mix in.
    """
    if rank is None:
        rank = distributed.get_rank() if distributed.is_available() and distributed.is_initialized() else 0
    if rank == 0:
        low, high = 0, _INT64_MAX
    else:  # one kernel: a range that begins elsewhere
        low = rank * _GOLDEN_RATIO % _RANGE
        high = low + _RANGE
    return torch.randint(low, high, (), dtype=torch.int64, device=device)


def drawn(x: Tensor, dropout_p: float, seed: Tensor | None) -> Tensor | None:
    """Returns ``seed``, or a fresh one if dropout needs one and there is none."""
    return draw_seed(x.device) if dropout_p > 0.0 and seed is None else seed


def cast_to(y: Tensor, x: Tensor) -> Tensor:
    """Casts ``x`` to the dtype that the base layer returned, under autocast only."""
    return x.to(y.dtype) if x.dtype != y.dtype and torch.is_autocast_enabled(autocast_device(x)) else x
