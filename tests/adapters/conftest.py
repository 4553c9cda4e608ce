from __future__ import annotations

import types

import pytest


@pytest.fixture
def no_collections(monkeypatch) -> None:
    """Stopping a manager collects garbage twice, which takes a second in a process with everything imported."""
    module = "transformers.generation.continuous_batching.continuous_api"
    monkeypatch.setattr(f"{module}.gc", types.SimpleNamespace(collect=lambda: 0))
