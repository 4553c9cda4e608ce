"""Runs many fine-tuning jobs for compare and sweep, each in a separate process."""

from __future__ import annotations

import shutil
import sys
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import FIRST_EXCEPTION, ThreadPoolExecutor, wait
from dataclasses import dataclass
from pathlib import Path
from threading import Event
from typing import Any

from tqdm import tqdm

from lora_ext._common.progress import progress
from lora_ext.files import read_json_object
from lora_ext.tasks import TaskError, WriteError
from lora_ext.tasks.comparison.launch import Launch
from lora_ext.tasks.comparison.pools import LocalPool, Pool, pool_of
from lora_ext.tasks.comparison.trimmed_base import is_same_run
from lora_ext.tasks.finetune import busy_machine
from lora_ext.tasks.finetune.data import saved_fingerprint
from lora_ext.tasks.finetune.results import divergence
from lora_ext.tasks.finetune.settings import Settings, checked_options, saved_threads
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

    def __str__(self) -> str:
        return f"{self.label}, seed {self.settings.seed}"

    def directory(self, out: Path) -> Path:
        """Returns the directory of the run in ``out``."""
        name = "".join(char if char.isalnum() or char in "+-=._" else "-" for char in self.label)
        return out / "runs" / name / f"seed-{self.settings.seed}"


def run_all(runs: Sequence[Run], out: Path, what: str, launch: Launch | None = None) -> dict[Run, dict[str, Any]]:
    """Executes the unfinished runs under one progress bar; returns the metrics of all runs.

    Each run writes the same files as ``finetune``, without checkpoints, and a log next to its directory. An
    interrupted run continues from its last checkpoint, with the number of threads that it began with. A run that fails
    is reported at once, and the others go on.

    Args:
        runs: all runs, finished or not.
        out: the directory that contains the directories of the runs.
        what: text at the start of the progress bar.
        launch: where the runs go; None for one after the other on this machine.

    Raises:
        TaskError: runs failed, or two runs would share a directory; the message names them.
        WriteError: the disk refuses; the other runs are stopped.
        KeyboardInterrupt: Ctrl-C; the running runs have written checkpoints.
    """
    directories = {run: run.directory(out) for run in runs}
    if len(set(directories.values())) < len(runs):
        raise TaskError(f"{what}: two of {sorted({run.label for run in runs})} would share a directory; rename one")
    done = dict.fromkeys(runs, 0.0)
    pool = pool_of(launch or Launch(), out, len(runs))
    failed: dict[Run, TaskError] = {}
    bar_format = "{desc}: {percentage:3.0f}%|{bar}| {n:.2f} of {total} runs [{elapsed}<{remaining}]{postfix}"
    with progress(what, len(runs), unit="runs", bar_format=bar_format) as shown:

        def show(run: Run, part: float) -> None:
            done[run] = part
            running = [str(one) for one in runs if 0 < done[one] < 1]
            more = [f"{len(running) - _NAMED} more"] if len(running) > _NAMED else []
            shown.note("; ".join(running[:_NAMED] + more))
            shown.set(sum(done.values()))

        def carry_out(run: Run) -> dict[str, Any] | None:
            metrics = finished(run, out)
            try:
                if metrics is None:
                    metrics = _carry_out(run, out, pool, ending, lambda part: show(run, min(part, 0.999)))
                    advise(metrics)
                if (line := divergence(metrics)) is not None:
                    raise TaskError(f"training diverged: {line}")
                shutil.rmtree(directories[run] / "checkpoints", ignore_errors=True)
            except WriteError:
                raise
            except TaskError as error:
                failed[run] = error
                if len(runs) > 1:
                    tqdm.write(f"{run} failed: {error}", file=sys.stderr)
            show(run, 1.0)
            return metrics

        def advise(metrics: Mapping[str, Any]) -> None:
            if advised or not isinstance(pool, LocalPool):
                return
            line = busy_machine.advice(pool.threads, _step_seconds(metrics))
            if line is not None:
                advised.append(line)
                tqdm.write(line, file=sys.stderr)

        ending, advised = Event(), []
        if pool.needs_threads:
            metrics = _in_threads(carry_out, runs, pool, ending)
        else:
            metrics = {run: carry_out(run) for run in runs}
    if failed:
        reasons = "; ".join(f"{run}: {error}" for run, error in failed.items())
        raise TaskError(f"{len(failed)} of {len(runs)} runs failed; --resume repeats them: {reasons}")
    return metrics


def _in_threads(carry_out: Callable[[Run], Any], runs: Sequence[Run], pool: Pool, ending: Event) -> dict[Run, Any]:
    """Calls ``carry_out`` for several runs at once; an error ends the others."""
    with ThreadPoolExecutor(pool.at_once) as threads:
        futures = {run: threads.submit(carry_out, run) for run in runs}
        try:
            ended, _ = wait(futures.values(), return_when=FIRST_EXCEPTION)
            for future in ended:
                future.result()
            return {run: future.result() for run, future in futures.items()}
        except BaseException:
            ending.set()
            while True:
                try:
                    pool.end()  # after a second Ctrl-C again, which stops the runs without a checkpoint
                    threads.shutdown(cancel_futures=True)
                    break
                except KeyboardInterrupt:
                    continue
            raise


_NAMED = 3  # runs that the display names at a time

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
        same = is_same_run(Settings(**checked_options(metrics["settings"])), run.settings, out)
        scores = [metrics["after"], *([metrics["validation"]] if metrics["validation"] else [])]
        figures = [metrics[name] for name in _FIGURES]
        figures += [score[name] for score in scores for name in ("accuracy", "macro_f1")]
        whole = all(type(figure) in (int, float) for figure in figures) and isinstance(metrics["examples"]["test"], int)
    except (OSError, ValueError, KeyError, TypeError, AttributeError, TaskError):
        return None
    return metrics if whole and same and metrics.get("data_sha256") in (None, run.data_sha256) else None


def _carry_out(run: Run, out: Path, pool: Pool, ending: Event, on_progress: Callable[[float], None]) -> dict[str, Any]:
    directory = run.directory(out)
    log = directory.with_name(f"{directory.name}.log")
    can_resume = _can_resume(run, directory)

    def prepare() -> None:
        with writing(directory):
            if not can_resume and directory.exists():
                shutil.rmtree(directory)
                log.unlink(missing_ok=True)
            directory.parent.mkdir(parents=True, exist_ok=True)

    threads = saved_threads(directory) if can_resume else None
    how = {"log": log, "threads": threads or pool.threads, "on_progress": on_progress, "ending": ending}
    pool.call(_finetune, run, directory.resolve(), pool.runs_here, prepare=prepare, **how)
    metrics = finished(run, out)
    if metrics is None:
        raise TaskError(
            f"{directory} lacks complete metrics of the run that has just ended there, of the same texts; see {log}"
        )
    return metrics


def _can_resume(run: Run, directory: Path) -> bool:
    try:
        return Settings.load(directory) == run.settings and saved_fingerprint(directory) in (None, run.data_sha256)
    except TaskError:
        return False


def _finetune(run: Run, directory: Path, runs_here: int, on_progress: Callable[[float], None]) -> None:
    from lora_ext.tasks.finetune.run import finetune

    resume = _can_resume(run, directory)  # here: a job is started again after its time limit
    finetune(run.settings, directory, resume=resume, measure=False, runs_at_once=runs_here, on_progress=on_progress)
