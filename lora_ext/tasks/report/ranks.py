"""The section on ``sweep``: LoRA by rank, and by the weights that it adapts (tables 5 and 6 of the paper)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from markupsafe import Markup

from lora_ext.tasks.comparison.spread import deviation_over, over_seeds, percent, winner
from lora_ext.tasks.report.charts import Chart, Point, Series, line_chart
from lora_ext.tasks.report.methods import not_behind
from lora_ext.tasks.report.pictures import Pictures, curves_of_runs
from lora_ext.tasks.report.results import Result
from lora_ext.tasks.report.tables import Table, cell, count, table

_Cells = Mapping[tuple[int, str], Mapping[str, Any]]


def show_ranks(result: Result, pictures: Pictures) -> dict[str, Any]:
    """Returns the section's content."""
    content = result.content
    cells = {(setting["r"], setting["target_modules"]): setting for setting in content["cells"]}
    runs = _runs(content)
    return {
        "seeds": deviation_over(content["seeds"]),
        "test": content["examples"]["test"],
        "reading_ranks": _reading_ranks(content, cells),
        "ranks": _rank_table(content, cells),
        "accuracy": _rank_chart(content, cells),
        "budget": content["budget"],
        "reading_weights": _reading_weights(content),
        "weights": _weights_table(content),
        "runs": runs,
        "num_runs": count(len(runs.rows), "run"),
        "options": {name: value for name, value in content["options"].items() if value is not None},
        "curves_of_runs": curves_of_runs(result, pictures),
    }


def _of_target(content: Mapping[str, Any], cells: _Cells, target: str) -> dict[int, Mapping[str, Any]]:
    return {rank: cells[rank, target]["accuracy"] for rank in content["ranks"]}


def _code(text: str) -> Markup:
    return Markup("<code>{}</code>").format(text)


def _reading_ranks(content: Mapping[str, Any], cells: _Cells) -> list[str]:
    if len(content["seeds"]) < 2:
        return ["With one seed the spread is unknown, so no rank is marked."]
    lines = []
    for target in content["targets"] if len(content["ranks"]) > 1 else ():
        accuracies = _of_target(content, cells, target)
        best = winner(accuracies)
        if best is not None:
            lines.append(f"{target}: rank {best} is ahead of all others.")
        else:
            lines.append(
                f"{target}: no rank is ahead of all others; the lowest rank within the spread of the best is "
                f"{min(not_behind(accuracies))}, of {', '.join(map(str, content['ranks']))}."
            )
    return lines


def _reading_weights(content: Mapping[str, Any]) -> list[str]:
    accuracies = {setting["target_modules"]: setting["accuracy"] for setting in content["within_budget"]}
    text = "Each set of weights gets the highest rank that stays within the same number of parameters."
    if len(accuracies) < 2 or len(content["seeds"]) < 2:
        return [text]
    best = winner(accuracies)
    if best is not None:
        return [text, f"{best} is ahead of all others."]
    return [text, "None is ahead of all others: the seeds differ by as much as the sets of weights."]


def _rank_table(content: Mapping[str, Any], cells: _Cells) -> Table:
    rows = []
    for target in content["targets"]:
        accuracies = _of_target(content, cells, target)
        best = winner(accuracies)
        first = content["ranks"][0]
        row = [_code(target), cells[first, target]["parameters"] // first]
        rows.append(
            [*row, *(cell(scores["mean"], percent(scores), rank == best) for rank, scores in accuracies.items())]
        )
    heading = ["weights", "parameters per rank", *(f"r = {rank}" for rank in content["ranks"])]
    return table("Accuracy by rank, %", heading, rows)


def _rank_chart(content: Mapping[str, Any], cells: _Cells) -> Chart:
    series = []
    for target in content["targets"]:
        points = []
        for rank, scores in sorted(_of_target(content, cells, target).items()):
            mean, sd = 100 * scores["mean"], 100 * (scores["sd"] or 0.0)
            title = f"{target}, r = {rank}: {percent(scores)} %, {cells[rank, target]['parameters']:,} parameters"
            points.append(Point(rank, mean, title, mean - sd, mean + sd))
        series.append(Series(target, points))
    return line_chart(
        f"Test accuracy by rank: {over_seeds(content['seeds'])}.",
        series,
        x_label="rank",
        y_label="test accuracy, %",
        x_log=True,
        x_ticks=sorted(content["ranks"]),
    )


def _weights_table(content: Mapping[str, Any]) -> Table:
    best = winner({setting["target_modules"]: setting["accuracy"] for setting in content["within_budget"]})
    rows = []
    for setting in content["within_budget"]:
        accuracy = cell(setting["accuracy"]["mean"], percent(setting["accuracy"]), setting["target_modules"] == best)
        macro_f1 = cell(setting["macro_f1"]["mean"], percent(setting["macro_f1"]))
        rows.append([_code(setting["target_modules"]), setting["r"], setting["parameters"], accuracy, macro_f1])
    return table("Accuracy by weights", ["weights", "r", "parameters", "accuracy, %", "macro-F1, %"], rows)


def _runs(content: Mapping[str, Any]) -> Table:
    rows = []
    for setting in content["cells"]:
        for i, seed in enumerate(content["seeds"]):
            scores = [setting[key]["values"][i] for key in ("accuracy", "macro_f1")]
            shown = [cell(score, f"{100 * score:.2f}") for score in scores]
            rows.append([_code(setting["target_modules"]), setting["r"], setting["parameters"], seed, *shown])
    return table("Every run", ["weights", "r", "parameters", "seed", "accuracy, %", "macro-F1, %"], rows)
