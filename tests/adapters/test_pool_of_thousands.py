"""A pool with 1,000 adapters of the demo model in memory and 10,000 on disk; without --slow, a fifth of both."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from transformers import AutoModel

from lora_ext import AdapterPool, LoraConfig, inject, save_adapter
from lora_ext.adapters import unload
from lora_ext.commands import demo

pytestmark = pytest.mark.full

WRITTEN = 25
TARGETS = ["query", "value"]


def write_many(model: nn.Module, ids: Tensor, root: Path, number: int) -> list[Tensor]:
    """Writes adapters of ranks 1 to 4, and directories with links to their files. Returns what each one computes."""
    expected = []
    for i in range(WRITTEN):
        config = {"r": 1 + i % 4, "lora_alpha": 2 + i % 7, "target_modules": TARGETS, "init_lora_weights": False}
        inject(model, LoraConfig(**config))
        save_adapter(model, root / f"tenant-{i}")
        expected.append(model(ids).last_hidden_state[0])
        unload(model)
    files = {name: [root / f"tenant-{i}" / name for i in range(WRITTEN)] for name in os.listdir(root / "tenant-0")}
    for i in range(WRITTEN, number):
        directory = root / f"tenant-{i}"
        directory.mkdir()
        for name, paths in files.items():
            os.link(paths[i % WRITTEN], directory / name)
    return expected


@pytest.mark.parametrize(("on_disk", "resident"), [(2_000, 200), pytest.param(10_000, 1_000, marks=pytest.mark.slow)])
@torch.no_grad()
def test_thousands_of_adapters(tmp_path, on_disk, resident):
    model = AutoModel.from_pretrained(demo.classifier()).eval()
    ids = torch.randint(1000, 20000, (1, 3))
    expected = write_many(model, ids, tmp_path, on_disk)
    slot_bytes = 12 * (4 * 2 * 384 * 4 + 16)
    pool = AdapterPool(model, tmp_path, target_modules=TARGETS, r=4, max_bytes=resident * slot_bytes + 5)
    assert len(pool.names()) == on_disk
    numbers = torch.randperm(on_disk)[: resident + 100].tolist()
    storage = [held.lora_A.data_ptr() for held in pool._layers.values()]
    for begin in range(0, len(numbers), 100):
        batch = numbers[begin : begin + 100]
        y = model(ids.expand(100, -1), adapter_names=[f"tenant-{i}" for i in batch]).last_hidden_state
        torch.testing.assert_close(y, torch.stack([expected[i % WRITTEN] for i in batch]), rtol=1e-4, atol=1e-4)
    stats = pool.stats()
    assert (stats.slots, stats.slot_bytes, stats.resident) == (resident, slot_bytes, resident)
    assert stats.loads == resident + 100 and stats.evictions == 100
    assert [held.lora_A.data_ptr() for held in pool._layers.values()] == storage
    held = sum(t.nbytes for slots in pool._layers.values() for t in (slots.lora_A, slots.lora_B))
    assert held < resident * slot_bytes
