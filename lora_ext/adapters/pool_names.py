"""The adapters that a pool can find on disk, by name."""

from __future__ import annotations

import difflib
import os
import threading
from collections.abc import Iterable
from pathlib import Path

from lora_ext._common.printable import first_of
from lora_ext.files.adapter_file import CONFIG_FILE, holds_adapter
from lora_ext.nn.rows.choice import BASE


class PoolNames:
    """Names given to directories, and the subdirectories of one directory; several threads may use it.

    Args:
        directory: adapters are its subdirectories; None: there are only names that :meth:`add` gives.

    Raises:
        ValueError: ``directory`` is no directory.
    """

    def __init__(self, directory: str | os.PathLike[str] | None) -> None:
        self._directory = None if directory is None else Path(directory).absolute()  # the current one may change
        if self._directory is not None and not self._directory.is_dir():
            raise ValueError(
                f"AdapterPool: directory is {os.fspath(directory)!r}, which is not a directory; want the one that "
                "holds the adapters' directories"
            )
        self._added: dict[str, Path] = {}
        self._lock = threading.Lock()

    def check_new(self, name: str, directory: str | os.PathLike[str]) -> None:
        """Checks that :meth:`add` can give ``name`` to ``directory``. Errors as in :meth:`AdapterPool.add`."""
        if not name or name == BASE:
            raise ValueError(f"AdapterPool.add: name is {name!r}, want another one")
        self._check_not_added(name)
        if (path := self.path_of(name)) is not None:
            raise ValueError(f"AdapterPool.add: {name!r} is known already, as {path}; choose another name")
        if not holds_adapter(path := Path(directory).absolute()):
            raise FileNotFoundError(f"AdapterPool.add: {path / CONFIG_FILE} is missing; want a directory of PEFT")

    def add(self, name: str, directory: str | os.PathLike[str]) -> None:
        """Gives a name to the adapter in ``directory``, both checked. ValueError: another thread just gave it."""
        with self._lock:
            self._check_not_added(name)
            self._added[name] = Path(directory).absolute()

    def _check_not_added(self, name: str) -> None:
        if name in self._added:
            raise ValueError(f"AdapterPool.add: {name!r} is known already; remove it first")

    def check_added(self, name: str) -> None:
        """Raises KeyError if :meth:`add` has not given this name."""
        if name not in self._added:
            names = first_of(map(repr, sorted(self._added)), _SHOWN)
            raise KeyError(f"AdapterPool.remove: {name!r} was not added; the names are [{names}]")

    def forget(self, name: str) -> None:
        with self._lock:
            self._added.pop(name, None)

    def all(self) -> list[str]:
        """Returns the known names; reads the directory."""
        with self._lock:
            names = set(self._added)
        if self._directory is not None and self._directory.is_dir():  # it may be gone by now
            names |= {entry.name for entry in os.scandir(self._directory) if holds_adapter(Path(entry.path))}
        return sorted(names)

    def path_of(self, name: str) -> Path | None:
        """Returns the adapter's directory, or None if there is none."""
        with self._lock:
            if name in self._added:
                return self._added[name]
        if self._directory is None or not _is_one_component(name):
            return None
        path = self._directory / name
        return path if holds_adapter(path) else None

    def check_known(self, names: Iterable[str], caller: str, adapters_of_model: Iterable[str]) -> None:
        """Checks that the adapters can be found. Arguments and errors as in :meth:`AdapterPool.check_known`."""
        for name in names:
            if self.path_of(name) is None:
                known = [*adapters_of_model, *self.all()]
                close = difflib.get_close_matches(name, known, 3) if len(known) <= _COMPARED else []
                meant = f" (close to {', '.join(map(repr, close))})" if close else ""
                shown = first_of(map(repr, known), _SHOWN)
                raise KeyError(f"{caller}: there is no adapter {name!r}{meant}; the adapters are [{shown}]")


_SHOWN = 8  # names in a message
_COMPARED = 1000  # names that are searched for one like an unknown name: 16 ms, in which no other thread runs


def _is_one_component(name: str) -> bool:
    """Returns whether ``name`` is a file name that leads nowhere else."""
    separators = {os.sep, os.altsep} - {None}
    return name not in ("", ".", "..", BASE) and not any(s in name for s in separators) and "\0" not in name
