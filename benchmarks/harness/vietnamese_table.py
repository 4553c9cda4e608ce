"""The table of benchmarks/vietnamese.py in Markdown."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from lora_ext.tasks.comparison.spread import percent
from lora_ext.tasks.shared.markdown import table

__all__ = ["markdown"]

SLIDES = (("full (slides)", "135,000,000", "96"), ("lora-qv (slides)", "887,811", "90"))
_OF_POINTS = """\
Minus full: accuracy minus full fine-tuning's after as many epochs, with a 95 % interval (bootstrap of test texts and
seeds; *: normal and without pairing the texts, because the answers of a run were not kept)."""


def markdown(result: Mapping[str, Any]) -> str:
    parts = ["# UIT-VSFC and the demo's reviews: full fine-tuning, LoRA and the other methods\n"]
    for task in result["tasks"]:
        labels = list(task["rows"][0]["f1"]) if task["rows"] else []
        heading = ["method", "epochs", "seeds", "rate", "trained", "accuracy, %", "minus full, points"]
        heading += ["macro-F1, %", "weighted F1, %"]
        heading += [f"F1 {label}, %" for label in labels] + ["training, s", "peak memory, MiB"]
        rows = []
        if task["name"] == "vsfc":
            rows += [
                [name, "", "", "", trained, accuracy] + [""] * (len(heading) - 6) for name, trained, accuracy in SLIDES
            ]
        for row in task["rows"]:
            shares = [percent(row["accuracy"]), _points(row.get("accuracy_minus_full"))]
            shares += [percent(row[key]) for key in ("macro_f1", "weighted_f1")]
            shares += [percent(row["f1"][label]) for label in labels]
            costs = [f"{row['train_seconds']['mean']:.0f}", f"{row['peak_memory_bytes']['mean'] / 2**20:,.0f}"]
            sizes = [f"{row['epochs']:g}", str(len(row["seeds"])), f"{row['learning_rate']:.1e}"]
            rows.append([row["name"], *sizes, f"{row['trained_parameters']:,}", *shares, *costs])
        sizes = ", ".join(f"{number:,} for {side}" for side, number in task["texts"].items())
        parts.append(f"## {task['name']}: {sizes}\n\n{table(heading, rows)}\n\n{_OF_POINTS}\n")
        tuned = [
            [one["method"], "; ".join(f"{rate}: {100 * score:.1f}" for rate, score in one["validation_scores"].items())]
            + [f"{one['train_seconds']:.0f}"]
            for one in task["tuning"]
        ]
        of_rates = "Learning rates: mean of validation accuracy and macro-F1 in percent, one epoch, seed 0."
        parts.append(f"{of_rates}\n\n{table(['method', 'rate: score', 'training, s'], tuned)}\n")
    if not result["complete"]:
        parts.append("Not complete: runs are missing.\n")
    lines = dict.fromkeys(row["measured_on"] for task in result["tasks"] for row in task["rows"])
    parts.append(f"`{' '.join(result['command'])}`\n\n" + "\n".join(lines) + "\n")
    return "\n".join(parts)


def _points(difference: Mapping[str, float] | None) -> str:
    if difference is None:
        return ""
    mean, low, high = (100 * difference[name] for name in ("mean", "low", "high"))
    return f"{mean:+.1f} ({low:+.1f} to {high:+.1f})" + ("" if difference["paired"] else " *")
