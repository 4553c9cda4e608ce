"""The names of the adapters that a model's layers use."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from typing import Any

from lora_ext._common.arguments import checked


class ActiveAdapters:
    """The names of the adapters in use. All layers of a model share one object, so switching is one assignment.

    Attributes:
        names: in the order of activation.
        changes: how often the adapters, their merges or their use have changed.
        mixed_calls: how many calls whose rows choose adapters are running (lora_ext/nn/rows.py).
        pending: weak references to the choices of calls whose backward may come (lora_ext/nn/rows.py).
        unsupported_rows: ``changes`` and what rows could not choose then (lora_ext/model/mixed_batch.py).
        users: by name, how many running calls have rows that choose the adapter.
    """

    changes = mixed_calls = 0
    unsupported_rows: tuple[int, Any] | None = None
    _disabled: tuple[int, tuple[str, ...]] | None = None  # the depth, the names before

    @checked
    def __init__(self, names: Iterable[str] = ()) -> None:
        self.names: tuple[str, ...] = tuple(names)
        self.pending: set[Any] = set()
        self.users: Counter[str] = Counter()

    def check_unused(self, caller: str, names: Iterable[str]) -> None:
        """Checks that no running call has rows that choose one of the adapters, as layers ignore unknown names.

        RuntimeError: a call has; also one that Ctrl-C stopped, until the model is called again.
        """
        for name in names:
            if self.users[name] > 0:
                raise RuntimeError(
                    f"{caller}: rows of a running call use {name!r} (adapter_names); wait for its end, or after Ctrl-C "
                    "call the model once"
                )

    def __getstate__(self) -> dict[str, object]:
        # No change and no call is under way in a copy, and no enable() would reach it.
        return {"names": self.names, "pending": set(), "users": Counter()}

    @property
    def is_disabled(self) -> bool:
        """True if no adapter is used until :meth:`enable` is called."""
        return self._disabled is not None

    def disable(self) -> None:
        """Uses no adapter. Every call needs its own :meth:`enable`; the last of those restores the names."""
        depth, names = self._disabled or (0, self.names)
        self._disabled, self.names = (depth + 1, names), ()
        self.changes += 1

    def enable(self) -> None:
        depth, names = self._disabled
        if depth > 1:
            self._disabled = depth - 1, names
        else:
            self._disabled, self.names = None, names
        self.changes += 1
