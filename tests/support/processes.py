"""Processes of this Python that import what this process imports, the folders of tests too."""

from __future__ import annotations

import faulthandler
import io
import multiprocessing
import os
import runpy
import signal
import subprocess
import sys
import tempfile
import traceback
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from multiprocessing import forkserver
from multiprocessing.connection import Connection
from multiprocessing.context import BaseContext
from pathlib import Path
from types import ModuleType
from typing import Any
from unittest import mock

import torch

TESTS = Path(__file__).resolve().parents[1]


def environment(**variables: str) -> dict[str, str]:
    """Makes the environment of a process, with ``variables`` over this process's."""
    return {**os.environ, "PYTHONPATH": os.pathsep.join([str(TESTS), *filter(None, sys.path)]), **variables}


def run_python(*arguments: str | Path, **variables: str) -> subprocess.CompletedProcess[str]:
    """Runs a new Python to its end; whether it may fail is the caller's business."""
    command = [sys.executable, *map(str, arguments)]
    return subprocess.run(command, env=environment(**variables), capture_output=True, text=True)


_FORKS = """
import os, pathlib, sys, torch
for path in map(pathlib.Path, sys.argv[1:]):
    if os.fork() == 0:
        os.dup2(said := os.open(path.with_suffix(".txt"), os.O_CREAT | os.O_WRONLY), 1)
        os.dup2(said, 2)
        exec(compile(path.read_text(), "program", "exec"), {"__name__": "__main__"})
        sys.exit(0)
    path.with_suffix(".status").write_text(str(os.waitstatus_to_exitcode(os.wait()[1])))
"""


def after_torch(programs: Mapping[str, str]) -> dict[str, tuple[int, str]]:
    """Runs programs that import lora_ext for the first time, in forks of one process that has imported torch.

    Returns the exit status and what was said, by name.
    """
    with tempfile.TemporaryDirectory() as folder:
        paths = {name: Path(folder, f"{i}.py") for i, name in enumerate(programs)}
        for name, path in paths.items():
            path.write_text(programs[name])
        done = run_python("-c", _FORKS, *paths.values())
        assert done.returncode == 0, done.stderr
        return {
            name: (int(path.with_suffix(".status").read_text()), path.with_suffix(".txt").read_text())
            for name, path in paths.items()
        }


def context() -> BaseContext:
    """Returns a context that forks from a server with the imports of ``support.preloaded``, which has computed nothing.

    Where there is CUDA, the imports ask for devices, and PyTorch refuses CUDA in processes that are forked after that:
    they start from the beginning.
    """
    if torch.cuda.is_available() or "forkserver" not in multiprocessing.get_all_start_methods():
        return multiprocessing.get_context("spawn")
    forking = multiprocessing.get_context("forkserver")
    forking.set_forkserver_preload(["support.preloaded"])
    with mock.patch.dict(os.environ, environment()):  # the server does not take over sys.path
        forkserver.ensure_running()
    return forking


def run_forked(*arguments: str | Path, **variables: str) -> subprocess.CompletedProcess[str]:
    """Does as :func:`run_python` in a :class:`Forked` process."""
    process = Forked(*arguments, stdout=subprocess.PIPE, stderr=subprocess.PIPE, **variables)
    said = process.communicate()
    return subprocess.CompletedProcess(process.args, process.returncode, *said)


class Forked:
    """A process for ``arguments`` of Python that is forked from a server: importing Transformers takes five seconds.

    It is used like ``subprocess.Popen``, in text mode by default; its standard input is empty by default. It has the
    modules of Transformers' Trainer and of lora_ext, so the variables that they read in their import have no effect,
    except OMP_NUM_THREADS. Its own pools fork from the same server.

    Args:
        arguments: ``-c`` and a program, ``-m`` and a module's name, or a path; then those of the program.
        more: ``stdin``, ``stdout`` and ``stderr`` as for ``Popen``, and variables over this process's environment.
    """

    def __init__(
        self, *arguments: Any, cwd: Any = None, start_new_session: bool = False, text: bool = True, **more: Any
    ) -> None:
        self.args = [sys.executable, *map(str, arguments)]
        streams: dict[int, Connection] = {}
        for number, name in enumerate(("stdin", "stdout", "stderr")):
            given, theirs = more.pop(name, None), number
            setattr(self, name, None)
            if given == subprocess.PIPE:
                theirs, ours = os.pipe() if number == 0 else reversed(os.pipe())
                opened = os.fdopen(ours, "rb" if number else "wb", buffering=-1 if text else 0)
                setattr(self, name, io.TextIOWrapper(opened) if text else opened)
            elif given == subprocess.STDOUT:
                theirs = os.dup(streams[1].fileno())
            elif given is not None:
                theirs = os.dup(given if isinstance(given, int) else given.fileno())
            else:
                theirs = os.dup(number) if number else os.open(os.devnull, os.O_RDONLY)
            streams[number] = Connection(theirs, readable=number == 0, writable=number > 0)
        how = (self.args[1:], environment(**more), str(cwd or os.getcwd()), start_new_session, streams)
        self._process = context().Process(target=_run, args=how)
        self._process.start()
        for stream in streams.values():
            stream.close()
        self.pid, self.kill = self._process.pid, self._process.kill

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

    def send_signal(self, number: int) -> None:
        if self.poll() is None:
            with suppress(ProcessLookupError):  # it has ended since
                os.kill(self.pid, number)

    def communicate(self, timeout: float | None = None) -> list[Any]:
        """Reads both pipes to their end and waits; kills the process after ``timeout`` seconds."""
        with ThreadPoolExecutor() as pool:
            read = [stream and pool.submit(stream.read) for stream in (self.stdout, self.stderr)]
            try:
                self.wait(timeout)
            except subprocess.TimeoutExpired:
                self.kill()
                raise
            return [future and future.result() for future in read]


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
