"""What ``analyze`` found: similarity of subspaces, place in the weights, spectra, and changes by layer."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from typing import Any

from lora_ext.tasks.analyze.measures import SIDES
from lora_ext.tasks.report.analysis_charts import change_name, draw_changes, draw_similarity, draw_spectra
from lora_ext.tasks.report.facts import reproduce
from lora_ext.tasks.report.markup import Cell, Html, cell, count, el, figure_text, join, paragraph, table
from lora_ext.tasks.report.pictures import Pictures
from lora_ext.tasks.report.results import Result

__all__ = ["show_analysis"]

_MOST_ROWS = 2000  # of the table of layers
_MOST_PAIRS = 24
_PARTS = {"delta": "of dW", "weight": "of W", "random": "random", "amplification": "amplification"}


def show_analysis(result: Result, pictures: Pictures) -> Html:
    """The section's content."""
    content = result.content
    pairs = content["summary"]["similarity"]
    return join(
        [
            *(el("p", note) for note in content["notes"]),
            _adapters(content),
            el("h3", "Which directions are shared"),
            paragraph(*_reading_similarity(pairs)),
            el(
                "p",
                "φ(i, j) compares the leading i directions of one subspace with the leading j of another: 1 where the "
                "smaller lies in the larger, 0 where they are orthogonal (section 7.2 of the LoRA paper). Beside each "
                "map is what random subspaces would show.",
            ),
            *(draw_similarity(content, pair, with_layers=len(pairs) == 1) for pair in pairs[:_MOST_PAIRS]),
            el("p", f"{count(len(pairs) - _MOST_PAIRS, 'more pair')}: see analysis.json.")
            if len(pairs) > _MOST_PAIRS
            else None,
            el("h3", "Where in the weights"),
            paragraph(*_reading_amplification(content)),
            el(
                "p",
                "|UᵀWV| is what the weight W has in the directions of the update dW, in its own leading ones and in "
                "random ones (table 7 of the paper), with all directions of the update. The amplification is "
                "|dW| / |UᵀWV|. The effective rank is the exponential of the entropy of the singular values, the "
                "stable rank |dW|² / |dW|₂².",
            ),
            _kinds(content),
            *_by_rank(content),
            el("h3", "Spectra of the updates"),
            el(
                "p",
                "Singular values as parts of the largest; the line is the median over the layers of a kind, the band "
                "reaches from the least to the most. A line that falls fast is an update that needs few directions.",
            ),
            draw_spectra(content),
            el("h3", "What changed, by layer"),
            paragraph(*_reading_changes(content)),
            draw_changes(content),
            _layers(content),
            reproduce(result),
        ]
    )


# --- what one sees ----------------------------------------------------------------------------------------------------


def _reading_similarity(pairs: Sequence[Mapping[str, Any]]) -> list[str]:
    sentences = []
    for pair in pairs[:1]:
        alone = pair["of"][0] == pair["of"][1]
        for side in SIDES:
            if (mean := pair[side]) is None:
                continue
            phi, random = mean["phi"][0][0], mean["random_mean"][0][0]
            whose = "and of the update" if alone else f"of adapters {pair['of'][0] + 1} and {pair['of'][1] + 1}"
            sentences.append(
                f"The leading directions of lora_{side} {whose} have a similarity of {phi:.3g} on average over "
                f"{count(mean['layers'], 'layer')}; random ones have {random:.3g}."
            )
    return sentences


def _reading_amplification(content: Mapping[str, Any]) -> list[str]:
    last = [
        {key: own["projection"][key][-1] for key in _PARTS}
        for layer in content["layers"]
        for own in layer["adapters"]
        if own is not None and own["projection"] and own["projection"]["amplification"]
    ]
    known = [each["amplification"] for each in last if each["amplification"] is not None]
    if not known:
        return []
    more = sum(each["delta"] > each["random"] for each in last)
    return [
        f"The median amplification is {statistics.median(known):.3g}: an update is that many times as large as what "
        "the weight has in its directions.",
        f"In {more} of {count(len(last), 'update')} these directions hold more of the weight than random ones.",
    ]


def _reading_changes(content: Mapping[str, Any]) -> list[str]:
    sentences = []
    for number, adapter in enumerate(content["summary"]["adapters"], 1):
        if adapter["most_changed"]:
            first = adapter["most_changed"][0]
            sentences.append(
                f"Adapter {number} changes {first['name']} most: {change_name(content)} is {first['change']:.3g}."
            )
    return sentences


# --- tables -----------------------------------------------------------------------------------------------------------


def _adapters(content: Mapping[str, Any]) -> Html:
    rows = []
    for number, (adapter, own) in enumerate(zip(content["adapters"], content["summary"]["adapters"], strict=True), 1):
        ranks = adapter["r"]
        r = Cell("" if not ranks else f"{ranks[0]}" if len(ranks) == 1 else f"{ranks[0]} to {ranks[-1]}")
        rows.append(
            [
                f"adapter {number}",
                adapter["path"],
                r,
                cell(own["layers"]),
                cell(own["norm"]),
                cell(own["relative_change"]),
            ]
        )
    return table("Adapters", ["adapter", "directory", "r", "layers", "|dW|", "|dW| / |W|"], rows)


def _kinds(content: Mapping[str, Any]) -> Html:
    columns = {
        "layers": "layers",
        "norm": "|dW|",
        "relative_change": "|dW| / |W|",
        "effective_rank": "effective rank",
        "stable_rank": "stable rank",
        **{key: f"|UᵀWV| {name}" if key != "amplification" else name for key, name in _PARTS.items()},
    }
    rows = [
        [kind, cell(number), *(cell(means[key]) for key in columns)]
        for number, adapter in enumerate(content["summary"]["adapters"], 1)
        for kind, means in adapter["kinds"].items()
    ]
    return table("By kind of layer: means", ["kind", "adapter", *columns.values()], rows)


def _by_rank(content: Mapping[str, Any]) -> list[Html]:
    """The paper's table 7 for the layer that each adapter changed most."""
    layers = {layer["name"]: layer for layer in content["layers"]}
    tables = []
    for number, adapter in enumerate(content["summary"]["adapters"]):
        if not adapter["most_changed"]:
            continue
        name = adapter["most_changed"][0]["name"]
        projection = layers[name]["adapters"][number]["projection"]
        if not projection or not projection["ranks"]:
            continue
        rows = [
            [cell(rank), *(cell(projection[key][i]) for key in _PARTS)] for i, rank in enumerate(projection["ranks"])
        ]
        heading = [
            "r",
            *(f"|UᵀWV| {text}" if key != "amplification" else text for key, text in _PARTS.items()),
        ]
        weight_norm = figure_text(layers[name]["weight_norm"])
        caption = f"{name}, which adapter {number + 1} changed most: |W| = {weight_norm}"
        tables.append(table(caption, heading, rows))
    return tables


def _layers(content: Mapping[str, Any]) -> Html:
    keys = ["r", "norm", "relative_change", "effective_rank", "stable_rank", "rank_of_90_percent", "rank_of_99_percent"]
    heading = ["layer", "adapter", "r", "|dW|", "|dW| / |W|", "effective rank", "stable rank", "90 %", "99 %"]
    rows = []
    for layer in content["layers"]:
        for number, own in enumerate(layer["adapters"], 1):
            if own is not None:
                last = [(own["projection"] or {}).get(key) or [None] for key in _PARTS]
                figures = [*(own[key] for key in keys), *(values[-1] for values in last)]
                rows.append([layer["name"], cell(number), *map(cell, figures)])
    shown = rows[:_MOST_ROWS]
    left_out = f" ({len(rows) - len(shown):,} more rows are in analysis.json)" if len(shown) < len(rows) else ""
    return el(
        "details",
        el("summary", f"Every layer{left_out}"),
        el("p", "“90 %” and “99 %”: so many directions hold this part of |dW|²."),
        table("Every layer", [*heading, *_PARTS.values()], shown),
    )
