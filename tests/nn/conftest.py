"""Fixtures about layers that share inputs."""

from __future__ import annotations

from collections.abc import Callable

import pytest
from support.shared_inputs import compute_alone, counted_calls


@pytest.fixture
def calls(monkeypatch) -> list[int]:
    """The number of layers of each call of the op."""
    return counted_calls(monkeypatch, "lora_linear_siblings", "lora_linear")


@pytest.fixture
def each_alone(monkeypatch) -> Callable[[], None]:
    return lambda: compute_alone(monkeypatch)
