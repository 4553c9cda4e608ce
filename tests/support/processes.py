"""Processes of this Python that import what this process imports, the folders of tests too."""

from __future__ import annotations

import faulthandler
import io
import os
import runpy
import signal
import subprocess
import sys
import threading
import time
import traceback
from multiprocessing import forkserver
from multiprocessing.connection import Connection
from pathlib import Path
from types import ModuleType
from typing import IO, Any

import torch

TESTS = Path(__file__).resolve().parents[1]


def environment(**variables: str) -> dict[str, str]:
    """Makes the environment of a process, with ``variables`` over this process's."""
    return {**os.environ, "PYTHONPATH": os.pathsep.join([str(TESTS), *filter(None, sys.path)]), **variables}


def run_python(*arguments: str | Path, **variables: str) -> subprocess.CompletedProcess[str]:
    """Runs a new Python to its end; whether it may fail is the caller's business."""
    command = [sys.executable, *map(str, arguments)]
    return subprocess.run(command, env=environment(**variables), capture_output=True, text=True)


def run_forked(*arguments: str | Path, **variables: str) -> subprocess.CompletedProcess[str]:
    """Does as :func:`run_python` in a :class:`Forked` process."""
    process = Forked(*arguments, stdout=subprocess.PIPE, stderr=subprocess.PIPE, **variables)
    said = process.communicate()
    return subprocess.CompletedProcess(process.args, process.returncode, *said)


class Forked:
    """A process for ``arguments`` of Python that is forked from a server: importing Transformers takes five seconds.

    It is used like ``subprocess.Popen``. It has the modules of Transformers' Trainer and of lora_ext, so the variables
    that they read in their import have no effect, except OMP_NUM_THREADS. Its own pools fork from the same server.

    Args:
        arguments: as strings, ``-c`` and a program, ``-m`` and a module's name, or a path; then those of the program.
        cwd: its working directory.
        start_new_session: it gets its own process group.
        stdin, stdout, stderr: a file, ``subprocess.PIPE``, or None: the standard input is empty, the others this
            process's.
        text: pipes carry text.
        variables: over this process's environment.
    """

    def __init__(
        self,
        *arguments: Any,
        cwd: str | Path | None = None,
        start_new_session: bool = False,
        stdin: Any = None,
        stdout: Any = None,
        stderr: Any = None,
        text: bool = True,
        **variables: str,
    ) -> None:
        self.args = [sys.executable, *map(str, arguments)]
        self.stdin, self.stdout, self.stderr = None, None, None
        streams = {}
        for number, (name, given) in enumerate({"stdin": stdin, "stdout": stdout, "stderr": stderr}.items()):
            if given == subprocess.PIPE:
                reading, writing = os.pipe()
                theirs, ours = (reading, writing) if name == "stdin" else (writing, reading)
                opened: IO[Any] = os.fdopen(ours, "wb" if name == "stdin" else "rb", buffering=0 if not text else -1)
                setattr(self, name, io.TextIOWrapper(opened) if text else opened)
            elif given == subprocess.STDOUT:
                theirs = os.dup(streams[1].fileno())
            elif given is None:
                theirs = os.open(os.devnull, os.O_RDONLY) if name == "stdin" else os.dup(number)
            else:
                theirs = os.dup(given if isinstance(given, int) else given.fileno())
            streams[number] = Connection(theirs, readable=name == "stdin", writable=name != "stdin")
        from lora_ext.tasks.comparison.processes import _context

        how = (self.args[1:], environment(**variables), str(cwd or os.getcwd()), start_new_session, streams)
        self._process = _context().Process(target=_run, args=how)
        self._process.start()
        for stream in streams.values():
            stream.close()
        self.pid = self._process.pid

    @property
    def returncode(self) -> int | None:
        return self._process.exitcode

    def poll(self) -> int | None:
        return self.returncode

    def wait(self, timeout: float | None = None) -> int:
        self._process.join(timeout)
        if self.returncode is None:
            raise subprocess.TimeoutExpired(self.args, timeout)
        return self.returncode

    def kill(self) -> None:
        self._process.kill()

    def send_signal(self, number: int) -> None:
        if self.poll() is None:
            os.kill(self.pid, number)

    def communicate(self, timeout: float | None = None) -> tuple[Any, Any]:
        """Reads both pipes to their end and waits."""
        end = None if timeout is None else time.monotonic() + timeout
        found: dict[str, Any] = {}

        def read(name: str) -> None:
            found[name] = getattr(self, name).read()

        readers = [threading.Thread(target=read, args=[name]) for name in ("stdout", "stderr") if getattr(self, name)]
        for reader in readers:
            reader.start()
        for reader in readers:
            reader.join(None if end is None else max(0.0, end - time.monotonic()))
        self.wait(None if end is None else max(0.0, end - time.monotonic()))
        return found.get("stdout"), found.get("stderr")


def _run(
    arguments: list[str], variables: dict[str, str], cwd: str, new_session: bool, streams: dict[int, Connection]
) -> None:
    """Becomes the process of these arguments."""
    for number, stream in streams.items():
        os.dup2(stream.fileno(), number)
        stream.close()
    sys.stdin, sys.stdout, sys.stderr = (open(n, "w" if n else "r", closefd=False) for n in range(3))  # noqa: SIM115
    if new_session:
        os.setsid()
    os.chdir(cwd)
    os.environ.clear()
    os.environ.update(variables)
    if "OMP_NUM_THREADS" in variables:
        torch.set_num_threads(int(variables["OMP_NUM_THREADS"]))
    if "PYTHONFAULTHANDLER" in variables:
        faulthandler.enable()
    sys.path[:0] = variables["PYTHONPATH"].split(os.pathsep)
    forkserver._forkserver.ensure_running = lambda: None  # the server that this process comes from
    try:
        if arguments[0] == "-c":
            sys.argv = ["-c", *arguments[2:]]
            sys.modules["__main__"] = main = ModuleType("__main__")
            exec(compile(arguments[1], "<string>", "exec"), vars(main))
        elif arguments[0] == "-m":
            sys.argv = arguments[1:]
            runpy.run_module(arguments[1], run_name="__main__", alter_sys=True)
        else:
            sys.argv = arguments
            runpy.run_path(arguments[0], run_name="__main__")
    except KeyboardInterrupt:  # as Python ends
        traceback.print_exc()
        sys.stderr.flush()
        signal.signal(signal.SIGINT, signal.SIG_DFL)
        os.kill(os.getpid(), signal.SIGINT)
