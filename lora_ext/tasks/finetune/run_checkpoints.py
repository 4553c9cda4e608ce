"""Checkpoints of a run: when to write them, which ones to keep, and which one to resume from."""

from __future__ import annotations

import json
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

from transformers import TrainerState

from lora_ext.tasks import TaskError
from lora_ext.tasks.shared.whole_files import discard, remove_leftovers, whole_directory, writing

SECONDS = 120.0
"""Time between two checkpoints: the most work that a killed run loses, evaluations aside."""

PROGRESS = "Progress"
"""Key in the Trainer's state of what :class:`lora_ext.tasks.finetune.run_progress.RunProgress` saves."""

_SHARE = 10.0  # writing a checkpoint takes at most a tenth of the time between checkpoints
_KEPT = 2
_STATE = "trainer_state.json"


class RunCheckpoint(NamedTuple):
    """A checkpoint that the Trainer wrote, and its state."""

    path: Path
    state: TrainerState

    @property
    def is_last(self) -> bool:
        """True if no training remains: it belongs to the run's last step, or the run stopped early."""
        stopped = self.state.stateful_callbacks.get(PROGRESS, {}).get("stopped", False)
        return self.state.global_step >= self.state.max_steps or stopped

    @property
    def best(self) -> Path | None:
        """The checkpoint of the best evaluation so far; None if the run does not look for one, or had none yet."""
        step = self.state.best_global_step
        return path_of(self.path.parent, step) if step else None


class Clock:
    """Says when a checkpoint is due."""

    def __init__(self) -> None:
        self._since, self._took = time.monotonic(), 0.0

    def is_due(self) -> bool:
        return time.monotonic() - self._since >= max(SECONDS, _SHARE * self._took)

    @contextmanager
    def writing_one(self) -> Iterator[None]:
        start = time.monotonic()
        yield
        self._since = time.monotonic()
        self._took = self._since - start


@contextmanager
def new_checkpoint(directory: Path, step: int) -> Iterator[Path]:
    """Yields a directory for a checkpoint's files, which appears whole or not at all; then calls :func:`tidy`.

    Args:
        directory: the directory of all checkpoints.

    Raises:
        WriteError: the disk refuses. Existing checkpoints stay.
    """
    with writing(directory):
        remove_leftovers(directory)
    with whole_directory(path_of(directory, step)) as fresh:
        yield fresh
    tidy(directory)


def tidy(directory: Path) -> None:
    """Removes leftovers of killed processes, and all checkpoints except the last two and what these call the best.

    WriteError: the disk refuses.
    """
    with writing(directory):
        remove_leftovers(directory)
        paths = in_order(directory)
        best = {path_of(directory, step) for path in paths[-_KEPT:] if (step := _best_step(path)) is not None}
        for path in paths[:-_KEPT]:
            if path not in best:
                discard(path)


def path_of(directory: Path, step: int) -> Path:
    return directory / f"checkpoint-{step}"


def _best_step(path: Path) -> int | None:
    """Returns the step of the best evaluation that a checkpoint knows; None if it knows none or is damaged."""
    try:
        step = json.loads((path / _STATE).read_text(encoding="utf-8")).get("best_global_step")
    except (OSError, ValueError, AttributeError, RecursionError):
        return None
    return step if type(step) is int else None


def last_checkpoint(out: Path) -> RunCheckpoint | None:
    """Returns the newest checkpoint of the run in ``out``; None if there is none yet.

    Raises:
        TaskError: its state cannot be read.
    """
    paths = in_order(out / "checkpoints")
    if not paths:
        return None
    try:
        state = TrainerState(**json.loads((paths[-1] / _STATE).read_text(encoding="utf-8")))
        step, last = state.global_step, state.max_steps
        saved = (state.stateful_callbacks, state.stateful_callbacks.get(PROGRESS, {}))
        is_whole = isinstance(step, int) and isinstance(last, int) and isinstance(state.log_history, list)
        if not (is_whole and all(isinstance(one, dict) for one in saved)):
            raise ValueError(f"{_STATE} was not written by the Trainer")
    except (OSError, ValueError, TypeError, AttributeError, RecursionError) as error:
        raise damaged(paths[-1], error) from error
    return RunCheckpoint(paths[-1], state)


def damaged(path: Path | str, error: BaseException) -> TaskError:
    """Returns the error for a checkpoint that cannot be read."""
    if isinstance(error, PermissionError):
        return TaskError(f"--resume: {path} cannot be read: {error}")
    reason = str(error).splitlines()[0] if str(error) else type(error).__name__
    return TaskError(f"--resume: {path} cannot be read ({reason}); delete it to continue from the one before")


def in_order(directory: Path) -> list[Path]:
    """Returns the checkpoints in ``directory``, the newest last."""
    numbered = [path for path in directory.glob("checkpoint-*") if path.name.rpartition("-")[2].isdecimal()]
    return sorted(numbered, key=lambda path: int(path.name.rpartition("-")[2]))
