"""The names of the adapters that a model's layers use."""

from __future__ import annotations

import threading
from collections.abc import Iterable
from typing import Any

from lora_ext._common.arguments import checked


class _Running(threading.local):
    choice: Any = None


class ActiveAdapters:
    """The names of the active adapters. All layers of a model share one object, so switching is one assignment.

    Attributes:
        names: in the order of activation.
        running: ``running.choice`` is what the rows of this thread's call choose, or None (lora_ext/nn/rows.py).
        mixed_calls: how many calls with mixed batches are running, in all threads.
        pending: weak references to the choices of calls whose backward may come.
    """

    _disabled: tuple[int, tuple[str, ...]] | None = None  # the depth, the names before

    @checked
    def __init__(self, names: Iterable[str] = ()) -> None:
        self.names: tuple[str, ...] = tuple(names)
        self.running = _Running()
        self.mixed_calls = 0
        self.pending: set[Any] = set()

    def check_unused(self, caller: str) -> None:
        """Checks that no mixed batch is running, as layers ignore unknown names.

        RuntimeError: one is; also one that Ctrl-C stopped, until the model is called again.
        """
        if self.mixed_calls > 0:
            raise RuntimeError(
                f"{caller}: a running call names adapters for its rows (adapter_names); wait for its end, or after "
                "Ctrl-C call the model once"
            )

    def __reduce__(self) -> tuple[Any, ...]:
        return type(self), (self.names,)  # no call is under way in a copy, and no enable() would reach it

    @property
    def is_disabled(self) -> bool:
        """True if no adapter is used until :meth:`enable` is called."""
        return self._disabled is not None

    def disable(self) -> None:
        """Uses no adapter. Every call needs its own :meth:`enable`; the last of those restores the names."""
        depth, names = self._disabled or (0, self.names)
        self._disabled, self.names = (depth + 1, names), ()

    def enable(self) -> None:
        depth, names = self._disabled
        if depth > 1:
            self._disabled = depth - 1, names
        else:
            self._disabled, self.names = None, names
