"""Runs as jobs that submitit starts: of Slurm, or as processes of this machine.

submitit pickles the call and the value into ``OUT/jobs``. What else passes between the command and a job are files next
to the run's log, on the file system that both see: the job's number, its progress, and the wish that it stops.
"""

from __future__ import annotations

import functools
import os
import signal
import subprocess
import tempfile
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from threading import Event
from types import SimpleNamespace
from typing import Any

import submitit
import torch
from submitit.core import utils
from submitit.local import local

from lora_ext._common.install_hint import install_hint
from lora_ext.files import read_json_object
from lora_ext.tasks import TaskError
from lora_ext.tasks.comparison.launch import Launch
from lora_ext.tasks.comparison.processes import DEVICES, last_line, outcome_of, value_of
from lora_ext.tasks.shared.whole_files import write_json, write_whole, writing

FOLDER = "jobs"  # in the directory of the results

_POLL = 0.5  # seconds between two looks at a job
_LOOK = 1.0  # seconds between two looks of a job at the wish to stop, and two words about its progress
_GRACE = 120.0  # seconds for a checkpoint: as long as a network's file system may hide a new file
_BETWEEN = 2.0  # seconds between two questions to Slurm about jobs that were cancelled
_OF_MEMORY = ("tmpfs", "ramfs")
_ALIVE = ("PENDING", "RUNNING", "REQUEUED", "REQUEUE_HOLD", "SUSPENDED", "COMPLETING", "CONFIGURING", "RESIZING")


def check(launch: Launch, out: Path) -> None:
    """Raises TaskError for a cluster that is not here, a wrong parameter, and a directory that no other machine sees.

    Writes nothing into ``out``.
    """
    if launch.cluster not in ("slurm", "local"):
        raise TaskError(f"--launcher-set cluster={launch.cluster}: want slurm or local")
    if "%" in str(out.resolve()):
        raise TaskError(f"--out {out}: Slurm gives a meaning to % in paths; choose another directory")
    with tempfile.TemporaryDirectory() as folder:
        _executor(launch, Path(folder), 1)
    kind, place = _file_system(out.resolve())
    if launch.cluster != "local" and kind in _OF_MEMORY:
        raise TaskError(
            f"--out {out} is in this machine's memory ({kind} at {place}); choose a directory that all machines see"
        )


def check_no_jobs(out: Path, records: Iterable[Path]) -> None:
    """Raises TaskError if Slurm still has one of the jobs that earlier commands left in ``records``."""
    jobs = {record: job.job_id for record in records if (job := _alive(record, out.resolve() / FOLDER)[0]) is not None}
    if jobs:
        record, number = next(iter(jobs.items()))
        raise TaskError(
            f"--overwrite would remove what job {number} writes in {record.parent}; --resume waits for the jobs of an "
            f"earlier command, scancel {' '.join(jobs.values())} ends them"
        )


def _alive(record: Path, folder: Path) -> tuple[submitit.SlurmJob | None, str | None]:
    """Returns the job that the file ``record`` names, and its work, if Slurm has it and it has no result yet."""
    try:
        known = read_json_object(record, "", 1_000_000)
        if known["cluster"] != "slurm":  # jobs of this machine are known to their command only
            return None, None
        job = submitit.SlurmJob(folder, str(known["id"]))
        state = job.watcher.get_state(job.job_id, mode="force").split()[0]
    except (OSError, ValueError, KeyError, IndexError):
        return None, None
    is_alive = state in _ALIVE and not job.paths.result_pickle.exists()
    return (job, known.get("work")) if is_alive else (None, None)


def _executor(launch: Launch, folder: Path, threads: int) -> submitit.AutoExecutor:
    try:
        executor = submitit.AutoExecutor(folder, **launch.constructor())
        executor.update_parameters(**launch.updates(threads))
    except ImportError as error:
        raise TaskError(f"--launcher submitit: {error}; {install_hint('submitit')}") from error
    except RuntimeError as error:  # no srun
        raise TaskError(
            f"--launcher submitit: {error} On one machine use --jobs; "
            "--launcher-set cluster=local tries the launcher out"
        ) from error
    except (NameError, ValueError, TypeError, AssertionError) as error:
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise TaskError(f"--launcher-set {' '.join(launch.more)}: {reason}") from error
    return executor


@contextmanager
def _own_session(cluster: str) -> Iterator[None]:
    """Starts jobs of this machine in sessions of their own, which a terminal's Ctrl-C does not reach.

    submitit's controller would take it, and kill the job before a checkpoint is written.
    """
    if cluster != "local":
        yield
        return
    popen = functools.partial(subprocess.Popen, start_new_session=True)
    local.subprocess = SimpleNamespace(**{**vars(subprocess), "Popen": popen})
    try:
        yield
    finally:
        local.subprocess = subprocess


def _file_system(path: Path) -> tuple[str, str]:
    """Returns the kind of the file system that ``path`` is or will be in, and where it is mounted."""
    best = ("", "")
    with suppress(OSError):
        for line in Path("/proc/self/mountinfo").read_text().splitlines():
            fields, _, rest = line.partition(" - ")
            place = fields.split()[4].encode().decode("unicode_escape")
            if path.is_relative_to(place) and len(place) >= len(best[1]):
                best = (rest.split()[0], place)
    return best


class SubmititPool:
    """Jobs of one command, with this process's number of threads; see :class:`~lora_ext.tasks.comparison.pools.Pool`.

    If the command is killed, its jobs continue, and the next command waits for them.
    """

    needs_threads = True  # Ctrl-C reaches the main thread only, and the others can go on watching their jobs

    def __init__(self, launch: Launch, out: Path, runs: int) -> None:
        self._launch, self._folder = launch, out.resolve() / FOLDER
        self.at_once, self.runs_here = launch.at_once(runs), launch.on_this_machine(runs)
        self.threads = torch.get_num_threads()
        self._asking = threading.Lock()  # submitit asks Slurm about all jobs at once, and not for several threads
        self._ends, self._forced = 0, 0.0

    def end(self) -> None:
        self._ends += 1

    def call(
        self,
        function: Callable[..., Any],
        *args: Any,
        log: Path,
        threads: int,
        on_progress: Callable[[float], None] = lambda part: None,
        ending: Event | None = None,
        prepare: Callable[[], None] = lambda: None,
    ) -> Any:
        """Calls ``function(*args, on_progress=...)`` in a job, and waits for its end.

        Args:
            log, threads, on_progress: as for :func:`~lora_ext.tasks.comparison.processes.in_process`.
            ending: event that makes the job write a checkpoint and end.
            prepare: called before a job is submitted; not if one works already on the same.

        Raises:
            TaskError: the function raised it, or the job ended without a word.
            KeyboardInterrupt: the job was ended.
        """
        files, work = _Files(log.resolve()), repr((function.__qualname__, args))
        ending = Event() if ending is None else ending
        if ending.is_set():
            raise KeyboardInterrupt
        job = self._job_before(files, work)
        if job is None:
            prepare()
            files.clear()
            what = _Work(function, args, files, threads, has_device=bool(self._launch.gpus_per_run))
            job = self._submit(what, files, work, threads)
        try:
            self._wait(job, files, ending, on_progress)
        except KeyboardInterrupt:  # in the main thread
            ending.set()
            try:
                self._wait(job, files, ending, on_progress)
            except KeyboardInterrupt:
                job.cancel(check=False)
        try:
            if ending.is_set():
                raise KeyboardInterrupt
            return value_of(self._outcome(job, log), log)
        finally:
            files.clear()

    def _submit(self, work: _Work, files: _Files, name: str, threads: int) -> Any:
        with self._asking:
            executor = _executor(self._launch, self._folder, threads)
            try:
                with writing(self._folder):
                    self._folder.mkdir(parents=True, exist_ok=True)
                    files.log.parent.mkdir(parents=True, exist_ok=True)
                with _own_session(self._launch.cluster):
                    job = executor.submit(work)
            except (utils.FailedJobError, utils.FailedSubmissionError) as error:  # sbatch refuses
                raise TaskError(f"submitit: {' '.join(str(error).split())}") from error
        try:
            write_json(files.job, {"cluster": self._launch.cluster, "id": job.job_id, "work": name})
        except BaseException:  # the next command could not find it
            job.cancel(check=False)
            raise
        return job

    def _job_before(self, files: _Files, work: str) -> Any | None:
        """Returns the job of an earlier command that still does this ``work``, or None.

        TaskError: it does other work in the same directory.
        """
        with self._asking:
            job, its_work = _alive(files.job, self._folder)
        if job is None:
            return None
        if its_work != work:
            raise TaskError(f"job {job.job_id} still works in {files.log.parent} with other options; end it: scancel")
        return job

    def _wait(self, job: Any, files: _Files, ending: Event, on_progress: Callable[[float], None]) -> None:
        asked: float | None = None
        cancelled = False
        while not self._is_done(job, at_once=cancelled):
            on_progress(files.progress())
            if ending.is_set() and not cancelled:
                if asked is None:
                    asked = time.monotonic()
                    with suppress(OSError):
                        files.stop.touch()
                if self._ends > 1 or not files.has_begun() or time.monotonic() - asked > _GRACE:
                    cancelled = True
                    job.cancel(check=False)
            if cancelled and time.monotonic() - asked > 2 * _GRACE:
                return  # Slurm does not say that it has ended
            time.sleep(_POLL)

    def _is_done(self, job: Any, at_once: bool) -> bool:
        with self._asking:
            force = at_once and time.monotonic() - self._forced > _BETWEEN
            self._forced = time.monotonic() if force else self._forced
            return job.done(force_check=force)

    def _outcome(self, job: Any, log: Path) -> tuple[str, Any]:
        try:
            return job.result()
        except utils.UncompletedJobError as error:
            said = last_line(log) or last_line(job.paths.stderr) or "it has written no log"
            more = "" if log.is_file() else f"; does its machine see {self._folder}?"
            raise TaskError(
                f"job {job.job_id} has ended without a result (state: {job.state}), after: {said}; "
                f"{log if log.is_file() else job.paths.stderr} has the rest{more}"
            ) from error


class _Files:
    """Files next to a run's log: what the command and the job tell each other."""

    def __init__(self, log: Path) -> None:
        self.log = log
        self.job, self.begun, self.stop = (log.with_suffix(f".{name}") for name in ("job", "progress", "stop"))

    def clear(self) -> None:
        for path in (self.job, self.begun, self.stop):
            path.unlink(missing_ok=True)

    def has_begun(self) -> bool:
        return self.begun.is_file()

    def progress(self) -> float:
        with suppress(OSError, ValueError):
            return float(self.begun.read_text())
        return 0.0


class _Work:
    """The work of a job. submitit calls it, and calls it again if it starts the job again."""

    def __init__(
        self, function: Callable[..., Any], args: tuple, files: _Files, threads: int, has_device: bool
    ) -> None:
        self._function, self._args, self._files = function, args, files
        self._threads, self._device = threads, "0" if has_device else ""

    def __call__(self) -> tuple[str, Any]:
        # One device, of those that Slurm gives the job, and none that it does not.
        os.environ[DEVICES] = os.environ.get(DEVICES, self._device).partition(",")[0]
        torch.set_num_threads(self._threads)
        signal.signal(signal.SIGINT, signal.default_int_handler)  # shells make it ignored in the background
        files, ended, part = self._files, Event(), [0.0]

        def told() -> None:
            asked = False
            while not ended.wait(_LOOK):
                with suppress(TaskError):  # a full disk is the run's to report
                    write_whole(files.begun, str(part[0]))
                if not asked and files.stop.exists():
                    asked = True
                    os.kill(os.getpid(), signal.SIGINT)

        with suppress(TaskError):
            write_whole(files.begun, "0.0")
        threading.Thread(target=told, daemon=True).start()
        try:
            return outcome_of(self._function, self._args, files.log, lambda done: part.__setitem__(0, done))
        finally:
            ended.set()

    def checkpoint(self, *args: Any, **kwargs: Any) -> Any:
        """Lets submitit start the job again after its time limit, or when another took its machine."""
        return submitit.helpers.DelayedSubmission(self)
