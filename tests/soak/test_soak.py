"""A quarter of a minute of the soak, which `make soak` runs for ten; and that it can fail."""

from __future__ import annotations

import pytest
import torch

from lora_ext.nn.rows import LayerSlots
from soak import pool
from soak.__main__ import MOST_GROWTH

pytestmark = pytest.mark.full


@pytest.fixture(autouse=True)
def one_thread_each():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def test_threads_and_adapters_for_a_while(tmp_path):
    found = pool.run(tmp_path, seconds=15)
    assert not found.errors
    assert set(found.done) == set(pool.ACTIONS) and found.stats.evictions > 10 and found.stats.hits > 10
    assert found.grown[0] <= MOST_GROWTH and found.grown[1] <= 0


def test_a_slot_that_is_written_too_early_is_found(tmp_path, monkeypatch):
    monkeypatch.setattr(LayerSlots, "write", lambda self, slot, *update: WRITE(self, (slot + 1) % 40, *update))
    assert pool.run(tmp_path, seconds=2, adapters=50).errors


WRITE = LayerSlots.write
