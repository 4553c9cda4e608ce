"""Rows of a table of trained methods: scores over seeds, kept in a committed table and continued on any machine.

A row names what was trained (``name``, ``learning_rate``, ``epochs``), the ``seeds``, a summary of each score over
them, which test texts each seed answers right (``right``, packed bits in base64, None if not kept) and where and when
its newest seed was measured.
"""

from __future__ import annotations

import base64
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from harness.paired import correct_answers, paired_difference
from lora_ext.tasks.comparison.spread import summary
from lora_ext.tasks.shared import provenance

_SCORES = ("accuracy", "macro_f1", "weighted_f1")
_COSTS = ("train_seconds", "peak_memory_bytes")
_ONCE = ("trained_parameters", "head_parameters", "total_parameters")


def measured_here() -> str:
    """Returns this machine and today's date, in a line."""
    return provenance.measured_on({"machine": provenance.machine(), **provenance.made_by()})


def key(row: Mapping[str, Any]) -> tuple[str, float, float]:
    """Returns what makes two rows one: the name, the learning rate and the epochs."""
    return row["name"], row["learning_rate"], row["epochs"]


def row_of(
    name: str, rate: float, epochs: float, runs: Mapping[Path, Mapping[str, Any]], measured_on: str
) -> dict[str, Any]:
    """Returns a row from the metrics of finished runs, which differ in the seed, by their directories."""
    metrics = [*runs.values()]
    labels = [one["label"] for one in metrics[0]["after"]["classes"]]
    return {
        "name": name,
        "learning_rate": rate,
        "epochs": epochs,
        "seeds": [run["settings"]["seed"] for run in metrics],
        "trained_parameters": metrics[0]["trainable_parameters"],
        "head_parameters": metrics[0]["head_parameters"],
        "total_parameters": metrics[0]["total_parameters"],
        **{score: summary([run["after"][score] for run in metrics]) for score in _SCORES},
        "f1": {label: summary([run["after"]["classes"][i]["f1"] for run in metrics]) for i, label in enumerate(labels)},
        **{cost: summary([run[cost] for run in metrics]) for cost in _COSTS},
        "right": [_packed(answers) for answers in correct_answers([*runs])],
        "measured_on": measured_on,
    }


def merged(kept: Mapping[str, Any] | None, new: Mapping[str, Any] | None) -> dict[str, Any]:
    """Returns one row with the seeds of both, of which one may be None; a seed that both have is taken from ``new``."""
    rows = [row for row in (new, kept) if row is not None]
    places = {seed: (row, i) for row in reversed(rows) for i, seed in enumerate(row["seeds"])}
    places = dict(sorted(places.items()))

    def over_seeds(*path: str) -> dict[str, Any]:
        values = []
        for row, place in places.values():
            found: Any = row
            for name in path:
                found = found[name]
            values.append(found["values"][place])
        return summary(values)

    first = rows[0]
    return {
        **{name: first[name] for name in ("name", "learning_rate", "epochs")},
        "seeds": [*places],
        **{name: first[name] for name in _ONCE},
        **{score: over_seeds(score) for score in _SCORES},
        "f1": {label: over_seeds("f1", label) for label in first["f1"]},
        **{cost: over_seeds(cost) for cost in _COSTS},
        "right": [row["right"][place] for row, place in places.values()],
        "measured_on": first["measured_on"],
    }


def add_differences(rows: Sequence[dict[str, Any]], texts: int, baseline: str = "full") -> None:
    """Adds ``accuracy_minus_full``: the accuracy minus that of the row ``baseline`` after as many epochs.

    The interval is that of :func:`~harness.paired.paired_difference` if both rows keep their answers (``paired``), and
    otherwise a normal one for two independent sets of ``texts`` test texts, which is wider. A difference of the same
    seeds (``of_seeds``) stays.
    """
    full = {row["epochs"]: row for row in rows if row["name"] == baseline}
    for row in rows:
        other = full.get(row["epochs"])
        if other is None or row is other:
            continue
        of_seeds = [row["seeds"], other["seeds"]]
        if row.get("accuracy_minus_full", {}).get("of_seeds") == of_seeds:
            continue
        answers = [_answers(one, texts) for one in (row, other)]
        if None in answers:
            difference = _unpaired(row["accuracy"], other["accuracy"], texts) | {"paired": False}
        else:
            difference = paired_difference(*answers) | {"paired": True}
        row["accuracy_minus_full"] = difference | {"of_seeds": of_seeds}


def _unpaired(first: Mapping[str, Any], second: Mapping[str, Any], texts: int) -> dict[str, float]:
    variance = 0.0
    for one in (first, second):
        variance += one["mean"] * (1 - one["mean"]) / texts + (one["sd"] or 0.0) ** 2 / len(one["values"])
    mean, half = first["mean"] - second["mean"], 1.96 * math.sqrt(variance)
    return {"mean": mean, "low": mean - half, "high": mean + half}


def _packed(answers: Tensor) -> str:
    bits = torch.nn.functional.pad(answers.to(torch.uint8), (0, -len(answers) % 8)).view(-1, 8)
    sums = (bits << torch.arange(8, dtype=torch.uint8)).sum(1, dtype=torch.uint8)
    return base64.b64encode(bytes(sums.tolist())).decode()


def _answers(row: Mapping[str, Any], texts: int) -> Tensor | None:
    """Returns bool ``[seeds, texts]``, or None if a seed's answers were not kept."""
    if None in row["right"]:
        return None
    bytes_ = torch.tensor([list(base64.b64decode(one)) for one in row["right"]], dtype=torch.uint8)
    return ((bytes_[:, :, None] >> torch.arange(8, dtype=torch.uint8)) & 1).bool().flatten(1)[:, :texts]
