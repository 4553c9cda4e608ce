"""The result file of a GPU check, and what it prints.

benchmarks/results/<card>/gpu_check.json has an entry for each part. A part that runs replaces its own entry at once and
leaves the others, so that a check can be continued, part by part; each says of which commit and torch it is.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

from timed_parts import LOGS, NOT_RUN, PASSED, ROOT, Outcome, Part

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


def add_outcome(path: Path, facts: dict[str, str], outcome: Outcome, measures: str = "") -> None:
    """Puts a part's outcome and its figures into the result file. A part that did not start replaces no figures."""
    result = read_result(path)
    before = result["parts"].get(outcome.name)
    if outcome.seconds == 0.0 and before and before["seconds"]:
        return
    entry = {name: value for name, value in vars(outcome).items() if name not in ("name", "optional")}
    entry["facts"] = {name: value for name, value in facts.items() if name != "card"}
    if measures:
        entry["measured"] = read_json(LOGS / measures)
    parts = result["parts"] | {outcome.name: entry}
    path.parent.mkdir(parents=True, exist_ok=True)
    new = path.with_suffix(".new")
    new.write_text(json.dumps({"card": facts["card"], "parts": parts}, indent=1) + "\n")
    new.replace(path)


def not_yet_passed(parts: list[Part], result: dict, facts: dict[str, str]) -> list[Part]:
    """Returns the parts without an entry that passed with this commit, torch and driver."""

    def passed(part: Part) -> bool:
        entry = result["parts"].get(part.name, {})
        same = all(entry.get("facts", {}).get(name) == facts[name] for name in SAME)
        return entry.get("status") == PASSED and same and not facts["commit"].endswith("+changes")

    return [part for part in parts if not passed(part)]


def measured(result: dict, name: str) -> Any:
    return result["parts"].get(name, {}).get("measured")


def parts_table(result: dict, facts: dict[str, str], order: list[str]) -> list[str]:
    """Formats the parts in their order, and where one is of another commit or torch."""
    lines = ["| part | status | seconds | |", "|---|---|---|---|"]
    for name in [*order, *(name for name in result["parts"] if name not in order)]:
        if not (part := result["parts"].get(name)):
            lines.append(f"| {name} | {NOT_RUN} | 0 | not in this run, nor before |")
            continue
        detail = part["detail"][:100]
        if other := [f"{key} {part['facts'][key][:12]}" for key in SAME if part["facts"].get(key) != facts[key]]:
            detail = f"({', '.join(other)}) {detail}"
        lines.append(f"| {name} | {part['status']} | {part['seconds']:.0f} | {detail} |")
        lines += [f"| | | | failed: {test} |" for test in part["failures"]]
    return lines


def format_report(result: dict, facts: dict[str, str], order: list[str]) -> str:
    """Formats tables of the parts, of what was measured, and of measured next to predicted."""
    lines = [f"{facts['card']}, driver {facts['driver']}, torch {facts['torch']}, nvcc {facts['nvcc']}"]
    lines[0] += f", commit {facts['commit'][:12]}, {facts['date']}"
    lines += ["", *parts_table(result, facts, order)]
    if any(part.get("measured") for part in result["parts"].values()):
        try:
            lines += figures_tables(result, facts)
        except ImportError as error:  # the benchmarks import lora_ext, which may not be built
            lines += ["", f"No tables of the figures, which are in the result file: {error}"]
    return "\n".join(lines)


def figures_tables(result: dict, facts: dict[str, str]) -> list[str]:
    """Formats what was measured, and measured next to predicted. ImportError: lora_ext is not built."""
    import bench_grouped
    import bench_kernels
    import bench_layer
    import bench_siblings
    import predictions
    from harness import report

    lines: list[str] = []
    kernels, layer = measured(result, "kernels"), measured(result, "layer")
    siblings, host, grouped, rivals = (measured(result, name) for name in ("siblings", "host", "grouped", "rivals"))
    rates = kernels["ceilings"] if kernels else None
    if rates:
        copy, *matrix = rates.items()
        products = ", ".join(f"{name.removeprefix('matrix_')} {value / 1e12:.0f}" for name, value in matrix)
        lines += ["", f"copy {copy[1] / 1e9:.0f} GB/s; matrix products, TFLOP/s: {products}"]
        lines += ["", bench_kernels.table(kernels["rows"])]
    if layer:
        lines += ["", bench_layer.table(layer)]
    if siblings:
        lines += ["", bench_siblings.table(siblings)]
    if grouped:
        lines += ["", bench_grouped.table(grouped)]
    if rivals:
        lines += ["", "Rivals, in a process of their own:", "", bench_layer.table(rivals)]
    if host:
        columns = ["host time of a call, us", *host[0]["microseconds"]]
        cells = [[row["pass"], *(f"{us:.0f}" for us in row["microseconds"].values())] for row in host]
        lines += ["", report.markdown(columns, cells)]
    card = predictions.card_named(facts["card"], rates)
    if card is None or not any((kernels, layer, siblings, host, grouped)):
        return lines
    rates_of = f"{card.bytes_s / 1e12:.2f} TB/s, {card.flops_s / 1e12:.0f} TFLOP/s"
    lines += ["", f"Measured next to predicted (benchmarks/predictions.py, {card.name} at {rates_of}):"]
    if kernels:
        lines += ["", predictions.beside_stages(kernels["rows"], card)]
    if layer or siblings:
        lines += ["", predictions.beside_ratios(layer or [], siblings or [], 16, card)]
    if grouped:
        lines += ["", predictions.beside_rows(grouped, 16, card)]
    if host:
        lines += ["", predictions.beside_host(host)]
    return lines
