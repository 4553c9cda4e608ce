"""Runs the soak for fifteen seconds, which `make soak` runs for ten minutes; and shows that it can fail."""

from __future__ import annotations

import pytest
import torch

from lora_ext.nn.rows import LayerSlots
from soak.pool import ACTIONS, Soak

pytestmark = pytest.mark.full


@pytest.fixture(autouse=True)
def one_thread_each():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def test_threads_and_adapters_for_a_while(tmp_path):
    soak = Soak(tmp_path, adapters=100, slots=40)
    soak.run(seconds=15)
    stats = soak.pool.stats()
    assert not soak.errors
    assert set(soak.done) == set(ACTIONS) and stats.evictions > 10 and stats.hits > 10


def test_a_slot_that_is_written_too_early_is_found(tmp_path, monkeypatch):
    write = LayerSlots.write
    monkeypatch.setattr(LayerSlots, "write", lambda self, slot, *update: write(self, (slot + 1) % 40, *update))
    soak = Soak(tmp_path, adapters=50, slots=40)
    soak.run(seconds=2)
    assert soak.errors
