"""The table of ``lora-ext compare``: mean, spread, and paired intervals against the baseline."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any

import numpy as np

from lora_ext.commands.options import CommandError
from lora_ext.commands.results import markdown

_RESAMPLES = 2000


def table_rows(done: Sequence[tuple[Any, dict[str, Any]]], metric: str, baseline: str | None) -> list[dict[str, Any]]:
    """Returns a row of compare.json for each label, in the order of the specs.

    Args:
        done: the runs and their metrics.json.
        metric: ``accuracy`` or ``perplexity``.
        baseline: the label that others are compared with; None: the first.
    """
    by_label: dict[str, list[tuple[Any, dict[str, Any]]]] = {}
    for run, metrics in done:
        by_label.setdefault(run.label, []).append((run, metrics))
    base = by_label.get(baseline or next(iter(by_label)), [])
    return [_row(label, runs, base, metric) for label, runs in by_label.items()]


def _row(label: str, own: list[Any], base: list[Any], metric: str) -> dict[str, Any]:
    values = [metrics["test"][metric] for _, metrics in own]
    first_run, first = own[0]
    mean = lambda name: float(np.mean([metrics[name] for _, metrics in own]))  # noqa: E731
    row = {
        "label": label,
        "method": first["method"],
        "options": {**first_run.options, **{name: first["options"].get(name) for name in ("lora_r", "lora_targets")}},
        "seeds": [run.seed for run, _ in own],
        "mean": float(np.mean(values)),
        "spread": float(np.max(values) - np.min(values)),
        "values": values,
        **_difference(own, base, metric),
        "trainable_parameters": first["trainable_parameters"],
        **{name: mean(name) for name in ("train_seconds", "tokens_per_second", "peak_memory_bytes", "adapter_bytes")},
    }
    if metric == "accuracy":
        row["macro_f1"] = float(np.mean([metrics["test"]["macro_f1"] for _, metrics in own]))
    return row


def _difference(own: list[Any], base: list[Any], metric: str) -> dict[str, Any]:
    """Returns the mean difference over the seeds that both have, and a 95 % interval.

    The interval of accuracies is a bootstrap of test texts and seeds, paired by both: too narrow for few seeds.
    """
    before = {run.seed: (run, metrics) for run, metrics in base}
    pairs = [(run, metrics, *before[run.seed]) for run, metrics in own if run.seed in before]
    if not pairs or own is base:
        return {"difference": None, "interval": None}
    difference = float(np.mean([metrics["test"][metric] - other["test"][metric] for _, metrics, _, other in pairs]))
    if metric != "accuracy":
        return {"difference": difference, "interval": None}
    gains = [_correct(run) - _correct(other) for run, _, other, _ in pairs]
    if len({len(gain) for gain in gains}) > 1:
        raise CommandError(f"{pairs[0][0].out}: runs were tested on other texts than {pairs[0][2].out}")
    table = np.stack(gains)  # [seeds, texts]: 1: only ours is right, -1: only the baseline
    draw = np.random.default_rng(0)
    means = []
    for _ in range(_RESAMPLES):
        seeds = draw.integers(len(table), size=len(table))
        texts = draw.integers(table.shape[1], size=table.shape[1])
        means.append(table[seeds].mean(0)[texts].mean())
    low, high = np.quantile(means, (0.025, 0.975))
    return {"difference": difference, "interval": [float(low), float(high)]}


def _correct(run: Any) -> np.ndarray:
    """Returns 1 for each test text that ``run`` answers right, in the order of the texts."""
    lines = (run.out / "predictions.jsonl").read_text(encoding="utf-8").splitlines()
    answers = sorted((one["text"], one["label"], one["predicted"]) for one in map(json.loads, lines))
    return np.array([float(label == predicted) for _, label, predicted in answers])


def tabulate(rows: Sequence[dict[str, Any]], metric: str) -> tuple[list[str], list[list[str]], str]:
    """Returns the heading, the cells, and both as Markdown."""
    percent = metric == "accuracy"
    score = (lambda value: f"{100 * value:.2f}") if percent else (lambda value: f"{value:.2f}")
    heading = ["method", "seeds", "accuracy, %" if percent else "perplexity", "spread", "minus baseline (95 %)"]
    heading += ["macro-F1, %"] if percent else []
    heading += ["trained parameters", "training, s", "tokens/s", "peak memory, MiB", "on disk, MB"]
    cells = []
    for row in rows:
        difference = ""
        if row["difference"] is not None:
            scale = 100 if percent else 1
            difference = f"{scale * row['difference']:+.2f}"
            if row["interval"] is not None:
                difference += " ({:+.2f} to {:+.2f})".format(*(scale * bound for bound in row["interval"]))
        line = [row["label"], str(len(row["seeds"])), score(row["mean"]), score(row["spread"]), difference]
        line += [score(row["macro_f1"])] if percent else []
        line += [f"{row['trainable_parameters']:,}", f"{row['train_seconds']:.0f}", f"{row['tokens_per_second']:,.0f}"]
        line += [f"{row['peak_memory_bytes'] / 2**20:,.0f}", f"{row['adapter_bytes'] / 1e6:.2f}"]
        cells.append(line)
    return heading, cells, markdown(heading, cells)
