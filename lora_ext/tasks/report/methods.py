"""What ``compare`` found: the table of methods, accuracy against parameters, and what each method costs."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

from lora_ext.tasks.comparison.spread import deviation_over, lines_of, named_rows, over_seeds, percent, winner
from lora_ext.tasks.finetune.settings import has_option
from lora_ext.tasks.report.bars import Bar, bars
from lora_ext.tasks.report.facts import reproduce
from lora_ext.tasks.report.line_chart import Point, Series, line_chart
from lora_ext.tasks.report.markup import Cell, Html, bullets, cell, count, el, join, paragraph, table
from lora_ext.tasks.report.pictures import Pictures, curves_of_runs
from lora_ext.tasks.report.results import Result

__all__ = ["not_behind", "own_settings", "show_methods"]


def show_methods(result: Result, pictures: Pictures) -> Html:
    """The section's content."""
    content = result.content
    rows = content["methods"]
    best = winner({row["label"]: row["accuracy"] for row in rows})
    at_once = max(row.get("runs_at_once", 1) for row in rows)
    return join(
        [
            paragraph(*_reading(content, best)),
            _left_out(content),
            _table(content, best),
            _names(content),
            el(
                "p",
                f"{deviation_over(content['seeds'])}, on {content['examples']['test']:,} test texts. "
                f"“Own parameters” leaves out the new head ({rows[0]['head_parameters']:,}), which every method "
                "trains; “trained” is the share of all parameters, with it. A step is of a batch of median "
                "length, a forward of one of the longest texts: as a multiple of the base model's "
                f"{content['base_forward_ms']['median']:.1f} ms, as it was trained and merged into the weights. Times "
                "are medians of interleaved rounds; peak memory "
                "is that of each run's own process."
                + (
                    f" Seconds of training are of up to {at_once} runs at once, which shared the machine."
                    * (at_once > 1)
                ),
                class_="note",
            ),
            el("h3", "Accuracy and trained parameters"),
            el(
                "p",
                "Figure 2 of the LoRA paper: a point further to the left trains less, one further up is right more "
                "often. A bar reaches one standard deviation to each side; where two bars overlap, chance may be all "
                "that tells the points apart.",
            ),
            _accuracy_chart(rows, content["seeds"]),
            el("h3", "What each method costs"),
            paragraph(*_reading_costs(content)),
            _costs(content),
            _details(content),
            curves_of_runs(result, pictures),
            reproduce(result),
        ]
    )


# --- what one sees ----------------------------------------------------------------------------------------------------


def not_behind(summaries: Mapping[Any, Mapping[str, Any]]) -> list[Any]:
    """The keys whose mean is behind the best one's by no more than the spread ``sqrt(sd ** 2 + sd_best ** 2)``.

    Empty where there is no spread, as of single seeds.
    """
    if any(each["sd"] is None for each in summaries.values()):
        return []
    best = max(summaries.values(), key=lambda each: each["mean"])
    return [
        key
        for key, each in summaries.items()
        if best["mean"] - each["mean"] <= math.hypot(best["sd"], each["sd"]) or each is best
    ]


def _reading(content: Mapping[str, Any], best: str | None) -> list[str | None]:
    rows = content["methods"]
    if len(rows) < 2:
        return [f"{rows[0]['label']} alone was trained: {percent(rows[0]['accuracy'])} % of the test texts are right."]
    if len(content["seeds"]) < 2:
        return ["Each method was trained from one seed: nothing says how far chance reaches, and none is marked."]
    if best is not None:
        first = f"{best} is ahead of every other method by more than the spread over seeds, and marked."
    else:
        first = "No method is ahead of every other by more than the spread over seeds, so that none is marked."
    by_label = {row["label"]: row for row in rows}
    level = not_behind({row["label"]: row["accuracy"] for row in rows})
    fewest = min(level, key=lambda label: _own(by_label[label]))
    second = None
    if len(level) > 1:
        second = (
            f"Of the {len(level)} methods that the spread does not tell from the best, {fewest} trains the fewest "
            f"parameters: {_own(by_label[fewest]):,} beside the head."
        )
    lora = next((row for row in rows if row["method"] == "lora"), None)
    full = next((row for row in rows if row["method"] == "full"), None)
    third = None
    if lora and full:
        share = lora["trained_parameters"] / full["trained_parameters"]
        third = f"{lora['label']} trains {share:.2%} of the parameters that {full['label']} trains."
    return [first, second, third]


def _reading_costs(content: Mapping[str, Any]) -> list[str | None]:
    rows = content["methods"]
    sentences: list[str | None] = []
    if len(rows) > 1:
        by_step = sorted(rows, key=lambda row: row["step_ms"]["median"])
        low, high = by_step[0], by_step[-1]
        sentences.append(
            f"A training step takes from {low['step_ms']['median']:.1f} ms ({low['label']}) to "
            f"{high['step_ms']['median']:.1f} ms ({high['label']}); where quartiles overlap, two may take as long."
        )
        small, large = (f(rows, key=lambda row: row["checkpoint_bytes"]) for f in (min, max))
        ratio = large["checkpoint_bytes"] / small["checkpoint_bytes"]
        if ratio > 1:
            times = f"{ratio:,.{0 if ratio >= 10 else 1}f} times"
            sentences.append(
                f"What is kept for a task is {times} larger for {large['label']} than for {small['label']}."
            )
    if merged := [row for row in rows if "merged_forward_ms" in row]:
        row, base = merged[0], content["base_forward_ms"]
        own = row["merged_forward_ms"]
        apart = own["q1"] > base["q3"] or own["q3"] < base["q1"]
        if not apart:
            sentences.append(f"Merged, {row['label']} answers as fast as the base model, as far as the quartiles tell.")
    return sentences


# --- tables and charts ------------------------------------------------------------------------------------------------


def _left_out(content: Mapping[str, Any]) -> Html | None:
    if not content.get("left_out"):
        return None
    reasons = bullets(f"{each['label']}: {each['reason']}" for each in content["left_out"])
    return el("div", el("p", "Left out, as the checkpoint does not suit them:"), reasons)


def _names(content: Mapping[str, Any]) -> Html | None:
    """What the names stand for that the user gave to methods."""
    named = named_rows(content["methods"])
    return bullets(f"{label}: {spec}" for label, spec in named.items()) if named else None


def _own(row: Mapping[str, Any]) -> int:
    return row["trained_parameters"] - row["head_parameters"]


def _table(content: Mapping[str, Any], best: str | None) -> Html:
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
                cell(_own(row)),
                cell(share, f"{share:.2%}"),
                cell(row["accuracy"]["mean"], percent(row["accuracy"]), row["label"] == best),
                cell(row["macro_f1"]["mean"], percent(row["macro_f1"])),
                cell(row["step_ms"]["median"], f"{row['step_ms']['median']:.1f}"),
                cell(row["train_seconds"]["mean"], f"{row['train_seconds']['mean']:.1f}"),
                cell(row["peak_memory_bytes"]["mean"], f"{row['peak_memory_bytes']['mean'] / 2**20:,.0f}"),
                cell(row["checkpoint_bytes"], f"{row['checkpoint_bytes'] / 1e6:.3g}"),
                cell(row["forward_ms"]["median"], f"{row['forward_ms']['median'] / base:.2f}"),
                cell(merged["median"], f"{merged['median'] / base:.2f}") if merged else "",
            ]
        )
    return table("Methods", heading, rows)


def _accuracy_chart(rows: Sequence[Mapping[str, Any]], seeds: Sequence[int]) -> Html:
    series = []
    for name, own in lines_of(rows).items():
        points = []
        for row in own:
            mean, sd = 100 * row["accuracy"]["mean"], 100 * (row["accuracy"]["sd"] or 0.0)
            says = f"{row['label']}: {percent(row['accuracy'])} %, {row['trained_parameters']:,} parameters"
            points.append(Point(row["trained_parameters"], mean, says, mean - sd, mean + sd))
        series.append(Series(name, points))
    return line_chart(
        f"Test accuracy by trained parameters: {over_seeds(seeds)}.",
        series,
        x_label="trained parameters, head included",
        y_label="test accuracy, %",
        x_log=True,
    )


def _costs(content: Mapping[str, Any]) -> Html:
    rows = content["methods"]
    # The colours are those of the chart above.
    group = {row["label"]: index for index, own in enumerate(lines_of(rows).values()) for row in own}

    def timed(name: str, each: Mapping[str, float], colour: int | None) -> Bar:
        return Bar(name, [each["median"]], f"{each['median']:.1f} ms", each["q1"], each["q3"], colour)

    forwards = [timed("base model", content["base_forward_ms"], None)]
    for row in rows:
        forwards.append(timed(row["label"], row["forward_ms"], group[row["label"]]))
        if "merged_forward_ms" in row:
            forwards.append(timed(f"{row['label']}, merged", row["merged_forward_ms"], group[row["label"]]))
    memory = [(row, row["peak_memory_bytes"]["mean"]) for row in rows]
    return el(
        "div",
        bars(
            "One training step of a batch of median length: median and quartiles.",
            [timed(row["label"], row["step_ms"], group[row["label"]]) for row in rows],
        ),
        bars("A forward of a batch of the longest texts: median and quartiles.", forwards),
        bars(
            "Peak memory of the run's process, Python and PyTorch included: mean over seeds.",
            [Bar(row["label"], [size], f"{size / 2**20:,.0f} MiB", group=group[row["label"]]) for row, size in memory],
        ),
        bars(
            "Bytes to keep for the task.",
            [
                Bar(
                    row["label"],
                    [row["checkpoint_bytes"]],
                    f"{row['checkpoint_bytes'] / 1e6:.3g} MB",
                    group=group[row["label"]],
                )
                for row in rows
            ],
        ),
        class_="multiples",
    )


def _details(content: Mapping[str, Any]) -> Html:
    """Every run's figures, and the settings."""
    heading = [
        "method",
        "seed",
        "accuracy, %",
        "macro-F1, %",
        "validation accuracy, %",
        "training, s",
        "peak memory, MiB",
    ]
    lines = []
    for row in content["methods"]:
        validation = row["validation_accuracy"]
        for i, seed in enumerate(content["seeds"]):
            value = {
                key: row[key]["values"][i] for key in ("accuracy", "macro_f1", "train_seconds", "peak_memory_bytes")
            }
            valid = validation["values"][i] if validation else None
            lines.append(
                [
                    row["label"],
                    cell(seed),
                    cell(value["accuracy"], f"{100 * value['accuracy']:.2f}"),
                    cell(value["macro_f1"], f"{100 * value['macro_f1']:.2f}"),
                    Cell("") if valid is None else cell(valid, f"{100 * valid:.2f}"),
                    cell(value["train_seconds"], f"{value['train_seconds']:.1f}"),
                    cell(value["peak_memory_bytes"], f"{value['peak_memory_bytes'] / 2**20:,.1f}"),
                ]
            )
    settings = {row["label"]: own_settings(row["settings"]) for row in content["methods"]}
    names = list(dict.fromkeys(name for own in settings.values() for name in own if name not in ("seed", "method")))
    values = {name: {repr(own[name]): own[name] for own in settings.values() if name in own} for name in names}
    same = {name: next(iter(found.values())) for name, found in values.items() if len(found) == 1}
    others = [name for name in names if name not in same]
    apart = [[label, *(_setting(own.get(name)) for name in others)] for label, own in settings.items()]
    return el(
        "details",
        el("summary", f"{count(len(lines), 'run')} and their settings"),
        table("Every run", heading, lines),
        _times(content),
        table("Settings in which the methods differ", ["method", *others], apart) if others else None,
        el("p", "The same for all that have it:"),
        bullets(f"{name.replace('_', ' ')}: {value}" for name, value in same.items() if value is not None),
    )


def _times(content: Mapping[str, Any]) -> Html:
    columns = {"step_ms": "step", "forward_ms": "forward", "merged_forward_ms": "merged forward"}
    rows = [
        [row["label"], name, *(cell(row[key][each], f"{row[key][each]:.2f}") for each in ("q1", "median", "q3"))]
        for row in [*content["methods"], {"label": "base model", "forward_ms": content["base_forward_ms"]}]
        for key, name in columns.items()
        if key in row
    ]
    return table("Times, ms", ["method", "of a", "lower quartile", "median", "upper quartile"], rows)


def own_settings(settings: Mapping[str, Any]) -> dict[str, Any]:
    """Those of ``settings`` that change what its method does."""
    return {name: value for name, value in settings.items() if has_option(settings["method"], name)}


def _setting(value: Any) -> Any:
    return (
        cell(value)
        if isinstance(value, (int, float)) and not isinstance(value, bool)
        else ""
        if value is None
        else value
    )
