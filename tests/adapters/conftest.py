from __future__ import annotations

import types

import pytest
from transformers.generation.continuous_batching import continuous_api


@pytest.fixture
def no_collections(monkeypatch) -> None:
    """Stopping a manager collects garbage twice, which takes a second in a process with everything imported."""
    monkeypatch.setattr(continuous_api, "gc", types.SimpleNamespace(collect=lambda: 0))
