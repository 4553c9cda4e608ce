"""Fixtures of the tests of adapters."""

from __future__ import annotations

from pathlib import Path

import pytest
from support.models import Net
from support.pools import NAMES, write_adapters
from torch import nn


@pytest.fixture
def base() -> nn.Module:
    """The model of a pool."""
    return Net().eval().requires_grad_(False)


@pytest.fixture
def root(base, tmp_path) -> Path:
    """The directory of a pool: adapters of ``base`` by :data:`support.pools.NAMES`."""
    write_adapters(base, tmp_path / "pool", NAMES)
    return tmp_path / "pool"
