"""Draws the pictures of the results from their JSON files, without measuring.

    python benchmarks/plots.py [--results DIR] [--device cpu] [--machine-isa avx2]

layer: bars against the frozen layer. decode: cost by tokens. A picture whose JSON file is missing is left out and
reported. layers.svg, in benchmarks/results, shows layers of several machines: the picture of README.md.

Text has a grey and the background no colour, so that the pictures are readable in light and dark themes.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable
from pathlib import Path

import matplotlib
from harness.report import results_folder
from matplotlib.axes import Axes
from matplotlib.figure import Figure

INK = "#767676"  # contrast of 4.5 to white and to black
# Okabe and Ito's colours, which colour-blind readers can distinguish.
COLOURS = {
    "lora_ext": "#0072B2",
    "peft": "#D55E00",
    "peft accelerated": "#56B4E9",
    "loralib": "#E69F00",
    "hand-written": "#009E73",
    "compiled": "#CC79A7",
    "frozen": INK,
}
DTYPES = ("float32", "bfloat16", "float16")
WIDTH = 10  # inches
MACHINES = {"AMD EPYC (Zen 4)": "amd_epyc", "Intel Xeon with AMX": "intel_xeon"}
SHOWN = [[512, 768, 768], [1024, 2048, 2048], [2048, 4096, 4096]]  # of layers.svg
_styled = matplotlib.rc_context(
    dict.fromkeys(("text.color", "axes.labelcolor", "axes.edgecolor", "xtick.color", "ytick.color"), INK)
)


def _figure(height: float, title: str, heading: str) -> Figure:
    """Makes a figure. heading: the result's heading: what was measured; then the machine."""
    figure = Figure(figsize=(WIDTH, height), layout="constrained")
    where = heading.partition("; ")[2].replace("; medians (quartiles)", "")
    figure.suptitle(f"{title}\n", fontsize=12)
    figure.text(0.5, 0.985 - 0.24 / height, where, ha="center", va="top", fontsize=7)
    return figure


def _dtypes(rows: list[dict]) -> list[str]:
    return [dtype for dtype in DTYPES if any(row["dtype"] == dtype for row in rows)]


def _clean(axes: Axes) -> None:
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(axis="y", alpha=0.25, linewidth=0.6)
    axes.set_axisbelow(True)


def _frozen_line(axes: Axes) -> None:
    axes.axhline(1.0, color=COLOURS["frozen"], linewidth=1.0, linestyle="--")


# --- bars -------------------------------------------------------------------------------------------------------------


@_styled
def layer(result: dict) -> Figure:
    """Draws forward plus backward with dropout: a panel for each dtype, a group of bars for each shape."""
    rows = training_rows(result)
    dtypes = _dtypes(rows)
    title = f"One LoRA layer, forward + backward with dropout {rows[0]['dropout']:g}, against the frozen layer"
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
                axes.vlines(x, low, high, color=INK, linewidth=0.7)
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


@_styled
def layers_of_machines(results: dict[str, dict]) -> Figure:
    """Draws a panel for each machine: bars of lora_ext and of PEFT for the layers of ``SHOWN`` in each dtype."""
    figure = Figure(figsize=(WIDTH, 3.2), layout="constrained")
    panels = figure.subplots(1, len(results), squeeze=False)[0]
    for axes, (machine, result) in zip(panels, results.items(), strict=True):
        rows = [row for row in training_rows(result) if row["shape"] in SHOWN]
        rows.sort(key=lambda row: DTYPES.index(row["dtype"]))
        for group, row in enumerate(rows):
            for place, name, label in ((-0.2, "lora_ext", "lora_ext"), (0.2, "peft", "PEFT")):
                middle, low, high = row["ratio"][name]
                axes.bar(group + place, middle, 0.38, color=COLOURS[name], label=None if group else label)
                axes.vlines(group + place, low, high, color=INK, linewidth=0.8)
                axes.text(group + place, high, f"{middle:.2f}", ha="center", va="bottom", fontsize=7)
        axes.set_xticks(range(len(rows)), [f"{row['shape'][2]}\n{row['dtype']}" for row in rows], fontsize=8)
        axes.set_xlabel("features in and out, dtype", fontsize=9)
        axes.set_title(f"{machine}, dropout {rows[0]['dropout']:g}", fontsize=10)
        axes.set_ylabel("time of a step, times the frozen layer", fontsize=9)
        axes.legend(fontsize=8, frameon=False, loc="upper left")
        _clean(axes)
        _frozen_line(axes)
    return figure


def training_rows(result: dict) -> list[dict]:
    """Returns the rows of forward and backward with dropout."""
    dropout = max(row["dropout"] for row in result["rows"])
    return [row for row in result["rows"] if row["pass"] == "forward + backward" and row["dropout"] == dropout]


# --- lines -----------------------------------------------------------------------------------------------------------


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
    axes.set_xscale("log", base=2)
    axes.set_xticks([x for x, _ in points], [str(x) for x, _ in points], fontsize=8)
    axes.minorticks_off()
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


@_styled
def decode(result: dict) -> Figure:
    """Draws a row of panels for each dtype, which share a scale, and a column for each width."""
    rows, dtypes = result["rows"], _dtypes(result["rows"])
    widths = list(dict.fromkeys(tuple(row["shape"][1:]) for row in rows))
    names = list(dict.fromkeys(name for row in rows for name in row["ratio"]))
    title = "Decoding with an unmerged adapter, times the frozen layer"
    figure = _figure(1.1 + 2.3 * len(dtypes), title, result["heading"])
    grid = figure.subplots(len(dtypes), len(widths), squeeze=False, sharey="row")
    for dtype, line in zip(dtypes, grid, strict=True):
        of_dtype = [row for row in rows if row["dtype"] == dtype]
        for width, axes in zip(widths, line, strict=True):
            axes.set_xlabel("tokens  ({} → {})".format(*width), fontsize=9)
            points = [(row["shape"][0], row["ratio"]) for row in of_dtype if tuple(row["shape"][1:]) == width]
            if points:
                _lines(axes, points, names)
            else:
                axes.set_axis_off()
        medians = [values[0] for row in of_dtype for values in row["ratio"].values()]
        margin = max(max(medians) - 1, 0.05) * 0.12
        line[0].set_ylim(min(*medians, 1) - margin, max(medians) + margin)
        line[0].set_ylabel(f"{dtype}\ntimes the frozen layer", fontsize=9)
        for axes in line:
            _name_lines(axes)
    return figure


# --- files ------------------------------------------------------------------------------------------------------------

PICTURES: dict[str, Callable[[dict], Figure]] = {"layer": layer, "decode": decode}


def draw(results: Path, suffix: str, say: Callable[[str], None] = print) -> list[Path]:
    """Writes <name>_<suffix>.svg next to each <name>_<suffix>.json. suffix: "cpu", "cuda", "cpu_avx2"."""
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
        written.append(save(picture(result), source.with_suffix(".svg")))
    return written


def draw_machines(results: Path) -> list[Path]:
    """Writes layers.svg into the folder ``results`` if all machines that it shows have results there."""
    files = {machine: results / folder / "layer_cpu.json" for machine, folder in MACHINES.items()}
    if not all(path.is_file() for path in files.values()):
        return []
    figure = layers_of_machines({machine: json.loads(path.read_text()) for machine, path in files.items()})
    return [save(figure, results / "layers.svg")]


def save(figure: Figure, path: Path) -> Path:
    # Text stays text, with one font instead of a list at every label; equal figures are equal files.
    style = {"svg.fonttype": "none", "svg.hashsalt": "lora_ext", "font.sans-serif": ["DejaVu Sans", "sans-serif"]}
    with matplotlib.rc_context(style):
        figure.savefig(path, transparent=True, metadata={"Date": None})
    return path


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--results", type=Path, help="folder of the JSON files; this machine's in benchmarks/results")
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    parser.add_argument("--machine-isa")
    args = parser.parse_args()
    results = args.results or results_folder(args.device)
    written = draw(results, f"{args.device}_{args.machine_isa}" if args.machine_isa else args.device)
    written += draw_machines(results.parent)
    print("\n".join(path.name for path in written))
    return 0 if written else 1


if __name__ == "__main__":
    sys.exit(main())
