"""Draws the pictures of the results from their JSON files, without measuring.

    python benchmarks/plots.py [--results DIR] [--device cpu] [--machine-isa avx2]

layer: bars against the frozen layer. curves: cost by rank, tokens and width. decode: cost by tokens. roofline: achieved
rates against the machine's ceilings. A picture whose JSON file is missing is left out and reported.
"""

from __future__ import annotations

import argparse
import io
import json
import sys
from collections.abc import Callable
from pathlib import Path

from harness.report import results_folder
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from PIL import Image

# Okabe and Ito's colours, which colour-blind readers can distinguish.
COLOURS = {
    "lora_ext": "#0072B2",
    "peft": "#D55E00",
    "peft accelerated": "#56B4E9",
    "loralib": "#E69F00",
    "hand-written": "#009E73",
    "compiled": "#CC79A7",
    "frozen": "#555555",
}
DTYPES = ("float32", "bfloat16", "float16")
DPI, WIDTH = 100, 10  # 1000 pixels


def _figure(height: float, title: str, heading: str) -> Figure:
    """Makes a figure. heading: the result's heading: what was measured; then the machine."""
    figure = Figure(figsize=(WIDTH, height), dpi=DPI, layout="constrained")
    where = heading.partition("; ")[2].replace("; medians (quartiles)", "")
    figure.suptitle(f"{title}\n", fontsize=12)
    figure.text(0.5, 0.985 - 0.24 / height, where, ha="center", va="top", fontsize=7, color="#555555")
    return figure


def _dtypes(rows: list[dict]) -> list[str]:
    return [dtype for dtype in DTYPES if any(row["dtype"] == dtype for row in rows)]


def _clean(axes: Axes) -> None:
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(axis="y", alpha=0.25, linewidth=0.6)
    axes.set_axisbelow(True)


def _frozen_line(axes: Axes) -> None:
    axes.axhline(1.0, color=COLOURS["frozen"], linewidth=1.0, linestyle="--")


def _powers_of_two(axes: Axes, values: list[int]) -> None:
    axes.set_xscale("log", base=2)
    axes.set_xticks(values, [str(value) for value in values], fontsize=8)
    axes.minorticks_off()


# --- bars -------------------------------------------------------------------------------------------------------------


def layer(result: dict) -> Figure:
    """Draws forward plus backward with dropout: a panel for each dtype, a group of bars for each shape."""
    dropout = max(row["dropout"] for row in result["rows"])
    rows = [row for row in result["rows"] if row["pass"] == "forward + backward" and row["dropout"] == dropout]
    dtypes = _dtypes(rows)
    title = f"One LoRA layer, forward + backward with dropout {dropout:g}, against the frozen layer"
    figure = _figure(1.1 + 2.4 * len(dtypes), title, result["heading"])
    names = list(dict.fromkeys(name for row in rows for name in row["ratio"]))
    for axes, dtype in zip(figure.subplots(len(dtypes), 1, squeeze=False)[:, 0], dtypes, strict=True):
        shown = [row for row in rows if row["dtype"] == dtype]
        for group, row in enumerate(shown):
            present = [name for name in names if name in row["ratio"]]
            for bar, name in enumerate(present):
                middle, low, high = row["ratio"][name]
                x = group + (bar - (len(present) - 1) / 2) * 0.14
                label = name if group == 0 else None
                axes.bar(x, middle, 0.13, color=COLOURS[name], label=label)
                axes.vlines(x, low, high, color="black", linewidth=0.7)
                axes.text(x, max(middle, high), f"{middle:.2f}", ha="center", va="bottom", fontsize=7)
        labels = ["{} x {} → {}\nfrozen {:.3g} ms".format(*row["shape"], row["frozen_ms"]) for row in shown]
        axes.set_xticks(range(len(shown)), labels, fontsize=8)
        axes.set_ylabel(f"{dtype}\ntimes the frozen layer", fontsize=9)
        _clean(axes)
        _frozen_line(axes)
    handles = {
        label: handle for axes in figure.axes for handle, label in zip(*axes.get_legend_handles_labels(), strict=True)
    }
    for name in names:  # contestants missing in every first group
        handles.setdefault(name, figure.axes[0].bar(0, 0, color=COLOURS[name]))
    figure.axes[0].legend([handles[name] for name in names], names, ncols=len(names), fontsize=8, frameon=False)
    return figure


# --- curves -----------------------------------------------------------------------------------------------------------


def _lines(axes: Axes, points: list[tuple[int, dict]], names: list[str]) -> None:
    """Draws a line for each contestant, with a band between the quartiles."""
    for name in names:
        measured = [(x, ratios[name]) for x, ratios in points if name in ratios]
        if not measured:
            continue
        xs = [x for x, _ in measured]
        middle, low, high = zip(*(values for _, values in measured), strict=True)
        axes.fill_between(xs, low, high, color=COLOURS[name], alpha=0.15, linewidth=0)
        axes.plot(xs, middle, marker="o", markersize=3.5, linewidth=1.5, color=COLOURS[name], label=name)
    _powers_of_two(axes, [x for x, _ in points])
    _clean(axes)
    _frozen_line(axes)
    axes.margins(x=0.05)


def _name_lines(axes: Axes) -> None:
    """Labels lines at their ends, after the limits are set; moves labels apart that would overlap."""
    bottom, top = axes.get_ylim()
    least, last = (top - bottom) * 0.085, float("-inf")
    lines = [line for line in axes.get_lines() if line.get_label() in COLOURS]
    for line in sorted(lines, key=lambda line: line.get_ydata()[-1]):
        last = max(line.get_ydata()[-1], last + least)
        place, colour = (line.get_xdata()[-1], last), line.get_color()
        axes.annotate(
            line.get_label(), place, (6, 0), textcoords="offset points", va="center", fontsize=8, color=colour
        )


def _grid(
    figure: Figure, rows: list[dict], columns: list, points_of: Callable[[dict, object], tuple[int, dict] | None]
) -> list[list[Axes]]:
    """Draws a panel per dtype and column; a dtype shares its scale. points_of: a row's point in a column, or None."""
    dtypes, names = _dtypes(rows), list(dict.fromkeys(name for row in rows for name in row["ratio"]))
    grid = figure.subplots(len(dtypes), len(columns), squeeze=False, sharey="row")
    for dtype, line in zip(dtypes, grid, strict=True):
        of_dtype = [row for row in rows if row["dtype"] == dtype]
        for column, axes in zip(columns, line, strict=True):
            points = [point for row in of_dtype if (point := points_of(row, column))]
            if points:
                _lines(axes, points, names)
            else:
                axes.set_axis_off()
        highest = max(values[0] for row in of_dtype for values in row["ratio"].values())
        lowest = min(values[0] for row in of_dtype for values in row["ratio"].values())
        room = max(highest - 1, 0.05) * 0.12
        line[0].set_ylim(min(lowest, 1) - room, highest + room)
        line[0].set_ylabel(f"{dtype}\ntimes the frozen layer", fontsize=9)
        for axes in line:
            _name_lines(axes)
    return grid


def curves(result: dict) -> Figure:
    """Draws a column for each size that varies."""
    fixed = result["fixed"]
    title = "Cost of an adapter in forward + backward, times the frozen layer"
    figure = _figure(1.1 + 2.3 * len(_dtypes(result["rows"])), title, result["heading"])

    def point(row: dict, axis: object) -> tuple[int, dict] | None:
        return (row[axis], row["ratio"]) if row["axis"] == axis else None

    for line in _grid(figure, result["rows"], list(fixed), point):
        for axis, axes in zip(fixed, line, strict=True):
            others = ", ".join(f"{other} {value}" for other, value in fixed.items() if other != axis)
            axes.set_xlabel(f"{axis}  ({others})", fontsize=9)
    return figure


def decode(result: dict) -> Figure:
    """Draws a column for each width."""
    rows = result["rows"]
    widths = list(dict.fromkeys(tuple(row["shape"][1:]) for row in rows))
    title = "Decoding with an unmerged adapter, times the frozen layer"
    figure = _figure(1.1 + 2.3 * len(_dtypes(rows)), title, result["heading"])

    def point(row: dict, width: object) -> tuple[int, dict] | None:
        return (row["shape"][0], row["ratio"]) if tuple(row["shape"][1:]) == width else None

    for line in _grid(figure, rows, widths, point):
        for width, axes in zip(widths, line, strict=True):
            axes.set_xlabel("tokens  ({} → {})".format(*width), fontsize=9)
    return figure


# --- roofline ---------------------------------------------------------------------------------------------------------

MARKERS = {"forward": "o", "forward + backward": "s", "decode": "^", "merge": "D"}


def roofline(result: dict) -> Figure:
    """Draws a panel for each dtype: operations a second by operations per byte, below the measured ceilings."""
    rows, rates = result["rows"], result["ceilings"]
    dtypes = _dtypes(rows)
    figure = _figure(4.9, "Achieved rates against the machine's ceilings", result["heading"])
    for axes, dtype in zip(figure.subplots(1, len(dtypes), squeeze=False)[0], dtypes, strict=True):
        shown = [row for row in rows if row["dtype"] == dtype]
        product = rates[f"matrix_{dtype}"]
        low = min(row["flops_per_byte"] for row in shown) / 2
        high = max(max(row["flops_per_byte"] for row in shown) * 2, 2 * product / rates["copy"])
        for key, label, style in (("copy", "copy", "-"), ("copy_in_cache", "copy in cache", ":")):
            if key in rates:
                ridge = product / rates[key]
                axes.plot([low, ridge], [low * rates[key], product], style, color="black", linewidth=1.2)
                text = f"{label}, {rates[key] / 1e9:.0f} GB/s"
                if key == "copy":  # label right of its foot, the other's left of its head: no line passes there
                    axes.annotate(text, (low, low * rates[key]), (14, -2), textcoords="offset points", fontsize=8)
                else:
                    place = {"xytext": (-36, -2), "textcoords": "offset points", "ha": "right", "fontsize": 8}
                    axes.annotate(text.replace(", ", "\n"), (ridge, product), va="top", **place)
        ridge = product / max(rates[key] for key in ("copy", "copy_in_cache") if key in rates)
        axes.plot([ridge, high], [product, product], "-", color="black", linewidth=1.2)
        text = f"product, {product / 1e9:,.0f} GFLOP/s"
        axes.annotate(text, (high, product), (0, 5), textcoords="offset points", fontsize=8, ha="right")
        for row in shown:
            colour = COLOURS[row["contestant"]]
            filled = row["contestant"] != "frozen"
            axes.plot(
                row["flops_per_byte"],
                row["flop_s"],
                MARKERS[row["what"]],
                markersize=6,
                markerfacecolor=colour if filled else "none",
                markeredgecolor=colour,
                alpha=0.9,
            )
            if filled and row["what"] in ("decode", "merge"):
                tokens = row["shape"][0]
                text = "merge" if row["what"] == "merge" else f"{tokens} token{'s' if tokens > 1 else ''}"
                place = row["flops_per_byte"], row["flop_s"]
                axes.annotate(text, place, (7, -4), textcoords="offset points", fontsize=8, color=colour)
        axes.set(xscale="log", yscale="log", xlabel=f"FLOP per byte ({dtype})", ylabel="FLOP/s")
        _clean(axes)
        for what in dict.fromkeys(row["what"] for row in shown):
            axes.plot([], [], MARKERS[what], color=COLOURS["lora_ext"], label=what)
        axes.plot([], [], "o", markerfacecolor="none", markeredgecolor=COLOURS["frozen"], label="frozen layer")
        axes.legend(fontsize=8, frameon=False, loc="lower right")
    return figure


# --- files ------------------------------------------------------------------------------------------------------------

PICTURES: dict[str, Callable[[dict], Figure]] = {
    "layer": layer,
    "curves": curves,
    "decode": decode,
    "roofline": roofline,
}


def draw(results: Path, suffix: str, say: Callable[[str], None] = print) -> list[Path]:
    """Writes <name>_<suffix>.png next to each <name>_<suffix>.json. suffix: "cpu", "cuda", "cpu_avx2"."""
    written = []
    for name, picture in PICTURES.items():
        source = results / f"{name}_{suffix}.json"
        if not source.is_file():
            say(f"{source.name} is missing: no picture of it")
            continue
        result = json.loads(source.read_text())
        if not result["rows"]:
            say(f"{source.name} has no rows: no picture of it")
            continue
        drawn = io.BytesIO()
        picture(result).savefig(drawn)
        # Lines and letters need only a palette, which makes the file a third of the size.
        Image.open(drawn).convert("RGB").quantize(64).save(source.with_suffix(".png"), optimize=True)
        written.append(source.with_suffix(".png"))
    return written


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--results", type=Path, help="folder of the JSON files; this machine's in benchmarks/results")
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    parser.add_argument("--machine-isa")
    args = parser.parse_args()
    results = args.results or results_folder(args.device)
    written = draw(results, f"{args.device}_{args.machine_isa}" if args.machine_isa else args.device)
    print("\n".join(path.name for path in written))
    return 0 if written else 1


if __name__ == "__main__":
    sys.exit(main())
