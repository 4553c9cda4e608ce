"""Draws the pictures of results with matplotlib: loss curves, comparisons of methods, analyses of adapters.

Text and axes have a grey that is legible on white and on black; :func:`svg` gives them a colour for each.
"""

from __future__ import annotations

import io
import math
from collections.abc import Mapping, Sequence
from typing import Any

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

_INK = "#767676"  # contrast of 4.5 to white and to black
_COLOURS = ("#1f77b4", "#d95f02", "#1b9e77", "#7570b3", "#e7298a", "#66a61e", "#a6761d", "#8c8c8c")  # 3 to both
_METRICS = {"accuracy": (100, "test accuracy (%)"), "perplexity": (1, "test perplexity")}  # factor and unit shown
_styled = matplotlib.rc_context(
    {
        **dict.fromkeys(("text.color", "axes.labelcolor", "axes.edgecolor"), _INK),
        "text.parse_math": False,  # a dollar in a name starts no formula
        "axes.prop_cycle": matplotlib.cycler(color=_COLOURS, marker=[*"osD^vP*X"]),
        "lines.markersize": 5,
        "grid.alpha": 0.3,
        "legend.frameon": False,
        "axes.titlesize": 10,
        "legend.fontsize": 8,
    }
)


# --- runs of finetune and compare -------------------------------------------------------------------------------------


@_styled
def loss_curve(history: Sequence[Mapping[str, Any]], title: str) -> Figure:
    """Draws the training and validation loss of a trainer's ``log_history`` by epoch."""
    figure, axes = _panel(title, "epoch", "loss (nats)")
    for key, label in {"loss": "training", "eval_loss": "validation"}.items():
        points = [(entry["epoch"], entry[key]) for entry in history if entry.get(key) is not None]
        if points:
            axes.plot(*zip(*points, strict=True), label=label, ms=4 if len(points) < 30 else 0)
            axes.legend()
    return figure


@_styled
def scores_against_parameters(rows: Sequence[Mapping[str, Any]], metric: str) -> Figure:
    """Draws each run's mean score over its number of trained parameters, as figure 2 of the LoRA paper does.

    Bars reach from the worst to the best seed.
    """
    figure, axes = _panel("Test score and trained parameters", "trained parameters", _METRICS[metric][1], height=4.2)
    for method in dict.fromkeys(row["method"] for row in rows):
        chosen = [row for row in rows if row["method"] == method]
        _with_spread(axes, [*map(_trained, chosen)], chosen, metric, label=method, ls="")
    for row in rows if len(rows) <= 12 else ():
        where = _trained(row), _METRICS[metric][0] * row["mean"]
        axes.annotate(row["label"], where, xytext=(5, 4), textcoords="offset points", fontsize=7)
    axes.set_xscale("log")
    axes.margins(x=0.15)
    axes.legend(loc="center left", bbox_to_anchor=(1.0, 0.5))
    return figure


@_styled
def ranks(rows: Sequence[Mapping[str, Any]], metric: str) -> Figure | None:
    """Draws scores of LoRA by rank, a line for each set of matrices; None if no set has two ranks."""
    lines = {targets: {row["options"]["lora_r"]: row for row in some} for targets, some in _by_targets(rows).items()}
    lines = {targets: dict(sorted(by_rank.items())) for targets, by_rank in lines.items() if len(by_rank) > 1}
    if not lines:
        return None
    figure, axes = _panel("Test score by rank", "rank r", _METRICS[metric][1])
    for targets, by_rank in lines.items():
        _with_spread(axes, [*by_rank], [*by_rank.values()], metric, label=targets)
    _rank_axis(axes, {r for by_rank in lines.values() for r in by_rank})
    axes.legend(title="matrices", title_fontsize=8)
    return figure


@_styled
def matrices(rows: Sequence[Mapping[str, Any]], metric: str) -> Figure | None:
    """Draws scores of LoRA by the adapted matrices, at about one number of parameters (table 5 of the LoRA paper).

    The number is the smallest that all sets can have. None: there is one set, or the numbers differ by more than half.
    """
    by_targets = _by_targets(rows)
    budget = max((min(map(_trained, some)) for some in by_targets.values()), default=0)
    chosen = [min(some, key=lambda row: abs(math.log(_trained(row) / budget))) for some in by_targets.values()]
    if len(chosen) < 2 or max(map(_trained, chosen)) > 1.5 * min(map(_trained, chosen)):
        return None
    figure, axes = _panel("Test score by matrices", "matrices, rank, trained parameters", _METRICS[metric][1])
    _with_spread(axes, range(len(chosen)), chosen, metric, ls="")
    pairs = zip(by_targets, chosen, strict=True)
    labels = [f"{targets}\nr = {row['options']['lora_r']}\n{_trained(row):,}" for targets, row in pairs]
    axes.set_xticks(range(len(chosen)), labels)
    axes.margins(x=0.2)
    return figure


def _by_targets(rows: Sequence[Mapping[str, Any]]) -> dict[str, list[Mapping[str, Any]]]:
    """Groups the rows of LoRA by the adapted matrices."""
    groups: dict[str, list[Mapping[str, Any]]] = {}
    for row in rows:
        if row["method"] == "lora":
            targets = row["options"].get("lora_targets") or "default"
            groups.setdefault(targets if isinstance(targets, str) else ", ".join(targets), []).append(row)
    return groups


def _trained(row: Mapping[str, Any]) -> int:
    return row["trainable_parameters"]


def _with_spread(axes: Axes, at: Sequence[float], rows: Sequence[Mapping[str, Any]], metric: str, **style: Any) -> None:
    """Draws means at these places, with bars from the smallest to the largest value of the seeds."""
    scale, _ = _METRICS[metric]
    means = np.array([scale * row["mean"] for row in rows])
    ends = np.array([[scale * end(row["values"]) for row in rows] for end in (min, max)])
    axes.errorbar(at, means, np.abs(ends - means), elinewidth=1, capsize=2, **style)


# --- analyses ---------------------------------------------------------------------------------------------------------


@_styled
def similarity(rows: Sequence[Mapping[str, Any]]) -> Figure:
    """Draws analysis.json's ``similarity`` next to random subspaces, as figures 3 and 4 of the LoRA paper do."""
    figure, all_axes = _panels((7.5, 2.7 * len(rows) + 0.6), len(rows), 2)
    for pair_of_axes, row in zip(all_axes, rows, strict=True):
        first, second = row["adapters"]
        height, width = np.shape(row["phi"])
        # Pixel centres lie at whole numbers; entry [0, 0] compares the first directions.
        extent = (0.5, width + 0.5, height + 0.5, 0.5)
        for axes, key in zip(pair_of_axes, ("phi", "random"), strict=True):
            image = axes.imshow(row[key], vmin=0, vmax=1, extent=extent, aspect="auto", interpolation="nearest")
            axes.set(xlabel=f"directions of adapter {second}", ylabel=f"directions of adapter {first}")
            axes.set_title(f"{row['factor']}: {key}")
            axes.set_yticks(range(1, height + 1, math.ceil(height / 8)))
            axes.set_xticks(range(1, width + 1, math.ceil(width / 8)))
    figure.suptitle("Similarity of subspaces", fontsize=11)
    figure.colorbar(image, ax=all_axes, label="phi", shrink=0.8).ax.tick_params(colors=_INK)
    return figure


@_styled
def spectra(updates: Sequence[Mapping[str, Any]]) -> Figure:
    """Draws the singular values in analysis.json's ``updates``: a line for each layer, a colour for each kind."""
    adapters, kinds = (list(dict.fromkeys(update[key] for update in updates)) for key in ("adapter", "kind"))
    figure, (all_axes,) = _panels((4.5 * len(adapters) + 2, 3.8), 1, len(adapters), sharey=True)
    figure.suptitle("Singular values of the updates", fontsize=11)
    lines = {}
    for update in updates:
        S = [value / update["singular_values"][0] for value in update["singular_values"] if value > 0]
        axes = all_axes[adapters.index(update["adapter"])]
        colour = _COLOURS[kinds.index(update["kind"]) % len(_COLOURS)]
        (lines[update["kind"]],) = axes.plot(range(1, len(S) + 1), S, color=colour, marker="", lw=0.9, alpha=0.6)
    for axes, adapter in zip(all_axes, adapters, strict=True):
        axes.set(title=f"adapter {adapter}", xlabel="direction", ylabel="singular value / largest", yscale="log")
        axes.xaxis.get_major_locator().set_params(integer=True)
        axes.label_outer()
        axes.grid()
    if len(kinds) <= 20:
        all_axes[-1].legend(lines.values(), lines, loc="center left", bbox_to_anchor=(1.01, 0.5))
    return figure


@_styled
def amplification(rows: Sequence[Mapping[str, Any]]) -> Figure:
    """Draws analysis.json's ``by_rank``: how much updates amplify what the weights have in their directions."""
    figure, axes = _panel("Amplification, mean over layers", "leading directions of the update", "|dW| / |UᵀWV|")
    for adapter in dict.fromkeys(row["adapter"] for row in rows):
        points = [(row["rank"], row["amplification"]) for row in rows if row["adapter"] == adapter]
        axes.plot(*zip(*points, strict=True), label=f"adapter {adapter}")
    _rank_axis(axes, {row["rank"] for row in rows})
    axes.legend()
    return figure


def _rank_axis(axes: Axes, ranks: set[int]) -> None:
    axes.set_xscale("log")
    axes.set_xticks(sorted(ranks), map(str, sorted(ranks)))
    axes.minorticks_off()


def _panel(title: str, xlabel: str, ylabel: str, height: float = 3.4) -> tuple[Figure, Axes]:
    figure, ((axes,),) = _panels((6.8, height), 1, 1)
    axes.set(title=title, xlabel=xlabel, ylabel=ylabel)
    axes.grid()
    return figure, axes


def _panels(size: tuple[float, float], rows: int, columns: int, **shared: Any) -> tuple[Figure, np.ndarray]:
    figure = Figure(figsize=size, layout="constrained")
    all_axes = figure.subplots(rows, columns, squeeze=False, **shared)
    for axes in all_axes.flat:
        axes.tick_params(which="both", colors=_INK)
    return figure, all_axes


# --- for a page -------------------------------------------------------------------------------------------------------


def svg(figure: Figure) -> str:
    """Returns a figure as SVG without a date, for an ``<img>`` whose ink follows the page's light or dark mode."""
    stream = io.StringIO()
    # Text stays text, in a font that has its letters; equal figures have equal ids.
    with matplotlib.rc_context({"svg.fonttype": "none", "svg.hashsalt": "lora-ext"}):
        figure.savefig(stream, format="svg", transparent=True, metadata={"Date": None})
    ink = "svg { color: #1c1e21 } @media (prefers-color-scheme: dark) { svg { color: #e4e6e9 } }"
    return stream.getvalue().replace(_INK, "currentColor").replace("</style>", f"{ink}</style>", 1)
