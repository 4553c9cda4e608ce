"""Tests that a seed is drawn by one kernel, and that the ranks of a process group draw different ones."""

from __future__ import annotations

import torch
from torch.utils._python_dispatch import TorchDispatchMode

from lora_ext import functional


class Ops(TorchDispatchMode):
    def __init__(self):
        super().__init__()
        self.names: list[str] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.names.append(func.overloadpacket.__name__)
        return func(*args, **kwargs or {})


def draw(rank: int | None) -> int:
    torch.manual_seed(5)
    return int(functional.draw_seed(torch.get_default_device(), rank))


def test_every_rank_draws_its_seed_in_one_kernel():
    for rank in (0, 1, 1000):
        with Ops() as ops:
            functional.draw_seed(torch.get_default_device(), rank)
        assert len(ops.names) == 1 and ops.names[0].startswith("randint"), ops.names


def test_ranks_that_are_seeded_alike_draw_different_seeds():
    seeds = [draw(rank) for rank in range(100)]
    assert len(set(seeds)) == 100 and seeds == [draw(rank) for rank in range(100)]
    assert seeds[0] == draw(None) and min(seeds) >= 0
    assert len({seed % 2**20 for seed in seeds}) > 90 and len({seed // 2**43 for seed in seeds}) > 90
