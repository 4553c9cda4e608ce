"""The section on ``analyze``: similarity of subspaces, place in the weights, spectra, and changes by layer."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from typing import Any

from lora_ext.tasks.analyze.measures import SIDES
from lora_ext.tasks.report.analysis_charts import change_name, draw_changes, draw_similarity, draw_spectra
from lora_ext.tasks.report.pictures import Pictures
from lora_ext.tasks.report.results import Result
from lora_ext.tasks.report.tables import Table, count, figure_text, table

_MOST_ROWS = 2000  # rows of the table of layers
_MOST_PAIRS = 24  # pairs of adapters with maps
_PARTS = {"delta": "|UᵀWV| of dW", "weight": "|UᵀWV| of W", "random": "|UᵀWV| random", "amplification": "amplification"}


def show_analysis(result: Result, pictures: Pictures) -> dict[str, Any]:
    """Returns the section's content."""
    content = result.content
    pairs = content["summary"]["similarity"]
    layers = _layer_rows(content)
    num_more, more_rows = len(pairs) - _MOST_PAIRS, len(layers) - _MOST_ROWS
    return {
        "notes": content["notes"],
        "adapters": _adapters(content),
        "reading_similarity": _reading_similarity(pairs),
        "pairs": [draw_similarity(content, pair, with_layers=len(pairs) == 1) for pair in pairs[:_MOST_PAIRS]],
        "more_pairs": count(num_more, "more pair") if num_more > 0 else None,
        "reading_amplification": _reading_amplification(content),
        "kinds": _kinds(content),
        "by_rank": _by_rank(content),
        "spectra": draw_spectra(content),
        "reading_changes": _reading_changes(content),
        "changes": draw_changes(content),
        "layers": _layers(layers[:_MOST_ROWS]),
        "left_out": f" ({more_rows:,} more rows are in analysis.json)" if more_rows > 0 else "",
    }


# --- what the figures say ---------------------------------------------------------------------------------------------


def _reading_similarity(pairs: Sequence[Mapping[str, Any]]) -> list[str]:
    sentences = []
    for pair in pairs[:1]:
        first, second = pair["of"]
        whose = "and of the update" if first == second else f"of adapters {first + 1} and {second + 1}"
        for side in SIDES:
            if (mean := pair[side]) is None:
                continue
            phi, random = mean["phi"][0][0], mean["random_mean"][0][0]
            sentences.append(
                f"The leading directions of lora_{side} {whose} have a similarity of {phi:.3g} on average over "
                f"{count(mean['layers'], 'layer')}; random directions have {random:.3g}."
            )
    return sentences


def _reading_amplification(content: Mapping[str, Any]) -> list[str]:
    last = [
        {key: adapter["projection"][key][-1] for key in _PARTS}
        for layer in content["layers"]
        for adapter in layer["adapters"]
        if adapter is not None and adapter["projection"] and adapter["projection"]["amplification"]
    ]
    known = [update["amplification"] for update in last if update["amplification"] is not None]
    if not known:
        return []
    more = sum(update["delta"] > update["random"] for update in last)
    return [
        f"The median amplification is {statistics.median(known):.3g}: an update is that many times as large as the "
        "weight in the update's directions.",
        f"In {more} of {count(len(last), 'update')} these directions hold more of the weight than random directions.",
    ]


def _reading_changes(content: Mapping[str, Any]) -> list[str]:
    firsts = [(number, adapter["most_changed"][:1]) for number, adapter in enumerate(content["summary"]["adapters"], 1)]
    return [
        f"Adapter {number} changes {layer['name']} most: {change_name(content)} is {layer['change']:.3g}."
        for number, first in firsts
        for layer in first
    ]


# --- tables -----------------------------------------------------------------------------------------------------------


def _adapters(content: Mapping[str, Any]) -> Table:
    rows = []
    for number, (adapter, means) in enumerate(zip(content["adapters"], content["summary"]["adapters"], strict=True), 1):
        ranks = [str(rank) for rank in adapter["r"]]
        r = " to ".join(dict.fromkeys([ranks[0], ranks[-1]])) if ranks else ""
        figures = [means[key] for key in ("layers", "norm", "relative_change")]
        rows.append([f"adapter {number}", adapter["path"], r, *figures])
    return table("Adapters", ["adapter", "directory", "r", "layers", "|dW|", "|dW| / |W|"], rows)


def _kinds(content: Mapping[str, Any]) -> Table:
    columns = {
        "layers": "layers",
        "norm": "|dW|",
        "relative_change": "|dW| / |W|",
        "effective_rank": "effective rank",
        "stable_rank": "stable rank",
        **_PARTS,
    }
    rows = [
        [kind, number, *(means[key] for key in columns)]
        for number, adapter in enumerate(content["summary"]["adapters"], 1)
        for kind, means in adapter["kinds"].items()
    ]
    return table("Means by kind of layer", ["kind", "adapter", *columns.values()], rows)


def _by_rank(content: Mapping[str, Any]) -> list[Table]:
    """Returns the paper's table 7 for the layer that each adapter changed most."""
    layers = {layer["name"]: layer for layer in content["layers"]}
    tables = []
    for number, adapter in enumerate(content["summary"]["adapters"]):
        if not adapter["most_changed"]:
            continue
        name = adapter["most_changed"][0]["name"]
        projection = layers[name]["adapters"][number]["projection"]
        if not projection or not projection["ranks"]:
            continue
        rows = [[rank, *(projection[key][i] for key in _PARTS)] for i, rank in enumerate(projection["ranks"])]
        weight_norm = figure_text(layers[name]["weight_norm"])
        caption = f"{name}, which adapter {number + 1} changed most: |W| = {weight_norm}"
        tables.append(table(caption, ["r", *_PARTS.values()], rows))
    return tables


_LAYER_COLUMNS = {
    "r": "r",
    "norm": "|dW|",
    "relative_change": "|dW| / |W|",
    "effective_rank": "effective rank",
    "stable_rank": "stable rank",
    "rank_of_90_percent": "90 %",
    "rank_of_99_percent": "99 %",
}


def _layer_rows(content: Mapping[str, Any]) -> list[list[Any]]:
    rows = []
    for layer in content["layers"]:
        for number, adapter in enumerate(layer["adapters"], 1):
            if adapter is not None:
                last = [((adapter["projection"] or {}).get(key) or [None])[-1] for key in _PARTS]
                rows.append([layer["name"], number, *(adapter[key] for key in _LAYER_COLUMNS), *last])
    return rows


def _layers(rows: Sequence[Sequence[Any]]) -> Table:
    heading = ["layer", "adapter", *_LAYER_COLUMNS.values(), *_PARTS.values()]
    return table("Every layer", heading, rows)
