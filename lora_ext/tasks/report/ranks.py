"""What ``sweep`` found: LoRA by rank, and by which weights it adapts (tables 5 and 6 of the paper)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from lora_ext.tasks.comparison.spread import deviation_over, over_seeds, percent, winner
from lora_ext.tasks.report.facts import reproduce
from lora_ext.tasks.report.line_chart import Point, Series, line_chart
from lora_ext.tasks.report.markup import Html, bullets, cell, count, el, join, paragraph, table
from lora_ext.tasks.report.methods import not_behind
from lora_ext.tasks.report.pictures import Pictures, curves_of_runs
from lora_ext.tasks.report.results import Result

__all__ = ["show_ranks"]

_Cells = Mapping[tuple[int, str], Mapping[str, Any]]


def show_ranks(result: Result, pictures: Pictures) -> Html:
    """The section's content."""
    content = result.content
    cells = {(each["r"], each["target_modules"]): each for each in content["cells"]}
    return join(
        [
            el(
                "p",
                f"{deviation_over(content['seeds'])}: test accuracy in percent, on "
                f"{content['examples']['test']:,} texts. Marked is what is ahead of every other of its row (in the "
                "second table: of its column) by more than the spread, the root of the sum of both squared deviations.",
            ),
            el("h3", "Ranks"),
            bullets(_reading_ranks(content, cells)),
            _rank_table(content, cells),
            _rank_chart(content, cells),
            el("h3", f"Which weights, at {content['budget']:,} parameters"),
            paragraph(*_reading_weights(content)),
            _weights_table(content),
            _details(content),
            curves_of_runs(result, pictures),
            reproduce(result),
        ]
    )


def _of_target(content: Mapping[str, Any], cells: _Cells, target: str) -> dict[int, Mapping[str, Any]]:
    return {rank: cells[rank, target]["accuracy"] for rank in content["ranks"]}


def _reading_ranks(content: Mapping[str, Any], cells: _Cells) -> list[str]:
    if len(content["seeds"]) < 2:
        return ["One seed: nothing says how far chance reaches, and no rank is marked."]
    lines = []
    for target in content["targets"] if len(content["ranks"]) > 1 else ():
        own = _of_target(content, cells, target)
        best = winner(own)
        if best is not None:
            lines.append(f"{target}: rank {best} is ahead of all the others.")
        else:
            level = not_behind(own)
            lines.append(
                f"{target}: no rank is ahead of all the others; the lowest that the spread does not tell from the best "
                f"is {min(level)}, of {', '.join(map(str, content['ranks']))}."
            )
    return lines


def _reading_weights(content: Mapping[str, Any]) -> list[str | None]:
    each_best = {each["target_modules"]: each["accuracy"] for each in content["within_budget"]}
    text = "Each set of weights gets the highest rank that keeps within the same number of parameters."
    if len(each_best) < 2 or len(content["seeds"]) < 2:
        return [text]
    best = winner(each_best)
    if best is not None:
        return [text, f"{best} is ahead of all the others."]
    return [text, "None is ahead of all the others: the seeds differ by as much as the choice of weights does."]


def _rank_table(content: Mapping[str, Any], cells: _Cells) -> Html:
    rows = []
    for target in content["targets"]:
        own = _of_target(content, cells, target)
        best = winner(own)
        first = content["ranks"][0]
        row = [el("code", target), cell(cells[first, target]["parameters"] // first)]
        rows.append([*row, *(cell(each["mean"], percent(each), rank == best) for rank, each in own.items())])
    heading = ["weights", "parameters a rank", *(f"r = {rank}" for rank in content["ranks"])]
    return table("Accuracy by rank, %", heading, rows)


def _rank_chart(content: Mapping[str, Any], cells: _Cells) -> Html:
    series = []
    for target in content["targets"]:
        points = []
        for rank, each in sorted(_of_target(content, cells, target).items()):
            mean, sd = 100 * each["mean"], 100 * (each["sd"] or 0.0)
            parameters = cells[rank, target]["parameters"]
            says = f"{target}, r = {rank}: {percent(each)} %, {parameters:,} parameters"
            points.append(Point(rank, mean, says, mean - sd, mean + sd))
        series.append(Series(target, points))
    return line_chart(
        f"Test accuracy by rank: {over_seeds(content['seeds'])}.",
        series,
        x_label="rank",
        y_label="test accuracy, %",
        x_log=True,
        x_ticks=sorted(content["ranks"]),
    )


def _weights_table(content: Mapping[str, Any]) -> Html:
    best = winner({each["target_modules"]: each["accuracy"] for each in content["within_budget"]})
    rows = []
    for each in content["within_budget"]:
        accuracy = cell(each["accuracy"]["mean"], percent(each["accuracy"]), each["target_modules"] == best)
        macro_f1 = cell(each["macro_f1"]["mean"], percent(each["macro_f1"]))
        rows.append([el("code", each["target_modules"]), cell(each["r"]), cell(each["parameters"]), accuracy, macro_f1])
    return table("Accuracy by weights", ["weights", "r", "parameters", "accuracy, %", "macro-F1, %"], rows)


def _details(content: Mapping[str, Any]) -> Html:
    lines = []
    for each in content["cells"]:
        for i, seed in enumerate(content["seeds"]):
            accuracy, macro_f1 = (each[key]["values"][i] for key in ("accuracy", "macro_f1"))
            shown = [cell(accuracy, f"{100 * accuracy:.2f}"), cell(macro_f1, f"{100 * macro_f1:.2f}")]
            lines.append(
                [el("code", each["target_modules"]), cell(each["r"]), cell(each["parameters"]), cell(seed), *shown]
            )
    options = [f"{name.replace('_', ' ')}: {value}" for name, value in content["options"].items() if value is not None]
    return el(
        "details",
        el("summary", f"{count(len(lines), 'run')} and their settings"),
        table("Every run", ["weights", "r", "parameters", "seed", "accuracy, %", "macro-F1, %"], lines),
        bullets(options),
    )
