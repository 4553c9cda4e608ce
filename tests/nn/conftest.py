"""Fixtures about layers that share inputs."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from lora_ext import functional
from lora_ext.nn.shared_inputs import SharedInputs


@pytest.fixture
def calls(monkeypatch) -> list[int]:
    """The number of layers of each call of the op."""
    found = []

    def siblings(x, weights, *rest):
        found.append(len(weights))
        return of_siblings(x, weights, *rest)

    def single(*arguments):
        found.append(1)
        return of_single(*arguments)

    of_siblings, of_single = functional.lora_linear_siblings, functional.lora_linear
    monkeypatch.setattr(functional, "lora_linear_siblings", siblings)
    monkeypatch.setattr(functional, "lora_linear", single)
    return found


@pytest.fixture
def each_alone(monkeypatch) -> Callable[[], None]:
    """Makes every layer compute its own output from now on; dropout seeds stay common."""
    return lambda: monkeypatch.setattr(SharedInputs, "_group_to_compute", lambda *_: None)
