"""Runs many fine-tuning jobs for compare and sweep, each in a separate process."""

from __future__ import annotations

import errno
import multiprocessing
import os
import shutil
import signal
import sys
import traceback
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import FIRST_EXCEPTION, ThreadPoolExecutor, wait
from contextlib import contextmanager, redirect_stderr, redirect_stdout, suppress
from dataclasses import dataclass
from multiprocessing.connection import Connection
from pathlib import Path
from threading import Event
from typing import Any

import torch
from tqdm import tqdm

from lora_ext._common.progress import progress
from lora_ext.files import read_json_object
from lora_ext.tasks import TaskError, WriteError
from lora_ext.tasks.finetune import busy_machine
from lora_ext.tasks.finetune.data import saved_fingerprint
from lora_ext.tasks.finetune.settings import Settings, checked_options
from lora_ext.tasks.shared.whole_files import writing


@dataclass(frozen=True)
class Run:
    """One fine-tuning run of a comparison or sweep.

    Attributes:
        label: name of the group; runs of a group differ only in the seed.
        settings: settings of the run.
        data_sha256: fingerprint of the texts; other texts or settings make another run.
    """

    label: str
    settings: Settings
    data_sha256: str

    def directory(self, out: Path) -> Path:
        """Returns the directory of the run in ``out``."""
        name = "".join(char if char.isalnum() or char in "+-=._" else "-" for char in self.label)
        return out / "runs" / name / f"seed-{self.settings.seed}"


def run_all(runs: Sequence[Run], out: Path, what: str, jobs: int = 1) -> dict[Run, dict[str, Any]]:
    """Executes the unfinished runs under one progress bar; returns the metrics of all runs.

    Each run writes the same files as ``finetune``, without checkpoints, and a log next to its directory. An
    interrupted run continues from its last checkpoint.

    Args:
        runs: all runs, finished or not.
        out: the directory that contains the directories of the runs.
        what: text at the start of the progress bar.
        jobs: number of runs at the same time; they share this process's number of threads.

    Raises:
        TaskError: a run failed, or two runs would share a directory; the message names it. The other runs are stopped.
        KeyboardInterrupt: Ctrl-C; the running runs have written checkpoints.
    """
    directories = {run: run.directory(out) for run in runs}
    if len(set(directories.values())) < len(runs):
        raise TaskError(f"{what}: two of {sorted({run.label for run in runs})} would share a directory; rename one")
    done = dict.fromkeys(runs, 0.0)
    bar_format = "{desc}: {percentage:3.0f}%|{bar}| {n:.2f} of {total} runs [{elapsed}<{remaining}]{postfix}"
    with progress(what, len(runs), unit="runs", bar_format=bar_format) as shown:

        def show(run: Run, part: float) -> None:
            done[run] = part
            running = [f"{one.label}, seed {one.settings.seed}" for one in runs if 0 < done[one] < 1]
            shown.note("; ".join(running))
            shown.set(sum(done.values()))

        def carry_out(run: Run) -> dict[str, Any]:
            metrics = finished(run, out)
            if metrics is None:
                metrics = _carry_out(run, out, jobs, ending, lambda part: show(run, min(part, 0.999)))
                line = busy_machine.advice(max(1, torch.get_num_threads() // jobs), _step_seconds(metrics))
                if line is not None and not advised:
                    advised.append(line)
                    tqdm.write(line, file=sys.stderr)
            shutil.rmtree(directories[run] / "checkpoints", ignore_errors=True)
            show(run, 1.0)
            return metrics

        ending, advised = Event(), []
        if jobs == 1:
            return {run: carry_out(run) for run in runs}
        with ThreadPoolExecutor(jobs) as pool:
            futures = {run: pool.submit(carry_out, run) for run in runs}
            try:
                ended, _ = wait(futures.values(), return_when=FIRST_EXCEPTION)
                for future in ended:
                    future.result()
                return {run: future.result() for run, future in futures.items()}
            except BaseException:
                ending.set()
                end_processes()
                while True:
                    try:
                        pool.shutdown(cancel_futures=True)
                        break
                    except KeyboardInterrupt:  # the second Ctrl-C stops the runs without a checkpoint
                        end_processes()
                raise


_FIGURES = ("trainable_parameters", "head_parameters", "total_parameters", "full_checkpoint_bytes", "train_seconds")
_FIGURES += ("peak_memory_bytes",)


def _step_seconds(metrics: Mapping[str, Any]) -> float:
    """Returns the mean seconds per training step of a run."""
    settings = Settings(**checked_options(metrics["settings"]))
    steps = metrics["examples"]["train"] / settings.texts_per_step * settings.epochs
    return metrics["train_seconds"] / max(steps, 1)


def finished(run: Run, out: Path) -> dict[str, Any] | None:
    """Returns the metrics of a finished run.

    None if the run is not finished, was started with other settings or texts, or has a damaged metrics file.
    """
    try:
        metrics = read_json_object(run.directory(out) / "metrics.json", "", 10_000_000)
        # Options added later get their defaults.
        same = Settings(**checked_options(metrics["settings"])) == run.settings
        scores = [metrics["after"], *([metrics["validation"]] if metrics["validation"] else [])]
        figures = [metrics[name] for name in _FIGURES]
        figures += [score[name] for score in scores for name in ("accuracy", "macro_f1")]
        whole = all(type(figure) in (int, float) for figure in figures) and isinstance(metrics["examples"]["test"], int)
    except (OSError, ValueError, KeyError, TypeError, AttributeError, TaskError):
        return None
    return metrics if whole and same and metrics.get("data_sha256") in (None, run.data_sha256) else None


def _carry_out(run: Run, out: Path, jobs: int, ending: Event, on_progress: Callable[[float], None]) -> dict[str, Any]:
    directory = run.directory(out)
    resume, log = _can_resume(run, directory), directory.with_name(f"{directory.name}.log")
    with writing(directory):
        if not resume and directory.exists():
            shutil.rmtree(directory)
            log.unlink(missing_ok=True)
        directory.parent.mkdir(parents=True, exist_ok=True)
    arguments = (run.settings, directory, resume, jobs)
    in_process(
        _finetune,
        *arguments,
        log=log,
        threads=max(1, torch.get_num_threads() // jobs),
        on_progress=on_progress,
        ending=ending,
    )
    metrics = finished(run, out)
    if metrics is None:
        raise TaskError(f"{directory} lacks complete metrics of the run that has just ended there; see {log}")
    return metrics


def _can_resume(run: Run, directory: Path) -> bool:
    try:
        return Settings.load(directory) == run.settings and saved_fingerprint(directory) in (None, run.data_sha256)
    except TaskError:
        return False


def _finetune(
    settings: Settings,
    directory: Path,
    resume: bool,
    jobs: int,
    on_progress: Callable[[float], None] = lambda part: None,
) -> None:
    from lora_ext.tasks.finetune.run import finetune

    finetune(settings, directory, resume=resume, measure=False, runs_at_once=jobs, on_progress=on_progress)


_PROCESSES: set[multiprocessing.process.BaseProcess] = set()  # processes that in_process waits for


# --- processes --------------------------------------------------------------------------------------------------------


def in_process(
    function: Callable[..., Any],
    *args: Any,
    log: Path,
    threads: int | None = None,
    on_progress: Callable[[float], None] = lambda part: None,
    ending: Event | None = None,
) -> Any:
    """Calls ``function(*args, on_progress=...)`` in a new process, so that its peak memory is measured separately.

    Args:
        log: file that receives the output of the process.
        threads: number of PyTorch threads in the process; None for the number of this process.
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
    process.start()
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
    kind, value = outcome
    if interrupted or kind == "interrupted":
        raise KeyboardInterrupt
    if kind in ("mistake", "disk"):
        raise (WriteError if kind == "disk" else TaskError)(value)
    if kind != "done":
        lines = log.read_text(errors="replace").strip().splitlines() if log.is_file() else []
        last = lines[-1] if lines else f"exit code {process.exitcode}"
        raise TaskError(f"a run failed: {last}; {log} has the rest")
    return value


def end_processes() -> None:
    """Sends SIGINT to every process that :func:`in_process` waits for; runs write a checkpoint and end."""
    for process in list(_PROCESSES):
        _interrupt(process)


def _interrupt(process: multiprocessing.process.BaseProcess) -> None:
    if process.is_alive():
        os.kill(process.pid, signal.SIGINT)


def _context() -> multiprocessing.context.BaseContext:
    """Returns a context that forks from a server with all imports done, which starts a process seconds sooner.

    The server has computed nothing before it forks.
    """
    if "forkserver" not in multiprocessing.get_all_start_methods():
        return multiprocessing.get_context("spawn")
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["lora_ext.tasks.comparison.costs"])
    return context


def _child(connection: Connection, log: Path, num_threads: int, function: Callable[..., Any], args: tuple) -> None:
    os.setpgid(0, 0)  # otherwise a terminal's Ctrl-C arrives twice, also from the parent, and the second stops at once
    torch.set_num_threads(num_threads)
    try:
        with _output_to(log):
            value = function(*args, on_progress=lambda part: connection.send(("progress", part)))
        connection.send(("done", value))
    except TaskError as error:
        connection.send(("disk" if isinstance(error, WriteError) else "mistake", str(error)))
    except KeyboardInterrupt:
        connection.send(("interrupted", None))
    except BaseException as error:
        if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EROFS):
            connection.send(("disk", f"{error.filename or log} cannot be written: {error.strerror}"))
        with suppress(OSError):
            traceback.print_exc()  # goes to the log: descriptors 1 and 2 still point there
        raise SystemExit(1) from None
    finally:
        connection.close()


@contextmanager
def _output_to(log: Path):
    """Redirects stdout and stderr to ``log``, including what C libraries print."""
    with writing(log):
        file = log.open("a", encoding="utf-8", buffering=1)  # line-buffered: a reader sees each line immediately
    with file, redirect_stdout(file), redirect_stderr(file):
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
        yield
