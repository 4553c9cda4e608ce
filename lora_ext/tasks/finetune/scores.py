"""Scores of a classifier's answers: accuracy, F1, and precision and recall of each class."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np


def accuracy(predicted: np.ndarray, expected: np.ndarray) -> float:
    """Returns the fraction of equal class indices; both ``[num_examples]``."""
    return float((predicted == expected).mean())


def macro_f1(predicted: np.ndarray, expected: np.ndarray) -> float:
    """Returns the mean F1 of the classes that occur; both ``[num_examples]``, class indices."""
    found = np.union1d(predicted, expected)
    return float(np.mean(_per_class(confusion(predicted, expected, int(found.max()) + 1))["f1"][found]))


def weighted_f1(predicted: np.ndarray, expected: np.ndarray) -> float:
    """Returns the mean F1, each class weighted by its number of texts; both ``[num_examples]``."""
    per_class = _per_class(confusion(predicted, expected, int(np.union1d(predicted, expected).max()) + 1))
    return float(np.average(per_class["f1"], weights=per_class["support"]))


def confusion(predicted: np.ndarray, expected: np.ndarray, classes: int) -> np.ndarray:
    """Counts ``[expected class, predicted class]``."""
    return np.bincount(expected * classes + predicted, minlength=classes**2).reshape(classes, classes)


def scores(predicted: np.ndarray, expected: np.ndarray, labels: Sequence[str]) -> dict[str, Any]:
    """Returns all scores as metrics.json has them.

    Args:
        predicted, expected: ``[num_examples]``, class indices.
        labels: names of the classes, by index.

    Returns:
        ``accuracy``, ``macro_f1``, ``weighted_f1``; ``classes``: ``label``, ``precision``, ``recall``, ``f1`` and
        ``support`` of each class (a class that is never answered has the precision 0); ``confusion``: for each expected
        class the counts by predicted class.
    """
    counts = confusion(predicted, expected, len(labels))
    per_class = {name: values.tolist() for name, values in _per_class(counts).items()}
    return {
        **summary_scores(predicted, expected),
        "classes": [
            {"label": label, **{name: values[index] for name, values in per_class.items()}}
            for index, label in enumerate(labels)
        ],
        "confusion": counts.tolist(),
    }


def summary_scores(predicted: np.ndarray, expected: np.ndarray) -> dict[str, float]:
    """Returns ``accuracy``, ``macro_f1`` and ``weighted_f1``."""
    kinds = {"accuracy": accuracy, "macro_f1": macro_f1, "weighted_f1": weighted_f1}
    return {name: score(predicted, expected) for name, score in kinds.items()}


def _per_class(counts: np.ndarray) -> dict[str, np.ndarray]:
    """Returns ``precision``, ``recall``, ``f1`` and ``support`` of each class, ``[classes]``; 0 for 0 / 0."""
    hits, expected, predicted = counts.diagonal(), counts.sum(1), counts.sum(0)
    return {
        "precision": hits / np.maximum(predicted, 1),
        "recall": hits / np.maximum(expected, 1),
        "f1": 2 * hits / np.maximum(predicted + expected, 1),
        "support": expected,
    }


def class_line(one: Mapping[str, Any]) -> str:
    """Formats an entry of ``classes`` for the console."""
    return (
        f"precision {one['precision']:.3f}, recall {one['recall']:.3f}, F1 {one['f1']:.3f} on {one['support']:,} texts"
    )
