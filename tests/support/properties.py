"""hypothesis, or stand-ins that skip the tests of properties where it is not installed."""

from __future__ import annotations

from typing import Any

import pytest

try:
    from hypothesis import given, settings
    from hypothesis import strategies as st
except ImportError:

    class _Strategies:
        """Any strategy: tests build them at collection."""

        def __getattr__(self, name: str) -> _Strategies:
            return self

        def __call__(self, *args: Any, **kwargs: Any) -> _Strategies:
            return self

    st = _Strategies()

    def given(*args: Any, **kwargs: Any) -> pytest.MarkDecorator:
        return pytest.mark.skip(reason="hypothesis is not installed; make test installs it")

    def settings(*args: Any, **kwargs: Any) -> Any:
        return lambda test: test


__all__ = ["given", "settings", "st"]
