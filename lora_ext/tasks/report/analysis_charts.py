"""Charts of the section on ``analyze``."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from typing import Any

from lora_ext.analysis import expected_random_similarity
from lora_ext.tasks.analyze.measures import SIDES
from lora_ext.tasks.analyze.places import places
from lora_ext.tasks.analyze.summary import changes, pair_of
from lora_ext.tasks.report.charts import NUM_COLOURS, Chart, Point, Series, heat_map, line_chart
from lora_ext.tasks.report.tables import count


def change_name(content: Mapping[str, Any]) -> str:
    """Returns the formula that measures a layer's change."""
    return "|dW|" if content["base"] is None else "|dW| / |W|"


def draw_similarity(content: Mapping[str, Any], pair: Mapping[str, Any], *, with_layers: bool) -> dict[str, Any]:
    """Maps of two adapters, or of one adapter's factors and its update: the mean over layers, and single layers."""
    first, second = pair["of"]
    alone = first == second
    title = "The factors and the update" if alone else f"Adapters {first + 1} and {second + 1}"
    row_label, column_label = (
        ("i, of the factor", "j, of the update") if alone else (f"i, adapter {first + 1}", f"j, adapter {second + 1}")
    )

    def two_maps(phi: Sequence, random: Sequence, side: str, what: str) -> list[Chart]:
        named = ((f"lora_{side}, {what}", phi), (f"lora_{side}, random subspaces", random))
        return [heat_map(name, grid, row_label=row_label, column_label=column_label) for name, grid in named]

    maps, single = [], []
    for side in SIDES:
        if (mean := pair[side]) is not None:
            maps += two_maps(mean["phi"], mean["random_mean"], side, f"mean of {count(mean['layers'], 'layer')}")
    for what, layer in _chosen_layers(content, (first, second)) if with_layers else ():
        for side in SIDES:
            found = pair_of(layer, (first, second))[side]
            if found["last"] is not None:
                phi = found["phi"]
                random = expected_random_similarity(len(phi), len(phi[0]), found["dimension"]).tolist()
                single += two_maps(phi, random, side, f"{layer['name']} ({what})")
    return {"title": title, "maps": maps, "single": single}


def _chosen_layers(content: Mapping[str, Any], of: tuple[int, int]) -> list[tuple[str, Mapping[str, Any]]]:
    sizes = changes(content["layers"], of[0])
    both = [layer for layer in content["layers"] if pair_of(layer, of) is not None]
    both.sort(key=lambda layer: -sizes.get(layer["name"], 0.0))  # stable: equal changes stay in the file's order
    if len(both) < 3:
        return [("one of the layers", layer) for layer in both[:1]]
    return [("changed most", both[0]), ("in the middle", both[len(both) // 2]), ("changed least", both[-1])]


def draw_spectra(content: Mapping[str, Any]) -> list[Chart]:
    """Returns a chart for each adapter, with a line for each kind of layer."""
    charts = []
    for number, _ in enumerate(content["adapters"]):
        kinds: dict[str, list[list[float]]] = {}
        for kind, _, adapter in _layers_of(content, number):
            singular = adapter["singular_values"]
            if values := [value / singular[0] for value in singular if value > 0]:
                kinds.setdefault(kind, []).append(values)
        series = []
        for kind in list(kinds)[:NUM_COLOURS]:
            points = []
            for i in range(max(map(len, kinds[kind]))):
                at = [values[i] for values in kinds[kind] if i < len(values)]
                middle = statistics.median(at)
                title = f"{kind}, direction {i + 1}: {middle:.3g}, from {min(at):.3g} to {max(at):.3g}"
                points.append(Point(i + 1, middle, title, min(at), max(at)))
            series.append(Series(kind, points, band=True))
        if series:
            caption = f"Adapter {number + 1}: singular values{_left_out(kinds)}."
            labels = {"x_label": "direction", "y_label": "singular value / largest"}
            charts.append(line_chart(caption, series, y_log=True, whole_x=True, **labels))
    return charts


def draw_changes(content: Mapping[str, Any]) -> list[Chart]:
    """Returns a chart for each adapter: the change of every kind of layer, block by block."""
    charts = []
    for number, _ in enumerate(content["adapters"]):
        sizes = changes(content["layers"], number)
        kinds: dict[str, dict[int, list[float]]] = {}
        for kind, block, adapter in _layers_of(content, number):
            if adapter["name"] in sizes:
                kinds.setdefault(kind, {}).setdefault(block, []).append(sizes[adapter["name"]])
        largest = sorted(kinds, key=lambda kind: -max(max(values) for values in kinds[kind].values()))
        series = []
        for kind in (kind for kind in kinds if kind in largest[:NUM_COLOURS]):
            means = {block: statistics.fmean(values) for block, values in sorted(kinds[kind].items())}
            points = [Point(block, mean, f"{kind}, block {block}: {mean:.3g}") for block, mean in means.items()]
            series.append(Series(kind, points))
        caption = f"Adapter {number + 1}: {change_name(content)} by block{_left_out(kinds)}."
        labels = {"x_label": "block", "y_label": change_name(content)}
        charts.append(line_chart(caption, series, whole_x=True, y_from_zero=True, **labels))
    return charts


def _layers_of(content: Mapping[str, Any], number: int) -> list[tuple[str, int, dict[str, Any]]]:
    """Kind, block, and the figures with the layer's name, of each layer that the adapter has."""
    figures = {layer["name"]: layer["adapters"][number] for layer in content["layers"] if layer["adapters"][number]}
    place = places([layer["name"] for layer in content["layers"]])
    return [(place[name][1], place[name][0] or 0, {"name": name, **values}) for name, values in figures.items()]


def _left_out(kinds: Mapping[str, Any]) -> str:
    return f" ({NUM_COLOURS} of {len(kinds)} kinds)" if len(kinds) > NUM_COLOURS else ""
