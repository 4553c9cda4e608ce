"""The result file of a GPU check, and the tables that it prints.

benchmarks/results/<card>/gpu_check.json has an entry for each part. A part that runs replaces its own entry at once and
leaves the others, so that a check can be continued, part by part; each says of which commit and torch it is.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "benchmarks")]

SAME = ("commit", "torch", "driver")  # a part that passed with the same ones is not run again by --continue


def read_json(path: Path) -> Any:
    """Returns a JSON file's content; None if there is none, or none that is whole."""
    try:
        return json.loads(path.read_text())
    except (OSError, ValueError):
        return None


def read_result(path: Path) -> dict:
    """Returns the result file's content, or one without parts."""
    result = read_json(path)
    return result if isinstance(result, dict) and isinstance(result.get("parts"), dict) else {"parts": {}}


def add_entry(path: Path, facts: dict[str, str], name: str, entry: dict[str, Any]) -> None:
    """Puts a part's outcome into the result file. A part that did not start replaces no other."""
    result = read_result(path)
    if entry["seconds"] == 0.0 and name in result["parts"]:
        return
    entry = entry | {"facts": {name: value for name, value in facts.items() if name != "card"}}
    path.parent.mkdir(parents=True, exist_ok=True)
    new = path.with_suffix(".new")
    new.write_text(json.dumps({"card": facts["card"], "parts": result["parts"] | {name: entry}}, indent=1) + "\n")
    new.replace(path)


def has_passed(name: str, result: dict, facts: dict[str, str]) -> bool:
    """Whether a part passed with this commit, torch and driver."""
    entry = result["parts"].get(name, {})
    same = all(entry.get("facts", {}).get(key) == facts[key] for key in SAME)
    return entry.get("status") == "passed" and same and not facts["commit"].endswith("+changes")


def format_report(result: dict, facts: dict[str, str], order: list[str]) -> str:
    """Formats tables of the parts, of what was measured, and of measured next to predicted."""
    lines = [f"{facts['card']}, driver {facts['driver']}, torch {facts['torch']}, commit {facts['commit'][:12]}"]
    lines[0] += f", {facts['date']}"
    lines += ["", "| part | status | seconds | |", "|---|---|---|---|"]
    for name in [*order, *(name for name in result["parts"] if name not in order)]:
        if not (part := result["parts"].get(name)):
            lines.append(f"| {name} | not run | 0 | not in this run, nor before |")
            continue
        detail = part["detail"][:100]
        if other := [f"{key} {part['facts'][key][:12]}" for key in SAME if part["facts"].get(key) != facts[key]]:
            detail = f"({', '.join(other)}) {detail}"
        lines.append(f"| {name} | {part['status']} | {part['seconds']:.0f} | {detail} |")
        lines += [f"| | | | failed: {test} |" for test in part["failures"]]
    if any(part.get("measured") for part in result["parts"].values()):
        try:
            lines += _figures(result, facts)
        except ImportError as error:  # the benchmarks import lora_ext, which may not be built
            lines += ["", f"No tables of the figures, which are in the result file: {error}"]
    return "\n".join(lines)


def _figures(result: dict, facts: dict[str, str]) -> list[str]:
    """Formats what was measured, and measured next to predicted. ImportError: lora_ext is not built."""
    import bench_grouped
    import bench_kernels
    import bench_layer
    import bench_siblings
    import predictions
    from harness import report

    lines: list[str] = []
    measured = {name: part["measured"] for name, part in result["parts"].items() if part.get("measured")}
    kernels = measured.get("kernels")
    rates = kernels["ceilings"] if kernels else None
    if rates:
        copy, *matrix = rates.items()
        products = ", ".join(f"{name.removeprefix('matrix_')} {value / 1e12:.0f}" for name, value in matrix)
        lines += ["", f"copy {copy[1] / 1e9:.0f} GB/s; matrix products, TFLOP/s: {products}"]
        lines += ["", bench_kernels.table(kernels["rows"])]
    tables = {"layer": bench_layer, "siblings": bench_siblings, "grouped": bench_grouped, "rivals": bench_layer}
    for name, benchmark in tables.items():
        if name in measured:
            lines += ["", f"{name}:", "", benchmark.table(measured[name])]
    if host := measured.get("host"):
        columns = ["host time of a call, us", *host[0]["microseconds"]]
        cells = [[row["pass"], *(f"{us:.0f}" for us in row["microseconds"].values())] for row in host]
        lines += ["", report.markdown(columns, cells)]
    card = predictions.card_named(facts["card"], rates)
    if card is None or measured.keys() <= {"rivals"}:
        return lines
    rates_of = f"{card.bytes_s / 1e12:.2f} TB/s, {card.flops_s / 1e12:.0f} TFLOP/s"
    lines += ["", f"Measured next to predicted (benchmarks/predictions.py, {card.name} at {rates_of}):"]
    if kernels:
        lines += ["", predictions.beside_stages(kernels["rows"], card)]
    if "layer" in measured or "siblings" in measured:
        ratios = measured.get("layer", []), measured.get("siblings", [])
        lines += ["", predictions.beside_ratios(*ratios, 16, card)]
    if "grouped" in measured:
        lines += ["", predictions.beside_rows(measured["grouped"], 16, card)]
    if host:
        lines += ["", predictions.beside_host(host)]
    return lines
