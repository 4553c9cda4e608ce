"""Scores of single classes on the page: precision, recall and F1, and the confusion matrix."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from lora_ext.tasks.comparison.spread import percent, summary
from lora_ext.tasks.report.tables import Table, cell, table

_MOST = 30  # classes in a matrix or a row of methods; a wider table helps no one


def class_scores(scores: Mapping[str, Any]) -> Table | None:
    """Returns a table with a row for each class; None for results of earlier releases, which lack them."""
    if "classes" not in scores:
        return None
    names = ("precision", "recall", "f1")
    rows = [
        [one["label"], *(cell(one[name], f"{one[name]:.3f}") for name in names), one["support"]]
        for one in scores["classes"]
    ]
    return table("Scores of each class on the test texts", ["class", "precision", "recall", "F1", "texts"], rows)


def confusion_matrix(caption: str, labels: Sequence[str], counts: Sequence[Sequence[int]]) -> Table | None:
    """Expected classes in rows, answered ones in columns, shaded by their share; None for more classes than fit."""
    if len(labels) > _MOST:
        return None
    if [len(row) for row in counts] != [len(labels)] * len(labels):
        raise ValueError(f"a confusion matrix of {len(counts)} rows for {len(labels)} classes")
    rows = []
    for label, row in zip(labels, counts, strict=True):
        shares = [number / max(sum(row), 1) for number in row]
        shown = [cell(n, f"{n:,} ({share:.0%})", share=share) for n, share in zip(row, shares, strict=True)]
        rows.append([label, *shown])
    return table(caption, ["expected \\ answered", *labels], rows)


def f1_by_method(rows: Sequence[Mapping[str, Any]]) -> Table | None:
    """Returns each class's F1 by method, over the seeds; None if a method lacks it or there are too many classes."""
    if any(row.get("classes") is None for row in rows) or len(rows[0]["classes"]) > _MOST:
        return None
    shown = []
    for row in rows:
        f1 = [summary(one["f1"]) for one in row["classes"]]
        shown.append([row["label"], *(cell(value["mean"], percent(value)) for value in f1)])
    return table("F1 of each class, %", ["method", *(one["label"] for one in rows[0]["classes"])], shown)
