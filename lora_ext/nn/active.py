"""The names of the adapters that a model's layers use."""

from __future__ import annotations

import itertools
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
        additions: by name, the number of the addition or the renaming that made the adapter.
        removals: how many adapters were deleted or renamed: a running call whose rows named one fails.
    """

    changes = mixed_calls = removals = 0
    unsupported_rows: tuple[int, Any] | None = None
    _disabled: tuple[int, tuple[str, ...]] | None = None  # the depth, the names before

    @checked
    def __init__(self, names: Iterable[str] = ()) -> None:
        self.names: tuple[str, ...] = tuple(names)
        self.pending: set[Any] = set()
        self.additions: dict[str, int] = {}
        self._count = itertools.count()

    def added(self, name: str) -> None:
        self.additions[name] = next(self._count)

    def removed(self, names: Iterable[str]) -> None:
        for name in names:
            del self.additions[name]
            self.removals += 1

    def __getstate__(self) -> dict[str, object]:
        # No change is under way in a copy, and no enable() would reach it.
        return {
            "names": self.names,
            "pending": set(),
            "additions": {name: i for i, name in enumerate(self.additions)},
            "_count": itertools.count(len(self.additions)),
        }

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
