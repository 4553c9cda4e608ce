"""Selects the weights that a run keeps, and weights the classes in its loss."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from transformers import TrainerState

from lora_ext.tasks import TaskError
from lora_ext.tasks.finetune.settings import Settings
from lora_ext.tasks.finetune.trainer import FinetuneTrainer


def check_has_validation(settings: Settings, texts: int) -> None:
    """Raises TaskError if ``settings`` choose weights by validation texts and there are none."""
    if settings.best_metric is not None and texts == 0:
        raise TaskError(
            f"--best-metric {settings.best_metric}: there are no validation texts to measure it on; want a "
            "--validation-split above 0, or a --validation-file"
        )


def balanced(classes: np.ndarray, num_labels: int) -> torch.Tensor:
    """Returns ``texts / (num_labels * texts of the class)`` for each class, float32: scikit-learn's "balanced" weights.

    Their mean over the texts is 1, so that the learning rate need not change.

    Args:
        classes: class indices of the training texts; every class occurs.
    """
    counts = np.bincount(classes, minlength=num_labels)
    return torch.from_numpy(len(classes) / (num_labels * counts)).float()


def best_of(trainer: FinetuneTrainer, metric: str | None) -> dict[str, Any]:
    """Returns the entries of metrics.json on the best evaluation; none without ``--best-metric``."""
    if metric is None:
        return {}
    state = trainer.state
    epochs = {entry["step"]: entry["epoch"] for entry in state.log_history}
    step = state.best_global_step or state.global_step  # no evaluation was a number: the last weights are kept
    best = {"metric": metric, "value": state.best_metric, "step": step, "epoch": epochs.get(step)}
    return {"best": best, "steps": state.global_step, "stopped_early": trainer.progress.stopped}


def kept_validation(state: TrainerState, names: Sequence[str]) -> dict[str, float] | None:
    """Returns the validation scores ``names`` of the weights that the run keeps; None: it had no validation.

    Checkpoints of earlier releases may lack some.
    """
    kept = [entry for entry in state.log_history if entry["step"] == (state.best_global_step or entry["step"])]
    found = [{name: entry[f"eval_{name}"] for name in names if f"eval_{name}" in entry} for entry in kept]
    return next((scores for scores in reversed(found) if scores), None)
