"""Draws the pictures of results with matplotlib: loss curves, comparisons of methods, analyses of adapters.

Text and axes have a grey that is legible on white and on black; :func:`svg` gives them the colour of the page.
"""

from __future__ import annotations

import io
import math
import re
import xml.etree.ElementTree as ElementTree
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np

from lora_ext.commands.options import check_installed

try:
    import matplotlib
    from matplotlib.axes import Axes
    from matplotlib.axis import Tick
    from matplotlib.figure import Figure
    from matplotlib.text import Text
except ImportError:
    check_installed("report", "matplotlib")
    raise

_INK = "#767676"  # contrast of 4.5 to white and to black
_COLOURS = ("#1f77b4", "#d95f02", "#1b9e77", "#7570b3", "#e7298a", "#66a61e", "#a6761d", "#8c8c8c")  # 3 to both
_MARKERS = "osD^vP*X"
_SVG, _XLINK = "{http://www.w3.org/2000/svg}", "{http://www.w3.org/1999/xlink}"
_TITLE_LENGTH = 36  # letters above a heat map


# --- runs of finetune and compare -------------------------------------------------------------------------------------


def loss_curve(history: Sequence[Mapping[str, Any]], title: str) -> Figure:
    """Draws the training and validation loss of a trainer's ``log_history`` by epoch."""
    figure, axes = _panel()
    for number, (key, label) in enumerate({"loss": "training", "eval_loss": "validation"}.items()):
        points = [(entry["epoch"], entry[key]) for entry in history if entry.get(key) is not None and "epoch" in entry]
        if points:
            marker = _MARKERS[number] if len(points) < 30 else None
            axes.plot(*zip(*points, strict=True), color=_COLOURS[number], marker=marker, ms=4, label=label)
    axes.set(xlabel="epoch", ylabel="loss (nats)", title=title)
    if axes.lines:
        axes.legend(frameon=False)
    return _finished(figure)


def scores_against_parameters(rows: Sequence[Mapping[str, Any]], metric: str) -> Figure:
    """Draws each run's mean score over its number of trained parameters, as figure 2 of the LoRA paper does.

    Bars reach from the worst to the best seed.
    """
    figure, axes = _panel(height=4.2)
    methods = list(dict.fromkeys(row["method"] for row in rows))
    for number, method in enumerate(methods):
        chosen = sorted((row for row in rows if row["method"] == method), key=lambda row: row["trainable_parameters"])
        style = {"color": _COLOURS[number % len(_COLOURS)], "marker": _MARKERS[number % len(_MARKERS)]}
        _with_spread(
            axes, [row["trainable_parameters"] for row in chosen], chosen, metric, label=method, ls="", **style
        )
    for row in rows if len(rows) <= 12 else ():
        where = row["trainable_parameters"], _shown(metric, row["mean"])
        axes.annotate(row["label"], where, xytext=(5, 4), textcoords="offset points", fontsize=7)
    axes.set(xscale="log", xlabel="trained parameters", ylabel=_unit(metric), title="Test score and trained parameters")
    axes.margins(x=0.15)
    axes.legend(frameon=False, fontsize=8, loc="center left", bbox_to_anchor=(1.0, 0.5))
    return _finished(figure)


def ranks(rows: Sequence[Mapping[str, Any]], metric: str) -> Figure | None:
    """Draws scores of LoRA by rank, a line for each set of matrices; None if no set has two ranks."""
    by_targets: dict[str, dict[int, Mapping[str, Any]]] = {}
    for row in rows:
        if row["method"] == "lora" and "lora_r" in row["options"]:
            by_targets.setdefault(_targets(row), {})[int(row["options"]["lora_r"])] = row
    lines = {targets: by_rank for targets, by_rank in by_targets.items() if len(by_rank) > 1}
    if not lines:
        return None
    figure, axes = _panel()
    for number, (targets, by_rank) in enumerate(lines.items()):
        found = sorted(by_rank)
        style = {"color": _COLOURS[number % len(_COLOURS)], "marker": _MARKERS[number % len(_MARKERS)]}
        _with_spread(axes, found, [by_rank[r] for r in found], metric, label=targets, **style)
    every = sorted({r for by_rank in lines.values() for r in by_rank})
    axes.set(xscale="log", xlabel="rank r", ylabel=_unit(metric), title="Test score by rank")
    axes.set_xticks(every, [str(r) for r in every])
    axes.minorticks_off()
    axes.legend(frameon=False, fontsize=8, title="matrices", title_fontsize=8)
    return _finished(figure)


def matrices(rows: Sequence[Mapping[str, Any]], metric: str) -> Figure | None:
    """Draws scores of LoRA by the adapted matrices, at about one number of parameters (table 5 of the LoRA paper).

    Of each set, the row counts with which the numbers are nearest to each other. None: there is one set, or the
    numbers differ by more than half.
    """
    by_targets: dict[str, list[Mapping[str, Any]]] = {}
    for row in rows:
        if row["method"] == "lora":
            by_targets.setdefault(_targets(row), []).append(row)
    nearest = [
        [min(some, key=lambda row: abs(math.log(row["trainable_parameters"] / budget))) for some in by_targets.values()]
        for budget in sorted(row["trainable_parameters"] for some in by_targets.values() for row in some)
    ]
    chosen = min(nearest, key=_ratio, default=[])
    if len(chosen) < 2 or _ratio(chosen) > 1.5:
        return None
    figure, axes = _panel(height=0.4 * len(chosen) + 1.4)
    for number, row in enumerate(chosen):
        _with_spread(axes, [number], [row], metric, flat=True, color=_COLOURS[0], marker="o", ls="")
    names = [
        f"{targets}, r = {row['options'].get('lora_r', '?')}: {row['trainable_parameters']:,}"
        for targets, row in zip(by_targets, chosen, strict=True)
    ]
    axes.set_yticks(range(len(chosen)), [name.replace("$", r"\$") for name in names])
    axes.set(xlabel=_unit(metric), title="Test score by matrices (and their trained parameters)")
    axes.set_ylim(len(chosen) - 0.5, -0.5)
    return _finished(figure)


def _ratio(rows: Sequence[Mapping[str, Any]]) -> float:
    numbers = [row["trainable_parameters"] for row in rows]
    return max(numbers) / min(numbers)


def _with_spread(
    axes: Axes, at: Sequence[float], rows: Sequence[Mapping[str, Any]], metric: str, flat: bool = False, **style: Any
) -> None:
    """Draws means at these places, with bars from the smallest to the largest value of the seeds."""
    values = np.array([_shown(metric, row["mean"]) for row in rows])
    ends = np.array([[_shown(metric, end(row["values"] or [row["mean"]])) for row in rows] for end in (min, max)])
    error = np.abs(ends - values)
    places = {"x": values, "y": at, "xerr": error} if flat else {"x": at, "y": values, "yerr": error}
    axes.errorbar(**places, ms=5, lw=1.2, elinewidth=1, capsize=2, **style)


def _shown(metric: str, value: float) -> float:
    return value if metric == "perplexity" else 100 * value


def _unit(metric: str) -> str:
    return f"test {metric.replace('_', ' ')}" + ("" if metric == "perplexity" else " (%)")


def _targets(row: Mapping[str, Any]) -> str:
    targets = row["options"].get("lora_targets") or "default"
    return ", ".join(targets) if isinstance(targets, list) else str(targets)


# --- analyses ---------------------------------------------------------------------------------------------------------


def similarity(pair: Mapping[str, Any]) -> Figure:
    """Draws ``phi`` of two adapters next to random subspaces, as figures 3 and 4 of the LoRA paper do.

    Args:
        pair: an entry of ``similarity`` in analysis.json.
    """
    first, second = pair["of"]
    if first == second:
        columns, labels = ("lora_A and right of dW", "lora_B and left of dW"), ("i, of the factor", "j, of dW")
        title = "Similarity of the factors and the update"
    else:
        columns, labels = ("lora_A", "lora_B"), (f"directions of adapter {first}", f"directions of adapter {second}")
        title = f"Similarity of adapters {first} and {second}"
    headings = [heading for column in columns for heading in (column, "random, expected")]
    figure = Figure(figsize=(11.5, 2.7 * len(pair["grids"]) + 0.6), layout="constrained")
    figure.suptitle(title, fontsize=11)
    image = None
    for axes_of_row, row in zip(figure.subplots(len(pair["grids"]), 4, squeeze=False), pair["grids"], strict=True):
        grids = [row[side] and row[side][key] for side in "AB" for key in ("phi", "random")]
        for axes, heading, grid in zip(axes_of_row, headings, grids, strict=True):
            axes.set_title("\n".join(map(_shortened, [*row["what"].split(": ", 1), heading])), fontsize=8)
            if grid is None:
                axes.set_axis_off()
                continue
            height, width = np.shape(grid)
            # Pixel centres lie at whole numbers; entry [0, 0] compares the first directions.
            extent = (0.5, width + 0.5, height + 0.5, 0.5)
            image = axes.imshow(grid, vmin=0, vmax=1, extent=extent, aspect="auto", interpolation="nearest")
            axes.set_yticks(range(1, height + 1, math.ceil(height / 8)))
            axes.set_xticks(range(1, width + 1, math.ceil(width / 8)))
            axes.tick_params(labelsize=7)
            axes.set_ylabel(labels[0], fontsize=7)
            axes.set_xlabel(labels[1], fontsize=7)
    if image is not None:
        figure.colorbar(image, ax=figure.axes, label="phi", shrink=0.8)
    return _finished(figure)


def spectra(panels: Mapping[str, Mapping[str, Sequence[Sequence[float]]]]) -> Figure:
    """Draws singular values relative to the largest: one line per layer, one colour per kind of layer.

    Args:
        panels: heading -> kind -> descending singular values of each layer.
    """
    figure = Figure(figsize=(4.5 * len(panels) + 2, 3.8), layout="constrained")
    figure.suptitle("Singular values of the updates", fontsize=11)
    kinds = list(dict.fromkeys(kind for by_kind in panels.values() for kind in by_kind))
    all_axes = figure.subplots(1, len(panels), sharey=True, squeeze=False)[0]
    for axes, (heading, by_kind) in zip(all_axes, panels.items(), strict=True):
        for kind, layers in by_kind.items():
            for number, values in enumerate(layers):
                parts = [value / values[0] for value in values if value > 0]
                style = {"color": _COLOURS[kinds.index(kind) % len(_COLOURS)], "label": kind if number == 0 else None}
                axes.plot(range(1, len(parts) + 1), parts, alpha=0.6, lw=0.9, **style)
        axes.set_title(heading, fontsize=9)
        axes.set(xlabel="direction", yscale="log")
        axes.xaxis.get_major_locator().set_params(integer=True)
        axes.grid(alpha=0.3)
    all_axes[0].set_ylabel("singular value / largest")
    if len(kinds) <= 20:
        all_axes[-1].legend(fontsize=7, loc="center left", bbox_to_anchor=(1.01, 0.5), frameon=False)
    return _finished(figure)


def changes(kinds: Mapping[str, Mapping[str, Sequence[tuple[int, float]]]], what: str) -> Figure:
    """Draws bars per block on one scale, one panel per kind of layer.

    Args:
        kinds: kind -> series -> ``(block, height)``; heights of the same block, as of experts, are averaged.
        what: the quantity.
    """
    series = list(dict.fromkeys(name for by_name in kinds.values() for name in by_name))
    figure = Figure(figsize=(9, 1.3 * len(kinds) + 1.2), layout="constrained")
    figure.suptitle(f"{what} by kind of layer", fontsize=11)
    all_axes = figure.subplots(len(kinds), 1, sharex=True, sharey=True, squeeze=False)[:, 0]
    for axes, (kind, by_name) in zip(all_axes, kinds.items(), strict=True):
        for number, name in enumerate(series):
            heights: dict[int, list[float]] = {}
            for block, height in by_name.get(name, ()):
                heights.setdefault(block, []).append(height)
            at = [block + (number + 0.5) / len(series) * 0.8 - 0.4 for block in heights]
            means = [sum(values) / len(values) for values in heights.values()]
            axes.bar(at, means, width=0.8 / len(series), color=_COLOURS[number % len(_COLOURS)], label=name)
        axes.set_title(kind, fontsize=8, loc="left", pad=2)
        axes.grid(axis="y", alpha=0.3)
        axes.tick_params(labelsize=7)
        axes.xaxis.get_major_locator().set_params(integer=True)
    all_axes[-1].set_xlabel("block")
    figure.supylabel(what, fontsize=9)
    if len(series) > 1:
        figure.legend(*all_axes[0].get_legend_handles_labels(), fontsize=8, loc="outside upper right", frameon=False)
    return _finished(figure)


def _shortened(text: str) -> str:
    """Shortens a title to fit above a panel; keeps the end, which says most about a layer."""
    return text if len(text) <= _TITLE_LENGTH else f"\N{HORIZONTAL ELLIPSIS}{text[-_TITLE_LENGTH:]}"


def _panel(height: float = 3.4) -> tuple[Figure, Axes]:
    figure = Figure(figsize=(6.8, height), layout="constrained")
    axes = figure.subplots()
    axes.grid(alpha=0.3)
    return figure, axes


def _finished(figure: Figure) -> Figure:
    """Gives text and axes the grey; a dollar in a name starts no formula."""
    for text in figure.findobj(Text):
        text.set_color(_INK)
    in_ticks = {text for axes in figure.axes for tick in axes.findobj(Tick) for text in tick.findobj(Text)}
    for text in {*figure.findobj(Text)} - in_ticks:
        text.set_parse_math(False)
    for axes in figure.axes:
        axes.tick_params(which="both", colors=_INK)
        for spine in axes.spines.values():
            spine.set_color(_INK)
    return figure


# --- for a page -------------------------------------------------------------------------------------------------------


def svg(figure: Figure, name: str, label: str) -> str:
    """Returns a figure as an element for an HTML page.

    Its ids start with ``name``, so that several figures can be on a page. It has presentation attributes instead of
    styles, which a strict Content-Security-Policy refuses; text in the page's font; grey as the page's text colour.

    Args:
        label: what the figure shows, for screen readers.
    """
    stream = io.BytesIO()
    with matplotlib.rc_context({"svg.fonttype": "none", "svg.hashsalt": name}):
        nothing = dict.fromkeys(("Date", "Creator", "Format", "Type"))
        figure.savefig(stream, format="svg", transparent=True, metadata=nothing)
    root = ElementTree.fromstring(stream.getvalue())
    for parent in [*root.iter()]:
        for child in [*parent]:
            if child.tag in (f"{_SVG}style", f"{_SVG}metadata"):
                parent.remove(child)
    for element in root.iter():
        element.attrib = dict(_attributes(element.attrib, name))
    del root.attrib["height"]  # the width and the viewBox give it
    root.attrib |= {"role": "img", "aria-label": label, "stroke-linejoin": "round"}
    ElementTree.register_namespace("", _SVG.strip("{}"))
    return ElementTree.tostring(root, encoding="unicode")


def _attributes(attributes: Mapping[str, str], name: str) -> Iterator[tuple[str, str]]:
    styles = dict(item.split(": ", 1) for item in attributes.get("style", "").split("; ") if item)
    if "font" in styles:  # older releases: "font: 10px 'DejaVu Sans', ..."
        styles["font-size"] = re.search(r"[\d.]+px", styles.pop("font"))[0]
    styles.pop("font-family", None)
    for key, value in (attributes | styles).items():
        if key == "id":
            yield key, f"{name}-{value}"
        elif key == f"{_XLINK}href":
            yield "href", f"#{name}-{value[1:]}" if value.startswith("#") else value
        elif key != "style":
            value = "currentColor" if value in (_INK, "#000000") else value
            yield key, value.replace("url(#", f"url(#{name}-")
