"""Many fine-tuning runs, each in a process of its own, one after another: what compare and sweep are made of."""

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
    """One of many.

    Attributes:
        label: of the group it belongs to, which differ by seed alone.
        settings: of the run.
        data_sha256: the fingerprint of its texts: with others, or other settings, it is another run.
    """

    label: str
    settings: Settings
    data_sha256: str

    def directory(self, out: Path) -> Path:
        """Where in ``out`` the run is."""
        name = "".join(char if char.isalnum() or char in "+-=._" else "-" for char in self.label)
        return out / "runs" / name / f"seed-{self.settings.seed}"


def run_all(runs: Sequence[Run], out: Path, what: str, jobs: int = 1) -> dict[Run, dict[str, Any]]:
    """Carries the runs out that are not finished yet, under one progress bar; returns the metrics of all of them.

    Each leaves what ``finetune`` leaves, without checkpoints, and its output in a log beside. A run that was
    interrupted goes on from its last checkpoint.

    Args:
        runs: all of them.
        out: the directory they share.
        what: begins the bar.
        jobs: so many at once, which share this process's number of threads.

    Raises:
        TaskError: a run failed, or two would share a directory; the message names it. Others that had begun are ended.
        KeyboardInterrupt: Ctrl-C; the runs at hand have left checkpoints.
    """
    directories = {run: run.directory(out) for run in runs}
    if len(set(directories.values())) < len(runs):
        raise TaskError(f"{what}: two of {sorted({run.label for run in runs})} would share a directory; rename one")
    done = dict.fromkeys(runs, 0.0)
    bar_format = "{desc}: {percentage:3.0f}%|{bar}| {n:.2f} of {total} runs [{elapsed}<{remaining}]{postfix}"
    with progress(what, len(runs), unit="runs", bar_format=bar_format) as shown:

        def show(run: Run, part: float) -> None:
            done[run] = part
            at_hand = [f"{each.label}, seed {each.settings.seed}" for each in runs if 0 < done[each] < 1]
            shown.note("; ".join(at_hand))
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
                    except KeyboardInterrupt:  # once more: at once
                        end_processes()
                raise


_FIGURES = ("trainable_parameters", "head_parameters", "total_parameters", "full_checkpoint_bytes", "train_seconds")
_FIGURES += ("peak_memory_bytes",)


def _step_seconds(metrics: Mapping[str, Any]) -> float:
    """What a step of a run took on average."""
    settings = metrics["settings"]
    steps = metrics["examples"]["train"] / settings["batch_size"] * settings["epochs"]
    return metrics["train_seconds"] / max(steps, 1)


def finished(run: Run, out: Path) -> dict[str, Any] | None:
    """The metrics of a run that is complete.

    None: it is not, or was started with other settings or texts, or its file is damaged.
    """
    try:
        metrics = read_json_object(run.directory(out) / "metrics.json", "", 10_000_000)
        same = Settings(**checked_options(metrics["settings"])) == run.settings  # options new since have their defaults
        scores = [metrics["after"], *([metrics["validation"]] if metrics["validation"] else [])]
        figures = [metrics[name] for name in _FIGURES]
        figures += [each[name] for each in scores for name in ("accuracy", "macro_f1")]
        whole = all(type(each) in (int, float) for each in figures) and isinstance(metrics["examples"]["test"], int)
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
        raise TaskError(f"{directory} does not hold what the run that has just ended there is to leave; see {log}")
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


_PROCESSES: set[multiprocessing.process.BaseProcess] = set()  # that are waited for


# --- processes --------------------------------------------------------------------------------------------------------


def in_process(
    function: Callable[..., Any],
    *args: Any,
    log: Path,
    threads: int | None = None,
    on_progress: Callable[[float], None] = lambda part: None,
    ending: Event | None = None,
) -> Any:
    """``function(*args, on_progress=...)`` in a new process, whose peak memory is its own; output goes to ``log``.

    Args:
        threads: that PyTorch computes with in it; None: as many as in this one.
        ending: is set before :func:`end_processes` is called, so that none is started behind its back.

    Returns:
        What it returned.

    Raises:
        TaskError: of the function, or that it died, with the end of its log.
        KeyboardInterrupt: Ctrl-C, which was handed on to the process, after that has ended.
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
    """Ctrl-C for every process that :func:`in_process` waits for: runs leave a checkpoint, and end."""
    for process in list(_PROCESSES):
        _interrupt(process)


def _interrupt(process: multiprocessing.process.BaseProcess) -> None:
    if process.is_alive():
        os.kill(process.pid, signal.SIGINT)


def _context() -> multiprocessing.context.BaseContext:
    """A server that has imported everything, but computed nothing, and forks: processes start seconds sooner."""
    if "forkserver" not in multiprocessing.get_all_start_methods():
        return multiprocessing.get_context("spawn")
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["lora_ext.tasks.comparison.costs"])
    return context


def _child(connection: Connection, log: Path, num_threads: int, function: Callable[..., Any], args: tuple) -> None:
    os.setpgid(0, 0)  # a terminal's Ctrl-C comes by way of the parent, and so once: the second one stops at once
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
            traceback.print_exc()  # into the log: its descriptors stay
        raise SystemExit(1) from None
    finally:
        connection.close()


@contextmanager
def _output_to(log: Path):
    """Everything written to the two streams, by libraries in C too."""
    with writing(log):
        file = log.open("a", encoding="utf-8", buffering=1)  # so that a reader of the log sees each line at once
    with file, redirect_stdout(file), redirect_stderr(file):
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
        yield
