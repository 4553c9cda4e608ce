"""Two processes with a GPU each train as one, over NCCL; over gloo, the same test runs on the CPU."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from support.ranks import assert_same, trained
from torch import nn
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel

from lora_ext import LoraConfig, inject

pytestmark = pytest.mark.full

RANKS, ROWS = 2, 6


def adapted(device: torch.device) -> nn.Module:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(16, 24), nn.ReLU(), nn.Linear(24, 5))
    return inject(model, LoraConfig(r=4, target_modules="all-linear", init_lora_weights=False)).to(device)


def train(rank: int, backend: str, engine: str, folder: str) -> None:
    """Compares the gradients of a process's half of a batch, averaged by the engine, with those of the whole batch."""
    device = torch.device("cuda", rank) if backend == "nccl" else torch.device("cpu")
    torch.distributed.init_process_group(backend, init_method=f"file://{folder}/store", rank=rank, world_size=RANKS)
    model, alone = adapted(device), adapted(device)
    model = DistributedDataParallel(model) if engine == "DDP" else fully_shard(model)
    x = torch.randn(RANKS * ROWS, 16, generator=torch.Generator().manual_seed(1)).to(device)
    model(x[rank * ROWS : (rank + 1) * ROWS]).square().mean().backward()
    alone(x).square().mean().backward()
    ours = {name.removeprefix("module."): p.grad for name, p in trained(model).items()}
    assert_same(ours, {name: p.grad for name, p in trained(alone).items()})
    assert len(ours) == 4
    torch.distributed.destroy_process_group()


@pytest.mark.parametrize("engine", ["DDP", "FSDP2"])
@pytest.mark.parametrize("backend", [pytest.param("gloo", marks=pytest.mark.slow), "nccl"])
def test_two_processes_have_the_gradients_of_one(backend, engine, tmp_path: Path):
    if backend == "nccl" and not (torch.distributed.is_nccl_available() and torch.cuda.device_count() >= RANKS):
        pytest.skip("needs NCCL and two GPUs")
    torch.multiprocessing.spawn(train, (backend, engine, str(tmp_path)), nprocs=RANKS)
