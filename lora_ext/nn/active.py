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
        row_calls: how many calls whose rows choose adapters are running (lora_ext/nn/rows/in_force.py).
        held: the choices of rows for the ``with`` blocks that are open in any thread (lora_ext/nn/rows/in_force.py).
        row_obstacles: ``changes`` and what rows could not choose then (lora_ext/model/rows/obstacles.py).
        additions: by name, the number of the addition or the renaming that made the adapter.
        removals: how many adapters were deleted or renamed: a running call whose rows named one fails.
        invocations: by name, the tokens from which on an adapter acts (aLoRA); others have no entry.
    """

    changes = row_calls = removals = 0
    held: tuple[Any, ...] = ()
    row_obstacles: tuple[int, Any] | None = None
    _disabled: tuple[int, tuple[str, ...]] | None = None  # the depth, the names before

    @checked
    def __init__(self, names: Iterable[str] = ()) -> None:
        self.names: tuple[str, ...] = tuple(names)
        self.invocations: dict[str, tuple[int, ...]] = {}
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
            "invocations": dict(self.invocations),
            "additions": {name: i for i, name in enumerate(self.additions)},
            "_count": itertools.count(len(self.additions)),
        }

    @property
    def invoked(self) -> tuple[str, ...]:
        """The adapters in use that act from their invocation tokens on."""
        return tuple([name for name in self.names if name in self.invocations])

    def why_not_merge(self, names: Iterable[str]) -> str | None:
        """Returns the reason why one of the adapters ``names`` cannot be in a weight, or None."""
        for name in names:
            if name in self.invocations:
                return (
                    f"adapter {name!r} acts from its invocation tokens on (aLoRA), and a weight acts on all tokens; "
                    "run it unmerged"
                )
        return None

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
