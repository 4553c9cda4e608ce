"""Runs the soak for three seconds, which `make soak` runs for ten minutes."""

from __future__ import annotations

import pytest
import torch

from soak.pool import ACTIONS, Soak

pytestmark = pytest.mark.full


@pytest.fixture(autouse=True)
def one_thread_each():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def test_threads_and_adapters_for_a_while(tmp_path):
    soak = Soak(tmp_path, adapters=60, slots=34)
    soak.run(seconds=3)
    stats = soak.pool.stats()
    assert not soak.errors
    assert set(soak.done) == set(ACTIONS) and stats.evictions > 10 and stats.hits > 10
