"""Calls a function in a new process, whose memory and output are its own, and passes Ctrl-C on."""

from __future__ import annotations

import errno
import fcntl
import multiprocessing
import os
import signal
import threading
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager, redirect_stderr, redirect_stdout, suppress
from multiprocessing import forkserver, resource_tracker
from pathlib import Path
from threading import Event
from typing import Any

import torch

from lora_ext.tasks import TaskError, WriteError
from lora_ext.tasks.shared import sigterm
from lora_ext.tasks.shared.whole_files import writing

DEVICES = "CUDA_VISIBLE_DEVICES"

_PROCESSES: set[multiprocessing.process.BaseProcess] = set()  # processes that in_process waits for
_STARTING = threading.Lock()  # a process inherits the environment as it is when it starts


def cuda_devices() -> list[str]:
    """Returns the CUDA devices that this process may use, as ``CUDA_VISIBLE_DEVICES`` names them."""
    count, named = torch.cuda.device_count(), os.environ.get(DEVICES)
    names = map(str, range(count)) if named is None else named.split(",")
    return [name.strip() for name in names][:count]


def in_process(
    function: Callable[..., Any],
    *args: Any,
    log: Path,
    threads: int | None = None,
    device: str | None = None,
    on_progress: Callable[[float], None] = lambda part: None,
    ending: Event | None = None,
) -> Any:
    """Calls ``function(*args, on_progress=...)`` in a new process, so that its peak memory is measured separately.

    Args:
        log: file that receives the output of the process.
        threads: number of PyTorch threads in the process; None for the number of this process.
        device: the only CUDA device that the process sees; None for all.
        ending: event set before :func:`end_processes` is called; a process started later is interrupted at once.

    Returns:
        The return value of ``function``.

    Raises:
        TaskError: the function raised it, or the process died; then the message has the last line of the log.
        KeyboardInterrupt: Ctrl-C; it is passed on to the process and raised here after the process has ended.
    """
    context = _context()
    ours, theirs = context.Pipe(duplex=False)
    process = context.Process(target=_child, args=(theirs, log, threads or torch.get_num_threads(), function, args))
    _PROCESSES.add(process)
    try:
        with _STARTING, _variable(DEVICES, device):
            _start_again_if_lost(process)
    except BaseException:
        _PROCESSES.discard(process)
        raise
    theirs.close()
    if ending is not None and ending.is_set():
        _interrupt(process)
    outcome: tuple[str, Any] = ("died", None)
    interrupted = False
    while True:
        try:
            kind, value = ours.recv()
            if kind == "progress":
                on_progress(value)
            else:
                outcome = (kind, value)
        except EOFError:
            break
        except KeyboardInterrupt:
            interrupted = True
            _interrupt(process)
    process.join()
    _PROCESSES.discard(process)
    if interrupted:
        raise KeyboardInterrupt
    if outcome[0] == "died":
        outcome = ("died", _how_it_ended(process.exitcode))
    return value_of(outcome, log)


def value_of(outcome: tuple[str, Any], log: Path) -> Any:
    """Returns the value of an :func:`outcome_of`, or raises its error."""
    kind, value = outcome
    if kind == "done":
        return value
    if kind == "interrupted":
        raise KeyboardInterrupt
    if kind in ("mistake", "disk"):
        raise (WriteError if kind == "disk" else TaskError)(value)
    said = last_line(log) if kind == "died" else ""
    raise TaskError(f"a run failed: {value}{', after: ' if said else ''}{said}; {log} has the rest")


def _how_it_ended(exit_code: int | None) -> str | None:
    if exit_code is None or exit_code >= 0:
        return f"its process ended with exit code {exit_code}"
    name = signal.Signals(-exit_code).name
    return f"its process was ended by {name}{', as when memory is short' if name == 'SIGKILL' else ''}"


def last_line(log: Path) -> str:
    lines = log.read_text(errors="replace").strip().splitlines() if log.is_file() else []
    return lines[-1].strip() if lines else ""


def end_processes() -> None:
    """Sends SIGINT to every process that :func:`in_process` waits for; runs write a checkpoint and end."""
    for process in list(_PROCESSES):
        _interrupt(process)


def _interrupt(process: multiprocessing.process.BaseProcess) -> None:
    if process.is_alive():
        with suppress(ProcessLookupError):  # it has ended since
            os.kill(process.pid, signal.SIGINT)


def _context() -> multiprocessing.context.BaseContext:
    """Returns a context that forks from a server with all imports done (preloaded.py): a process starts seconds sooner.

    The server has computed nothing before it forks. Where there is CUDA, the imports ask for devices, and PyTorch
    refuses CUDA in processes that are forked after that: they start from the beginning.
    """
    if torch.cuda.is_available() or "forkserver" not in multiprocessing.get_all_start_methods():
        return multiprocessing.get_context("spawn")
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["lora_ext.tasks.comparison.preloaded"])
    return context


def _start_again_if_lost(process: multiprocessing.process.BaseProcess) -> None:
    """Starts the process; once more if the server has been killed meanwhile. TaskError: the second time failed, too."""
    for last in (False, True):
        try:
            _start(process)
            return
        except (EOFError, ConnectionError) as error:
            if last:
                raise TaskError(
                    "a run could not start: the process that starts runs was ended twice, as when memory is short"
                ) from error


def _start(process: multiprocessing.process.BaseProcess) -> None:
    """Starts the process. Ctrl-C does not reach it, or the server that forks it, while they import.

    Otherwise they would print where it met them. They begin with SIGINT blocked, as it is in this thread; the server
    then calls :func:`forget_interrupts`.
    """
    resource_tracker.ensure_running()  # as the calls below do, and unblocks the signal
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    try:
        if process._start_method == "forkserver":
            forkserver.ensure_running()  # does not wait for the imports, as start does
        else:
            process.start()
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)
    if process._start_method == "forkserver":
        process.start()


def forget_interrupts() -> None:
    """Unblocks SIGINT if it is blocked, and forgets those that came meanwhile."""
    if signal.SIGINT in signal.pthread_sigmask(signal.SIG_BLOCK, ()):
        handler = signal.signal(signal.SIGINT, signal.SIG_IGN)
        signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGINT})
        signal.signal(signal.SIGINT, handler)


@contextmanager
def _variable(name: str, value: str | None) -> Iterator[None]:
    """Sets a variable of the environment, unless ``value`` is None."""
    before = os.environ.get(name)
    if value is not None:
        os.environ[name] = value
    try:
        yield
    finally:
        if before is not None:
            os.environ[name] = before
        elif value is not None:
            del os.environ[name]


# --- in the new process -----------------------------------------------------------------------------------------------


def _child(connection: Any, log: Path, num_threads: int, function: Callable[..., Any], args: tuple) -> None:
    os.setpgid(0, 0)  # otherwise a terminal's Ctrl-C arrives twice, also from the parent, and the second stops at once
    try:
        signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGINT})  # a pending one raises here
        torch.set_num_threads(num_threads)
        connection.send(outcome_of(function, args, log, lambda part: connection.send(("progress", part))))
    except KeyboardInterrupt:
        connection.send(("interrupted", None))
    finally:
        connection.close()


def outcome_of(
    function: Callable[..., Any], args: tuple, log: Path, on_progress: Callable[[float], None]
) -> tuple[str, Any]:
    """Calls ``function(*args, on_progress=on_progress)`` with its output in ``log``.

    Returns:
        ``(kind, value)`` for :func:`value_of`, which another process calls: "done" with the function's value, "mistake"
        or "disk" with a message, "interrupted", or "failed" with the error, whose traceback is in the log.
    """
    try:
        with _output_to(log):
            return "done", function(*args, on_progress=on_progress)
    except TaskError as error:
        return "disk" if isinstance(error, WriteError) else "mistake", str(error)
    except KeyboardInterrupt:  # after SIGTERM to this process alone, the other runs go on
        return ("failed", "its process was ended by SIGTERM") if sigterm.received() else ("interrupted", None)
    except Exception as error:
        with suppress(OSError):
            traceback.print_exc()  # goes to the log: descriptors 1 and 2 still point there
        if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EROFS):
            return "disk", f"{error.filename or log} cannot be written: {error.strerror}"
        return "failed", " ".join(f"{type(error).__name__}: {error}".split())


@contextmanager
def _output_to(log: Path) -> Iterator[None]:
    """Redirects stdout and stderr to ``log``, including what C libraries print, and locks it.

    TaskError: another process has it locked.
    """
    with writing(log):
        file = log.open("a", encoding="utf-8", buffering=1)  # line-buffered: a reader sees each line immediately
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        file.close()
        raise TaskError(f"another process works on it already: it writes {log}") from None
    except OSError:
        pass  # some file systems have no locks
    with file, redirect_stdout(file), redirect_stderr(file):
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
        yield
