"""Plots of analysis results; needs matplotlib."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
from matplotlib import colormaps
from matplotlib.axes import Axes
from matplotlib.figure import Figure

_DPI = 100
_TITLE_LENGTH = 42  # letters of size 8 above a heat map


def plot_similarity(
    path: Path,
    rows: Mapping[str, Sequence[np.ndarray | None]],
    columns: Sequence[str],
    axes_labels: tuple[str, str],
    title: str,
) -> None:
    """Draws heat maps of ``phi`` on one scale from 0 to 1, as in figures 3 and 4 of the LoRA paper.

    Args:
        rows: for each row name, a grid ``[i_max, j_max]`` per column; None leaves its place empty.
        columns: names of the columns.
        axes_labels: labels of ``i`` and ``j``.
    """
    figure = Figure(figsize=(3.1 * len(columns) + 1, 2.7 * len(rows) + 0.8), dpi=_DPI, layout="constrained")
    figure.suptitle(title, fontsize=11)
    image = None
    all_axes = figure.subplots(len(rows), len(columns), squeeze=False)
    for axes_of_row, (name, grids) in zip(all_axes, rows.items(), strict=True):
        for axes, column, grid in zip(axes_of_row, columns, grids, strict=True):
            lines = [*name.split("\n"), column]
            axes.set_title("\n".join(map(_shortened, lines)), fontsize=8)
            if grid is None:
                axes.set_axis_off()
                continue
            # Pixel centres lie at whole numbers; entry [0, 0] compares the first directions.
            extent = (0.5, grid.shape[1] + 0.5, grid.shape[0] + 0.5, 0.5)
            image = axes.imshow(grid, vmin=0, vmax=1, extent=extent, aspect="auto", interpolation="nearest")
            _whole_numbers(axes, grid.shape)
            axes.set_ylabel(axes_labels[0], fontsize=7)
            axes.set_xlabel(axes_labels[1], fontsize=7)
    if image is not None:
        figure.colorbar(image, ax=all_axes, label=r"$\phi$", shrink=0.6)
    figure.savefig(path)


def plot_spectra(path: Path, panels: Mapping[str, Mapping[str, Sequence[Sequence[float]]]], title: str) -> None:
    """Plots singular values relative to the largest: one line per layer, one colour per kind of layer.

    Args:
        panels: heading -> kind -> descending singular values of each layer.
    """
    figure = Figure(figsize=(5 * len(panels) + 1, 4), dpi=_DPI, layout="constrained")
    figure.suptitle(title, fontsize=11)
    kinds = list(dict.fromkeys(kind for by_kind in panels.values() for kind in by_kind))
    all_axes = figure.subplots(1, len(panels), sharey=True, squeeze=False)[0]
    for axes, (heading, by_kind) in zip(all_axes, panels.items(), strict=True):
        for kind, layers in by_kind.items():
            for number, values in enumerate(layers):
                parts = [value / values[0] for value in values if value > 0]
                label = kind if number == 0 else None
                axes.plot(range(1, len(parts) + 1), parts, color=_colour(kinds, kind), alpha=0.5, lw=0.9, label=label)
        axes.set_title(heading, fontsize=9)
        axes.set(xlabel="direction", yscale="log")
        axes.xaxis.get_major_locator().set_params(integer=True)
        axes.grid(alpha=0.3)
    all_axes[0].set_ylabel("singular value / largest")
    if len(kinds) <= 20:
        all_axes[-1].legend(fontsize=7, loc="center left", bbox_to_anchor=(1.01, 0.5))
    figure.savefig(path)


def plot_changes(
    path: Path, kinds: Mapping[str, Mapping[str, Sequence[tuple[int, float]]]], xlabel: str, ylabel: str, title: str
) -> None:
    """Plots bars per block on one scale, one panel per kind of layer.

    Args:
        kinds: kind -> series -> ``(block, height)``; heights of the same block are averaged.
    """
    series = list(dict.fromkeys(name for by_name in kinds.values() for name in by_name))
    figure = Figure(figsize=(9, 1.3 * len(kinds) + 1.2), dpi=_DPI, layout="constrained")
    figure.suptitle(title, fontsize=11)
    all_axes = figure.subplots(len(kinds), 1, sharex=True, sharey=True, squeeze=False)[:, 0]
    for axes, (kind, by_name) in zip(all_axes, kinds.items(), strict=True):
        for number, name in enumerate(series):
            heights: dict[int, list[float]] = {}
            for block, height in by_name.get(name, ()):
                heights.setdefault(block, []).append(height)
            places = [block + (number + 0.5) / len(series) * 0.8 - 0.4 for block in heights]
            means = [sum(values) / len(values) for values in heights.values()]
            axes.bar(places, means, width=0.8 / len(series), color=_colour(series, name), label=name)
        axes.set_title(kind, fontsize=8, loc="left", pad=2)
        axes.grid(axis="y", alpha=0.3)
        axes.tick_params(labelsize=7)
        axes.xaxis.get_major_locator().set_params(integer=True)
    all_axes[-1].set_xlabel(xlabel)
    figure.supylabel(ylabel, fontsize=9)
    if len(series) > 1:
        figure.legend(*all_axes[0].get_legend_handles_labels(), fontsize=8, loc="outside upper right")
    figure.savefig(path)


def _shortened(text: str) -> str:
    """Shortens a title to fit above a panel; keeps the end, which says most about a layer."""
    return text if len(text) <= _TITLE_LENGTH else f"\N{HORIZONTAL ELLIPSIS}{text[-_TITLE_LENGTH:]}"


def _colour(names: Sequence[str], name: str) -> tuple[float, ...]:
    colours = colormaps["tab10" if len(names) <= 10 else "tab20"]
    return colours(names.index(name) % colours.N)


def _whole_numbers(axes: Axes, shape: tuple[int, ...]) -> None:
    """Sets at most eight whole-number ticks per axis."""
    for axis, count in ((axes.yaxis, shape[0]), (axes.xaxis, shape[1])):
        step = math.ceil(count / 8)
        axis.set_ticks(range(1, count + 1, step))
    axes.tick_params(labelsize=7)
