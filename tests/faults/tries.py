"""Runs an action in forked processes, each with one fault; works in processes started by ``faults.run_script``."""

from __future__ import annotations

import ctypes
import errno
import gc
import itertools
import json
import os
import shutil
import signal
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

_LIBC = ctypes.CDLL(None)
_LIBC.faults_arm.argtypes = [ctypes.c_char_p, ctypes.c_int, ctypes.c_long, ctypes.c_int, ctypes.c_int]
_LIBC.faults_count.restype = ctypes.c_long
_LIBC.faults_last.restype = ctypes.c_char_p

_COUNT, _KILL, _FAIL = 0, 1, 2  # interpose.c
_TAKES_SPACE, _OTHER = 1, 2


@dataclass(frozen=True)
class Fault:
    """A fault of the calls that change files below ``directory``.

    Attributes:
        kind: "none", "kill" (the process dies before call ``at``), "disk full" (from call ``at`` on, calls that take
            space fail) or "read-only" (from call ``at`` on, every call fails).
        at: number of the call, from 1; for a full disk only calls that take space count.
    """

    directory: Path
    kind: str = "none"
    at: int = 0

    def arm(self) -> None:
        mode, kinds, number = {
            "none": (_COUNT, _TAKES_SPACE | _OTHER, 0),
            "kill": (_KILL, _TAKES_SPACE | _OTHER, 0),
            "disk full": (_FAIL, _TAKES_SPACE, errno.ENOSPC),
            "read-only": (_FAIL, _TAKES_SPACE | _OTHER, errno.EROFS),
        }[self.kind]
        _LIBC.faults_arm(str(self.directory).encode(), mode, self.at, kinds, number)


@dataclass(frozen=True)
class Outcome:
    """The outcome of a try.

    Attributes:
        ended: "returned", "raised" or "killed".
        calls: number of counted calls; unknown (0) if the process was killed.
        last: name of the last counted call.
        result: the action's result, as JSON.
        error: class of the exception; ``message``: its text; ``bases``: the names of its base classes.
    """

    ended: str
    calls: int = 0
    last: str = ""
    result: Any = None
    error: str = ""
    message: str = ""
    bases: list[str] = field(default_factory=list)


def attempt(action: Callable[[], Any], fault: Fault, *, as_owner_only: bool = False) -> Outcome:
    """Runs ``action`` in a forked process with ``fault``.

    Args:
        as_owner_only: drop root's privilege to write against a file's mode.
    """
    gc.freeze()  # the child's collections leave this process's objects alone, and so share their memory
    reading, writing = os.pipe()
    if (child := os.fork()) == 0:
        status = 1
        try:
            os.close(reading)
            if as_owner_only:
                drop_privileges()
            fault.arm()
            try:
                report = {"ended": "returned", "result": action()}
            except BaseException as error:
                bases = [base.__name__ for base in type(error).__mro__]
                report = {"ended": "raised", "error": type(error).__name__, "message": str(error), "bases": bases}
            report |= {"calls": _LIBC.faults_count(), "last": _LIBC.faults_last().decode()}
            with os.fdopen(writing, "w") as pipe:
                json.dump(report, pipe)
            status = 0
        finally:
            os._exit(status)
    os.close(writing)
    with os.fdopen(reading) as pipe:
        report = pipe.read()
    status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    assert status in (0, -signal.SIGKILL), f"the process ended with {status}"
    return Outcome(**json.loads(report)) if status == 0 else Outcome("killed")


def each_call(
    action: Callable[[], Any], directory: Path, kind: str, prepare: Callable[[], None], step: int = 1
) -> Iterator[tuple[int, Outcome]]:
    """Tries ``action`` with a fault at its first call, its second, and so on, until a try ends before the fault.

    Args:
        prepare: called before each try; restores the action's initial files.
        step: distance between tried calls.

    Yields:
        ``(number of the call, outcome)``; the last number is that of a call that is not made.
    """
    for at in itertools.count(1, step):
        prepare()
        outcome = attempt(action, Fault(directory, kind, at))
        yield at, outcome
        if outcome.ended == "returned" and outcome.calls < at:
            return


def snapshot(directory: Path) -> dict[str, bytes | None] | None:
    """Returns the bytes of every file below ``directory`` (None for a subdirectory), or None if it does not exist."""
    if not directory.exists():
        return None
    return {
        str(path.relative_to(directory)): path.read_bytes() if path.is_file() else None for path in directory.rglob("*")
    }


def restore(directory: Path, content: dict[str, bytes | None] | None) -> None:
    """Restores ``directory`` to a result of :func:`snapshot`."""
    shutil.rmtree(directory, ignore_errors=True)
    if content is None:
        return
    directory.mkdir(parents=True)
    for name in sorted(content):
        if content[name] is None:
            (directory / name).mkdir(parents=True, exist_ok=True)
        else:
            (directory / name).parent.mkdir(parents=True, exist_ok=True)
            (directory / name).write_bytes(content[name])


def drop_privileges() -> None:
    """Drops root's privileges to ignore a file's mode; other users have none."""

    class Header(ctypes.Structure):
        _fields_ = (("version", ctypes.c_uint32), ("pid", ctypes.c_int))

    class Data(ctypes.Structure):
        _fields_ = (("effective", ctypes.c_uint32), ("permitted", ctypes.c_uint32), ("inheritable", ctypes.c_uint32))

    header, data = Header(0x20080522, 0), (Data * 2)()
    assert _LIBC.capget(ctypes.byref(header), data) == 0
    override = 1 << 1 | 1 << 2 | 1 << 3  # CAP_DAC_OVERRIDE, CAP_DAC_READ_SEARCH, CAP_FOWNER
    data[0].effective &= ~override
    data[0].permitted &= ~override
    assert _LIBC.capset(ctypes.byref(header), data) == 0
