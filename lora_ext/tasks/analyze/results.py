"""Makes analysis.md and the pictures from the content of analysis.json alone."""

from __future__ import annotations

import shlex
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from lora_ext.analysis import expected_random_similarity, leading_ranks
from lora_ext.analysis.plots import plot_changes, plot_similarity, plot_spectra
from lora_ext.tasks.analyze.measures import SIDES
from lora_ext.tasks.analyze.places import places
from lora_ext.tasks.analyze.summary import changes, pair_of
from lora_ext.tasks.shared import provenance
from lora_ext.tasks.shared.markdown import table

PICTURES = ("similarity_*.png", "spectrum.png", "change.png")
_MOST_PANELS = 24  # more are unreadable in one picture


def draw(analysis: dict[str, Any], out: Path) -> list[str]:
    """Draws the pictures into ``out``; returns their names."""
    layers, place = analysis["layers"], places([layer["name"] for layer in analysis["layers"]])
    names = []
    for pair in analysis["summary"]["similarity"]:
        names.append(f"similarity_{'_'.join(str(n + 1) for n in dict.fromkeys(pair['of']))}.png")
        _draw_similarity(analysis, pair, out / names[-1])
    spectra: dict[str, dict[str, list[list[float]]]] = {}
    bars: dict[str, dict[str, list[tuple[int, float]]]] = {}
    for number in range(len(analysis["adapters"])):
        label = f"adapter {number + 1}"
        for layer in layers:
            if (update := layer["adapters"][number]) is not None:
                kind = place[layer["name"]][1]
                spectra.setdefault(label, {}).setdefault(kind, []).append(update["singular_values"])
        for name, size in changes(layers, number).items():
            block, kind = place[name]
            bars.setdefault(kind, {}).setdefault(label, []).append((block or 0, size))
    plot_spectra(out / "spectrum.png", spectra, "Singular values of the updates")
    what, shown = _change_heading(analysis), bars
    title = f"{what}, by kind of layer"
    if len(bars) > _MOST_PANELS:
        largest = sorted(bars, key=lambda kind: -max(size for points in bars[kind].values() for _, size in points))
        shown = {kind: bars[kind] for kind in largest[:_MOST_PANELS]}
        title += f": the {_MOST_PANELS} of {len(bars)} kinds with the largest"
    plot_changes(out / "change.png", shown, "block", what, title)
    return [*names, "spectrum.png", "change.png"]


def markdown(analysis: dict[str, Any], pictures: Sequence[str]) -> str:
    """Returns the report: what was analysed, figures by kind of layer, similarity, and a line for each layer."""
    parts = [
        "# What the adapters learned" if len(analysis["adapters"]) > 1 else "# What the adapter learned",
        f"    {shlex.join(analysis['command'])}",
        f"Base: {analysis['base'] or 'none'}. {provenance.measured_on(analysis)}",
        *analysis["notes"],
        _table(
            ["adapter", "directory", "r", "layers", "norm of the update", "of the weights' norm"],
            [
                [str(i), adapter["path"], _range(adapter["r"]), sums["layers"], sums["norm"], sums["relative_change"]]
                for i, (adapter, sums) in enumerate(
                    zip(analysis["adapters"], analysis["summary"]["adapters"], strict=True), 1
                )
            ],
        ),
        "## By kind of layer",
        "Means over the layers of a kind. The effective rank is the exponential of the entropy of the singular values "
        "(Roy and Vetterli, 2007), the stable rank |dW|² / |dW|₂². With all of the update's directions, "
        "|Uᵀ W V| is the part of the weight in those of the update, in its leading ones and in random ones (table "
        "7 of the LoRA paper); the amplification is |dW| / |Uᵀ W V|.",
        _kinds(analysis),
        "## Layers that changed most",
        _most_changed(analysis),
        "## Similarity of subspaces",
        *_similarity(analysis),
        "## Pictures",
        *(f"![{name}]({name})" for name in pictures),
        "## Every layer",
        _layers(analysis),
    ]
    return "\n\n".join(parts) + "\n"


def _draw_similarity(analysis: dict[str, Any], pair: dict[str, Any], path: Path) -> None:
    """Draws the mean over the layers and the layers that changed most, median and least, next to random subspaces."""
    of = tuple(pair["of"])
    mean = [np.array(grid[key]) if (grid := pair[side]) else None for side in SIDES for key in ("phi", "random_mean")]
    rows = {f"mean of {pair['layers']} layers": mean}
    sizes = changes(analysis["layers"], of[0])
    both = [layer for layer in analysis["layers"] if pair_of(layer, of) is not None]
    both.sort(key=lambda layer: -sizes.get(layer["name"], 0.0))  # stable: ties stay in the file's order
    chosen = {"changed most\n": 0, "median\n": len(both) // 2, "changed least\n": -1} if len(both) > 2 else {"": 0}
    for what, index in chosen.items():
        row = rows[f"{what}{both[index]['name']}"] = []
        for side in SIDES:
            similarity = pair_of(both[index], of)[side]
            if similarity["last"] is None:
                row += [None, None]
            else:
                phi = np.array(similarity["phi"])
                row += [phi, expected_random_similarity(*phi.shape, similarity["dimension"]).numpy()]
    if of[0] == of[1]:
        columns = ["lora_A and right of the update", "random, expected", "lora_B and left of the update"]
        labels, title = ("i, of the factor", "j, of the update"), "The factors and the update"
    else:
        columns = ["lora_A of both", "random, expected", "lora_B of both"]
        labels, title = tuple(f"directions of adapter {n + 1}" for n in of), f"Adapters {_pair_name(of)}"
    plot_similarity(path, rows, [*columns, "random, expected"], labels, f"{title}: similarity of subspaces")


def _kinds(analysis: dict[str, Any]) -> str:
    columns = {
        "layers": "layers",
        "norm": "|dW|",
        "relative_change": "|dW| / |W|",
        "effective_rank": "effective rank",
        "stable_rank": "stable rank",
        "delta": "UᵀWV: of dW",
        "weight": "of W",
        "random": "random",
        "amplification": "amplification",
    }
    rows = [
        [f"{i}", kind, *(means[key] for key in columns)]
        for i, adapter in enumerate(analysis["summary"]["adapters"], 1)
        for kind, means in adapter["kinds"].items()
    ]
    return _table(["adapter", "kind", *columns.values()], rows)


def _most_changed(analysis: dict[str, Any]) -> str:
    adapters = analysis["summary"]["adapters"]
    rows = [
        [f"{i}", entry["name"], entry["change"]]
        for i, adapter in enumerate(adapters, 1)
        for entry in adapter["most_changed"]
    ]
    return _table(["adapter", "layer", _change_heading(analysis)], rows)


def _similarity(analysis: dict[str, Any]) -> list[str]:
    if len(analysis["adapters"]) == 1:
        what = "the leading i directions of lora_A (lora_B) with the leading j right (left) ones of the update"
    else:
        what = "the leading i directions of lora_A (right singular vectors) or lora_B (left) of two adapters"
    parts = [
        f"phi(i, j) compares {what}: 1 where the smaller subspace lies in the larger, 0 where they are orthogonal. "
        "Random subspaces of n dimensions have max(i, j) / n on average. Means over the layers:"
    ]
    rows = []
    for pair in analysis["summary"]["similarity"]:
        for side in SIDES:
            if (mean := pair[side]) is None:
                continue
            phi, random = np.array(mean["phi"]), np.array(mean["random_mean"])
            for r in leading_ranks(min(phi.shape)):
                rows.append([_pair_name(pair["of"]), f"lora_{side}", r, phi[r - 1, r - 1], random[r - 1, r - 1]])
    parts.append(_table(["adapters", "side", "i = j", "phi", "random"], rows) if rows else "No layer has directions.")
    return parts


def _layers(analysis: dict[str, Any]) -> str:
    heading = ["layer", "adapter", "r", "|dW|", "|dW| / |W|", "effective rank", "stable rank"]
    heading += ["90 %", "99 %", "UᵀWV: of dW", "of W", "random", "amplification"]
    keys = ("r", "norm", "relative_change", "effective_rank", "stable_rank", "rank_of_90_percent", "rank_of_99_percent")
    rows = []
    for layer in analysis["layers"]:
        for i, update in enumerate(layer["adapters"], 1):
            if update is None:
                continue
            projection = update["projection"] or {}
            rows.append(
                [layer["name"], f"{i}", *(update[key] for key in keys)]
                + [(projection.get(key) or [None])[-1] for key in ("delta", "weight", "random", "amplification")]
            )
    return _table(heading, rows)


def _table(heading: Sequence[str], rows: Sequence[Sequence[Any]]) -> str:
    return table(heading, [[_cell(value) for value in row] for row in rows])


def _cell(value: Any) -> str:
    if value is None:
        return ""
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def _change_heading(analysis: dict[str, Any]) -> str:
    return "|dW|" if analysis["base"] is None else "|dW| / |W|"


def _pair_name(of: Sequence[int]) -> str:
    return f"{of[0] + 1}" if of[0] == of[1] else f"{of[0] + 1} and {of[1] + 1}"


def _range(ranks: Sequence[int]) -> str:
    return f"{ranks[0]}" if ranks[0] == ranks[-1] else f"{ranks[0]} to {ranks[-1]}"
