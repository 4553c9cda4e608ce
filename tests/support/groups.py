"""Watches the calls for mixed batches."""

from __future__ import annotations

import inspect
from collections.abc import Callable

import pytest

from lora_ext import functional


def watch_calls(monkeypatch: pytest.MonkeyPatch, see: Callable[[dict], None]) -> None:
    """Shows the arguments, by name, of each call for a mixed batch, unless no row has an adapter."""

    def watch(name: str) -> None:
        function = getattr(functional, name)
        signature = inspect.signature(function)

        def watched(*values):
            call = signature.bind(*values).arguments
            if call["group_of_row"].dim():
                see(call)
            return function(*values)

        monkeypatch.setattr(functional, name, watched)

    watch("lora_grouped_")
    watch("lora_grouped_linear")
