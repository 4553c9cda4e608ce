"""Assigns adapters to the slots of a pool: least-recently-used eviction, users, pins, and threads that wait."""

from __future__ import annotations

import threading
import time
from collections import OrderedDict
from collections.abc import Callable, Sequence


class Entry:
    """A name that has a slot.

    Attributes:
        users: running calls and pins; an entry with users keeps its slot.
        ready: whether loading has ended.
        error: what loading raised.
    """

    def __init__(self, slot: int) -> None:
        self.slot, self.users, self.pins = slot, 0, 0
        self.ready = threading.Event()
        self.error: BaseException | None = None


class SlotsInUseError(RuntimeError):
    """Running calls use the slots that a call needs; they will be free."""


class _Abandoned(Exception):
    """Stands for a load that Ctrl-C interrupted."""


class SlotTable:
    """Gives names to slots. Loading runs without the lock, so other names are served meanwhile.

    Args:
        slots: how many there are.
        load: fills a slot: ``load(name, slot)``. Its errors go to the callers that wait for this name; the next one
            tries again.
    """

    def __init__(self, slots: int, load: Callable[[str, int], None]) -> None:
        self.slots, self._load, self.is_closed = slots, load, False
        self.entries: OrderedDict[str, Entry] = OrderedDict()  # the least recently used first
        self._free = list(range(slots))[::-1]
        self.changed = threading.Condition()
        self.hits = self.misses = self.evictions = self.failures = self.waits = 0

    def acquire(self, names: Sequence[str], timeout: float | None, caller: str = "AdapterPool") -> dict[str, int]:
        """Gives every name a slot that it keeps until :meth:`release`: all or none.

        Args:
            names: different ones.
            timeout: seconds to wait for slots that other calls use; None: do not wait.

        Raises:
            RuntimeError: pinned adapters or running calls leave too few slots, or the table is closed.
            Whatever loading raises.
        """
        deadline = None if timeout is None else time.monotonic() + timeout
        with self.changed:
            missing = self._wait_for_slots(names, deadline, caller)
            self.hits += len(names) - len(missing)
            self.misses += len(missing)
            for name in missing:
                self.entries[name] = Entry(self._take_slot(names))
            mine = {name: self.entries[name] for name in names}
            for name, entry in mine.items():
                entry.users += 1
                self.entries.move_to_end(name)
        errors: list[BaseException] = []
        try:
            for name in missing:
                self._fill(name, mine[name])
            for entry in mine.values():
                entry.ready.wait()
                if entry.error is not None:
                    errors.append(entry.error)
        except BaseException as error:  # Ctrl-C
            for name in missing:
                if not mine[name].ready.is_set():
                    self._fail(name, mine[name], _Abandoned())
            errors.append(error)
        if not errors:
            return {name: entry.slot for name, entry in mine.items()}
        self._release(mine)
        found = next((error for error in errors if not isinstance(error, _Abandoned)), None)
        if found is None:  # another thread was to load a name, and was interrupted
            return self.acquire(names, timeout, caller)
        raise found

    def _wait_for_slots(self, names: Sequence[str], deadline: float | None, caller: str) -> list[str]:
        """Waits until there are slots for all names, and returns those that have none."""
        waited = False
        while True:
            if self.is_closed:
                raise RuntimeError(f"{caller}: the pool is closed, and holds no adapters; make another one")
            wanted = set(names)
            missing = [name for name in names if name not in self.entries]
            idle = sum(not entry.users for name, entry in self.entries.items() if name not in wanted)
            if len(missing) <= len(self._free) + idle:
                return missing
            pinned = sorted(name for name, entry in self.entries.items() if entry.pins and name not in wanted)
            if len(names) > self.slots - len(pinned):
                raise RuntimeError(
                    f"{caller}: {len(names)} adapters are wanted at once, but of the pool's {self.slots} slots "
                    f"{len(pinned)} are pinned ({', '.join(map(repr, pinned[:8])) or 'none'}); unpin some, raise "
                    "max_bytes, or split the batch"
                )
            remaining = None if deadline is None else deadline - time.monotonic()
            if remaining is None or remaining <= 0 or not self.changed.wait(remaining):
                raise SlotsInUseError(
                    f"{caller}: running calls use the slots that {', '.join(map(repr, missing[:8]))} need; raise "
                    "max_bytes, or run fewer calls at the same time"
                )
            self.waits += not waited
            waited = True

    def _take_slot(self, keep: Sequence[str]) -> int:
        if self._free:
            return self._free.pop()
        kept = set(keep)
        name = next(name for name, entry in self.entries.items() if not entry.users and name not in kept)
        self.evictions += 1
        return self.entries.pop(name).slot

    def _fill(self, name: str, entry: Entry) -> None:
        """Loads an adapter; an error is noted, and others that this call needs are loaded all the same."""
        try:
            self._load(name, entry.slot)
        except Exception as error:
            self._fail(name, entry, error)
        else:
            entry.ready.set()

    def _fail(self, name: str, entry: Entry, error: BaseException) -> None:
        """Takes the name out, so that the next call loads it again; its slot is free when all users have left."""
        with self.changed:
            entry.error = error
            self.failures += 1
            if self.entries.get(name) is entry:
                del self.entries[name]
            entry.ready.set()

    def release(self, names: Sequence[str]) -> None:
        with self.changed:
            mine = {name: self.entries[name] for name in names}
        self._release(mine)

    def _release(self, mine: dict[str, Entry]) -> None:
        with self.changed:
            for entry in mine.values():
                entry.users -= 1
                if not entry.users and entry.error is not None:
                    self._free.append(entry.slot)
            self.changed.notify_all()

    def pin(self, names: Sequence[str], by: int) -> None:
        """Counts pins, after ``acquire`` or before ``release``."""
        with self.changed:
            for name in names:
                self.entries[name].pins += by

    def evict(self, names: Sequence[str], caller: str) -> None:
        """Frees the slots of names that have one. RuntimeError: one is in use or pinned; nothing is changed."""
        with self.changed:
            held = {name: self.entries[name] for name in names if name in self.entries}
            for name, entry in held.items():
                if entry.users:
                    raise RuntimeError(f"{caller}: {name!r} is {'pinned' if entry.pins else 'used by a running call'}")
            for name, entry in held.items():
                del self.entries[name]
                self._free.append(entry.slot)
            self.changed.notify_all()

    def close(self) -> None:
        """Gives up all slots, also those of pinned names; no call may use one. Later calls are refused."""
        with self.changed:
            self.slots, self.is_closed = 0, True
            self.entries.clear()
            self._free.clear()
            self.changed.notify_all()
