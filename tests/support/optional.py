"""Optional packages. ``from support.optional import gguf`` skips the test file if gguf is not installed."""

from __future__ import annotations

from types import ModuleType

import pytest

_MODULES = {
    "Image": "PIL.Image",
    "sklearn_metrics": "sklearn.metrics",
    "sklearn_class_weight": "sklearn.utils.class_weight",
}


def __getattr__(name: str) -> ModuleType:
    if name.startswith("__"):
        raise AttributeError(name)
    return pytest.importorskip(
        _MODULES.get(name, name), reason=f"{name} is not installed; make test, or make test-full, installs it"
    )
