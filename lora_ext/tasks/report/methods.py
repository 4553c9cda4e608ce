"""The section on ``compare``: the table of methods, accuracy against parameters, and the costs of each method."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

from lora_ext.tasks.comparison.spread import deviation_over, lines_of, named_rows, over_seeds, percent, winner
from lora_ext.tasks.finetune.settings import has_option
from lora_ext.tasks.report.charts import Bar, Chart, Point, Series, bar_chart, line_chart
from lora_ext.tasks.report.classes import confusion_matrix, f1_by_method
from lora_ext.tasks.report.pictures import Pictures, curves_of_runs
from lora_ext.tasks.report.results import Result
from lora_ext.tasks.report.tables import Table, cell, count, table


def show_methods(result: Result, pictures: Pictures) -> dict[str, Any]:
    """Returns the section's content."""
    content = result.content
    rows = content["methods"]
    best = winner({row["label"]: row["accuracy"] for row in rows})
    runs = _runs(content)
    return {
        "reading": _reading(content, best),
        "left_out": [f"{method['label']}: {method['reason']}" for method in content.get("left_out") or ()],
        "methods": _table(content, best),
        "f1_of_classes": f1_by_method(rows),
        "confusions": _confusions(content),
        "names": [f"{label}: {spec}" for label, spec in named_rows(rows).items()],
        "seeds": deviation_over(content["seeds"]),
        "test": content["examples"]["test"],
        "head": rows[0]["head_parameters"],
        "base_ms": content["base_forward_ms"]["median"],
        "at_once": max(row.get("runs_at_once", 1) for row in rows),
        "accuracy": _accuracy_chart(rows, content["seeds"]),
        "reading_costs": _reading_costs(content),
        "costs": _costs(content),
        "runs": runs,
        "num_runs": count(len(runs.rows), "run"),
        "times": _times(content),
        **_settings(rows),
        "curves_of_runs": curves_of_runs(result, pictures),
    }


# --- what the figures say ---------------------------------------------------------------------------------------------


def not_behind(summaries: Mapping[Any, Mapping[str, Any]]) -> list[Any]:
    """Returns the keys whose mean is at most the spread ``sqrt(sd ** 2 + sd_best ** 2)`` behind the best one's.

    Empty where there is no spread, as with single seeds.
    """
    if any(scores["sd"] is None for scores in summaries.values()):
        return []
    best = max(summaries.values(), key=lambda scores: scores["mean"])
    return [
        key
        for key, scores in summaries.items()
        if best["mean"] - scores["mean"] <= math.hypot(best["sd"], scores["sd"]) or scores is best
    ]


def _reading(content: Mapping[str, Any], best: str | None) -> list[str]:
    rows = content["methods"]
    if len(rows) < 2:
        return [f"Only {rows[0]['label']} was trained: {percent(rows[0]['accuracy'])} % of the test texts are right."]
    if len(content["seeds"]) < 2:
        return ["Each method was trained from one seed: the spread is unknown, so no method is marked."]
    if best is not None:
        sentences = [f"{best} is ahead of every other method by more than the spread over seeds, and is marked."]
    else:
        sentences = ["No method is ahead of every other by more than the spread over seeds, so no method is marked."]
    by_label = {row["label"]: row for row in rows}
    level = not_behind({row["label"]: row["accuracy"] for row in rows})
    fewest = min(level, key=lambda label: _own_parameters(by_label[label]))
    if len(level) > 1:
        sentences.append(
            f"Of the {len(level)} methods within the spread of the best, {fewest} trains the fewest parameters: "
            f"{_own_parameters(by_label[fewest]):,} in addition to the head."
        )
    lora = next((row for row in rows if row["method"] == "lora"), None)
    full = next((row for row in rows if row["method"] == "full"), None)
    if lora and full:
        share = lora["trained_parameters"] / full["trained_parameters"]
        sentences.append(f"{lora['label']} trains {share:.2%} of the parameters that {full['label']} trains.")
    return sentences


def _reading_costs(content: Mapping[str, Any]) -> list[str]:
    rows = content["methods"]
    sentences = []
    if len(rows) > 1:
        low, high = (choose(rows, key=lambda row: row["step_ms"]["median"]) for choose in (min, max))
        sentences.append(
            f"A training step takes from {low['step_ms']['median']:.1f} ms ({low['label']}) to "
            f"{high['step_ms']['median']:.1f} ms ({high['label']}); where quartiles overlap, both may be equal."
        )
        small, large = (choose(rows, key=lambda row: row["checkpoint_bytes"]) for choose in (min, max))
        ratio = large["checkpoint_bytes"] / small["checkpoint_bytes"]
        if ratio > 1:
            times = f"{ratio:,.{0 if ratio >= 10 else 1}f} times"
            sentences.append(f"The checkpoint of {large['label']} is {times} as large as that of {small['label']}.")
    if merged := [row for row in rows if "merged_forward_ms" in row]:
        row, base = merged[0], content["base_forward_ms"]
        times = row["merged_forward_ms"]
        if times["q1"] <= base["q3"] and times["q3"] >= base["q1"]:
            sentences.append(f"Merged, {row['label']} is as fast as the base model within the quartiles.")
    return sentences


# --- tables and charts ------------------------------------------------------------------------------------------------


def _own_parameters(row: Mapping[str, Any]) -> int:
    return row["trained_parameters"] - row["head_parameters"]


def _table(content: Mapping[str, Any], best: str | None) -> Table:
    heading = ["method", "own parameters", "trained", "accuracy, %", "macro-F1, %", "step, ms", "training, s"]
    heading += ["peak memory, MiB", "checkpoint, MB", "forward", "merged"]
    base = content["base_forward_ms"]["median"]
    rows = []
    for row in content["methods"]:
        share = row["trained_parameters"] / row["total_parameters"]
        merged = row.get("merged_forward_ms")
        rows.append(
            [
                row["label"],
                _own_parameters(row),
                cell(share, f"{share:.2%}"),
                cell(row["accuracy"]["mean"], percent(row["accuracy"]), row["label"] == best),
                cell(row["macro_f1"]["mean"], percent(row["macro_f1"])),
                cell(row["step_ms"]["median"], f"{row['step_ms']['median']:.1f}"),
                cell(row["train_seconds"]["mean"], f"{row['train_seconds']['mean']:.1f}"),
                cell(row["peak_memory_bytes"]["mean"], f"{row['peak_memory_bytes']['mean'] / 2**20:,.0f}"),
                cell(row["checkpoint_bytes"], f"{row['checkpoint_bytes'] / 1e6:.3g}"),
                cell(row["forward_ms"]["median"], f"{row['forward_ms']['median'] / base:.2f}"),
                cell(merged["median"], f"{merged['median'] / base:.2f}") if merged else None,
            ]
        )
    return table("Methods", heading, rows)


def _confusions(content: Mapping[str, Any]) -> list[Table]:
    """Returns the confusion matrix of each method, summed over the seeds."""
    found, seeds = [], content["seeds"]
    seeds = f"seed {seeds[0]}" if len(seeds) == 1 else f"sum over {len(seeds)} seeds"
    for row in content["methods"]:
        if "confusion" in row:
            labels = [one["label"] for one in row["classes"]]
            caption = f"Confusion matrix of {row['label']}: {seeds}"
            found.append(confusion_matrix(caption, labels, row["confusion"]))
    return [matrix for matrix in found if matrix is not None]


def _accuracy_chart(rows: Sequence[Mapping[str, Any]], seeds: Sequence[int]) -> Chart:
    series = []
    for name, line in lines_of(rows).items():
        points = []
        for row in line:
            mean, sd = 100 * row["accuracy"]["mean"], 100 * (row["accuracy"]["sd"] or 0.0)
            title = f"{row['label']}: {percent(row['accuracy'])} %, {row['trained_parameters']:,} parameters"
            points.append(Point(row["trained_parameters"], mean, title, mean - sd, mean + sd))
        series.append(Series(name, points))
    return line_chart(
        f"Test accuracy by trained parameters: {over_seeds(seeds)}.",
        series,
        x_label="trained parameters, with the head",
        y_label="test accuracy, %",
        x_log=True,
    )


def _costs(content: Mapping[str, Any]) -> list[Chart]:
    rows = content["methods"]
    # The colours are those of the chart above.
    colours = {row["label"]: number for number, line in enumerate(lines_of(rows).values()) for row in line}

    def bar(label: str, value: float, text: str, times: Mapping[str, float] | None = None, suffix: str = "") -> Bar:
        name = label + suffix
        quartiles = (times["q1"], times["q3"]) if times else None
        return Bar(name, [(value, f"{name}: {text}")], text, quartiles, colours.get(label))

    def timed(label: str, times: Mapping[str, float], suffix: str = "") -> Bar:
        return bar(label, times["median"], f"{times['median']:.1f} ms", times, suffix)

    forwards = [timed("base model", content["base_forward_ms"])]
    for row in rows:
        forwards.append(timed(row["label"], row["forward_ms"]))
        if "merged_forward_ms" in row:
            forwards.append(timed(row["label"], row["merged_forward_ms"], ", merged"))
    memory = {row["label"]: row["peak_memory_bytes"]["mean"] for row in rows}
    kept = {row["label"]: row["checkpoint_bytes"] for row in rows}
    return [
        bar_chart(
            "One training step of a batch of median length: median and quartiles.",
            [timed(row["label"], row["step_ms"]) for row in rows],
        ),
        bar_chart("A forward of a batch of the longest texts: median and quartiles.", forwards),
        bar_chart(
            "Peak memory of the run's process, with Python and PyTorch: mean over seeds.",
            [bar(label, size, f"{size / 2**20:,.0f} MiB") for label, size in memory.items()],
        ),
        bar_chart("Checkpoint size.", [bar(label, size, f"{size / 1e6:.3g} MB") for label, size in kept.items()]),
    ]


def _runs(content: Mapping[str, Any]) -> Table:
    keys = ["accuracy", "macro_f1", "validation_accuracy", "train_seconds", "peak_memory_bytes"]
    heading = ["accuracy, %", "macro-F1, %", "validation accuracy, %", "training, s", "peak memory, MiB"]
    rows = []
    for row in content["methods"]:
        for i, seed in enumerate(content["seeds"]):
            values = [row[key] and row[key]["values"][i] for key in keys]
            *shares, seconds, size = values
            shown = [cell(share, "" if share is None else f"{100 * share:.2f}") for share in shares]
            shown += [cell(seconds, f"{seconds:.1f}"), cell(size, f"{size / 2**20:,.1f}")]
            rows.append([row["label"], seed, *shown])
    return table("Every run", ["method", "seed", *heading], rows)


def _settings(rows: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Returns a table of the settings that differ between methods, and the settings that are the ``same`` for all."""
    settings = {row["label"]: own_settings(row["settings"]) for row in rows}
    names = dict.fromkeys(name for chosen in settings.values() for name in chosen if name not in ("seed", "method"))
    values = {
        name: {repr(chosen[name]): chosen[name] for chosen in settings.values() if name in chosen} for name in names
    }
    same = {name: next(iter(found.values())) for name, found in values.items() if len(found) == 1}
    others = [name for name in names if name not in same]
    apart = [[label, *(chosen.get(name) for name in others)] for label, chosen in settings.items()]
    return {
        "same": {name: value for name, value in same.items() if value is not None},
        "differing": table("Settings in which the methods differ", ["method", *others], apart) if others else None,
    }


def _times(content: Mapping[str, Any]) -> Table:
    columns = {"step_ms": "step", "forward_ms": "forward", "merged_forward_ms": "merged forward"}
    rows = [
        [
            row["label"],
            name,
            *(cell(row[key][quantile], f"{row[key][quantile]:.2f}") for quantile in ("q1", "median", "q3")),
        ]
        for row in [*content["methods"], {"label": "base model", "forward_ms": content["base_forward_ms"]}]
        for key, name in columns.items()
        if key in row
    ]
    return table("Times, ms", ["method", "of a", "lower quartile", "median", "upper quartile"], rows)


def own_settings(settings: Mapping[str, Any]) -> dict[str, Any]:
    """Returns the settings that the method uses."""
    return {name: value for name, value in settings.items() if has_option(settings["method"], name)}
