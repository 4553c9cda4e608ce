"""Charts of what ``analyze`` found."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from typing import Any

from lora_ext.analysis import expected_random_similarity
from lora_ext.tasks.analyze.measures import SIDES
from lora_ext.tasks.analyze.places import places
from lora_ext.tasks.analyze.summary import changes, pair_of
from lora_ext.tasks.report.heat_map import colour_scale, heat_map
from lora_ext.tasks.report.line_chart import NUM_COLOURS, Point, Series, line_chart
from lora_ext.tasks.report.markup import Html, count, el

__all__ = ["change_name", "draw_changes", "draw_similarity", "draw_spectra"]


def change_name(content: Mapping[str, Any]) -> str:
    """What a layer's change is measured by."""
    return "|dW|" if content["base"] is None else "|dW| / |W|"


def draw_similarity(content: Mapping[str, Any], pair: Mapping[str, Any], *, with_layers: bool) -> Html:
    """Maps of a pair of adapters, or of one's factors and its update: the mean over layers, and single layers."""
    of = tuple(pair["of"])
    alone = of[0] == of[1]
    title = "The factors and the update" if alone else f"Adapters {of[0] + 1} and {of[1] + 1}"
    labels = (
        ("i, of the factor", "j, of the update") if alone else (f"i, adapter {of[0] + 1}", f"j, adapter {of[1] + 1}")
    )

    def pair_of_maps(phi: Sequence[Sequence[float]], random: Sequence[Sequence[float]], side: str, what: str) -> list:
        name = f"lora_{side}, {what}"
        return [
            heat_map(name, phi, row_label=labels[0], column_label=labels[1]),
            heat_map(f"lora_{side}, random subspaces", random, row_label=labels[0], column_label=labels[1]),
        ]

    maps, of_layers = [], []
    for side in SIDES:
        if (mean := pair[side]) is not None:
            maps += pair_of_maps(mean["phi"], mean["random_mean"], side, f"mean of {count(mean['layers'], 'layer')}")
    for what, layer in _chosen_layers(content, of) if with_layers else ():
        for side in SIDES:
            own = pair_of(layer, of)[side]
            if own["last"] is not None:
                random = expected_random_similarity(len(own["phi"]), len(own["phi"][0]), own["dimension"]).tolist()
                of_layers += pair_of_maps(own["phi"], random, side, f"{layer['name']} ({what})")
    if not maps:
        return el("p", f"{title}: no layer has directions to compare.")
    single = el("details", el("summary", "Single layers"), el("div", *of_layers, class_="maps")) if of_layers else None
    return el("div", el("h4", title), colour_scale(), el("div", *maps, class_="maps"), single)


def _chosen_layers(content: Mapping[str, Any], of: tuple[int, int]) -> list[tuple[str, Mapping[str, Any]]]:
    sizes = changes(content["layers"], of[0])
    both = [layer for layer in content["layers"] if pair_of(layer, of) is not None]
    both.sort(key=lambda layer: -sizes.get(layer["name"], 0.0))  # stable: what changed alike stays in the file's order
    if len(both) < 3:
        return [("one of the layers", layer) for layer in both[:1]]
    return [("changed most", both[0]), ("in the middle", both[len(both) // 2]), ("changed least", both[-1])]


def draw_spectra(content: Mapping[str, Any]) -> Html:
    """A chart for each adapter, with a line for each kind of layer."""
    charts = []
    for number, _ in enumerate(content["adapters"]):
        kinds: dict[str, list[list[float]]] = {}
        for kind, _, own in _layers_of(content, number):
            if values := [value / own["singular_values"][0] for value in own["singular_values"] if value > 0]:
                kinds.setdefault(kind, []).append(values)
        series = []
        for kind in list(kinds)[:NUM_COLOURS]:
            points = []
            for i in range(max(map(len, kinds[kind]))):
                at = [values[i] for values in kinds[kind] if i < len(values)]
                middle = statistics.median(at)
                says = f"{kind}, direction {i + 1}: {middle:.3g}, from {min(at):.3g} to {max(at):.3g}"
                points.append(Point(i + 1, middle, says, min(at), max(at)))
            series.append(Series(kind, points, band=True))
        if series:
            caption = f"Adapter {number + 1}: singular values{_left_out(kinds)}."
            ticks = _whole_ticks(point.x for each in series for point in each.points)
            labels = {"x_label": "direction", "y_label": "singular value / largest"}
            charts.append(line_chart(caption, series, y_log=True, x_ticks=ticks, **labels))
    return el("div", *charts, class_="multiples") if charts else el("p", "The updates are zero.")


def draw_changes(content: Mapping[str, Any]) -> Html:
    """A chart for each adapter: the change of every kind of layer, block by block."""
    charts = []
    for number, _ in enumerate(content["adapters"]):
        sizes = changes(content["layers"], number)
        kinds: dict[str, dict[int, list[float]]] = {}
        for kind, block, own in _layers_of(content, number):
            if own["name"] in sizes:
                kinds.setdefault(kind, {}).setdefault(block, []).append(sizes[own["name"]])
        largest = sorted(kinds, key=lambda kind: -max(size for own in kinds[kind].values() for size in own))
        shown = [kind for kind in kinds if kind in largest[:NUM_COLOURS]]
        series = []
        for kind in shown:
            points = []
            for block, values in sorted(kinds[kind].items()):
                mean = statistics.fmean(values)
                points.append(Point(block, mean, f"{kind}, block {block}: {mean:.3g}"))
            series.append(Series(kind, points))
        caption = f"Adapter {number + 1}: {change_name(content)} by block{_left_out(kinds)}."
        ticks = _whole_ticks(point.x for each in series for point in each.points)
        labels = {"x_label": "block", "y_label": change_name(content)}
        charts.append(line_chart(caption, series, x_ticks=ticks, y_from_zero=True, **labels))
    return el("div", *charts, class_="multiples")


def _layers_of(content: Mapping[str, Any], number: int) -> list[tuple[str, int, dict[str, Any]]]:
    """Kind, block, and the figures with the layer's name, of each layer that the adapter has."""
    own = {layer["name"]: layer["adapters"][number] for layer in content["layers"] if layer["adapters"][number]}
    place = places([layer["name"] for layer in content["layers"]])
    return [(place[name][1], place[name][0] or 0, {"name": name, **figures}) for name, figures in own.items()]


def _left_out(kinds: Mapping[str, Any]) -> str:
    return f" ({NUM_COLOURS} of {len(kinds)} kinds)" if len(kinds) > NUM_COLOURS else ""


def _whole_ticks(values) -> list[int]:
    """At most nine whole numbers from the least to the most."""
    known = list(values)
    low, high = int(min(known)), int(max(known))
    return list(range(low, high + 1, -(-(high - low + 1) // 9)))
