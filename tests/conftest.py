from __future__ import annotations

import os

import pytest
import torch

# Two threads, also on larger machines: tests run side by side, and results must not depend on the machine's size.
torch.set_num_threads(2)
os.environ.setdefault("HF_HUB_OFFLINE", "1")  # no test needs a hub


@pytest.fixture(autouse=True)
def _seed(request: pytest.FixtureRequest) -> None:
    """Inputs are fresh for every case, and the same for every run of it."""
    torch.manual_seed(int.from_bytes(request.node.nodeid.encode()[-6:], "big"))
