"""The results of a run: predictions, the plot of the loss, and the table on the console."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from lora_ext.tasks.finetune.data import Example, shown_names
from lora_ext.tasks.finetune.scores import class_line
from lora_ext.tasks.shared.run_figures import costs, latencies, parameters_trained
from lora_ext.tasks.shared.whole_files import write_picture, write_whole


def write_predictions(
    path: Path, examples: list[Example], logits: np.ndarray, expected: np.ndarray, labels: list[str]
) -> None:
    """Writes one JSON object per text: input line, text, label, predicted label, logits in the order of ``labels``."""
    lines = []
    for example, scores, label in zip(examples, logits, expected, strict=True):
        row = {
            "line": example.line,
            "text": example.text,
            "label": labels[label],
            "predicted": labels[int(scores.argmax())],
            "logits": [float(score) for score in scores],
        }
        lines.append(json.dumps(row, ensure_ascii=False) + "\n")
    write_whole(path, "".join(lines))


def plot_loss(path: Path, history: list[dict[str, float]], title: str) -> None:
    """Plots the training loss, and the validation loss if any, by epoch. ``history`` is the Trainer's log."""
    from matplotlib.figure import Figure  # here, because showing existing results does not need matplotlib

    figure = Figure(figsize=(7, 4))  # a constrained layout draws everything twice
    figure.subplots_adjust(left=0.1, right=0.97, bottom=0.13, top=0.91)
    axes = figure.subplots()
    for key, label, style in (("loss", "training", "-"), ("eval_loss", "validation", "o--")):
        points = [(entry["epoch"], float(entry[key])) for entry in history if key in entry]
        if points:
            axes.plot(*zip(*points, strict=True), style, label=label)
    axes.set(xlabel="epoch", ylabel="cross-entropy loss", title=title, ylim=(0, None))
    axes.grid(alpha=0.3)
    axes.legend()
    write_picture(path, figure)


_MOST_CLASSES = 20  # on the console; metrics.json has all


def table(metrics: Mapping[str, Any]) -> str:
    """Formats the figures of ``metrics.json`` for the console."""
    classes = metrics["after"].get("classes", [])
    rows = figures(metrics)
    rows += [(f"  {shown_names([one['label']])}", class_line(one)) for one in classes[:_MOST_CLASSES]]
    if len(classes) > _MOST_CLASSES:
        rows.append(("", f"and {len(classes) - _MOST_CLASSES:,} more classes"))
    return "\n".join(f"  {name:<20} {value}" for name, value in rows)


def figures(metrics: Mapping[str, Any]) -> list[tuple[str, str]]:
    """Returns name and text of every figure of ``metrics.json`` that people read."""
    after, merged = metrics["after"], metrics.get("merged")
    compared = {"accuracy": "", "macro_f1": ""}
    if "majority" in metrics:
        most = metrics["majority"]
        compared = {
            "accuracy": f"; always {most['label']!r}: {most['accuracy']:.2%}",
            "macro_f1": f"; {most['macro_f1']:.3f}",
        }
    if "weighted_f1" in after:
        compared["weighted_f1"] = f"; {metrics['majority']['weighted_f1']:.3f}" if "majority" in metrics else ""
    rows = [
        parameters_trained(metrics),
        ("test accuracy", f"{after['accuracy']:.2%}{compared['accuracy']}"),
        ("test macro-F1", f"{after['macro_f1']:.3f}{compared['macro_f1']}"),
        *(
            [("test weighted F1", f"{after['weighted_f1']:.3f}{compared['weighted_f1']}")]
            if "weighted_f1" in after
            else []
        ),
        *costs(metrics),
    ]
    if merged is not None and "texts" in merged:
        same, texts, difference = merged["same_answers"], merged["texts"], merged["max_logit_difference"]
        same = "the same answers" if same == texts else f"{same} of the answers the same"
        rows.append(("merged", f"{same} on the {texts} longest test texts; logits differ by at most {difference:.1e}"))
    if (line := divergence(metrics)) is not None:
        rows.insert(0, ("training diverged", line))
    return rows + latencies(metrics)


def divergence(metrics: Mapping[str, Any]) -> str | None:
    """Says that logits are NaN or infinite: the first class then counts as the answer."""
    if not (texts := metrics.get("diverged")):
        return None
    return f"no finite outputs on {texts} of {metrics['examples']['test']} test texts; lower --learning-rate"
