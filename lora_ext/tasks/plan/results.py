"""Formats a plan: the rows of its table, the notes below, and the picture."""

from __future__ import annotations

import shlex
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from lora_ext.tasks.shared import markdown
from lora_ext.tasks.shared.whole_files import write_picture

KINDS = {  # kinds of memory: keys in plan.json and their names
    "weights": "weights",
    "optimizer_state": "optimizer state",
    "gradients": "gradients",
    "activations": "activations, temporaries",
}
_QUANTISED = "inject adapts models with int8 and nf4 weights: docs/quantized.md; finetune has --quantize."


def readable(count: float) -> str:
    """Formats bytes with three digits in a decimal unit: ``1.40 TB``, ``349 GB``, ``37.7 MB``."""
    if count < 1000:
        return f"{count:.0f} B"
    units = ["TB", "GB", "MB", "kB"]
    while (count := count / 1000) >= 999.5 and len(units) > 1:
        units.pop()
    digits = 2 if count < 9.995 else 1 if count < 99.95 else 0
    return f"{count:,.{digits}f} {units[-1]}"


def title(plan: Mapping[str, Any]) -> str:
    """Describes the model and the run in one line."""
    settings, run = plan["settings"], plan["settings"]["finetune"]
    extras = [settings["optimizer"], f"{run['batch_size']} x {run['max_length']} tokens", settings["device"]]
    if run["precision"] != "float32":
        extras.append(f"{run['precision']} by autocast")
    if settings["gradient_checkpointing"]:
        extras.append("gradient checkpointing")
    if settings["accumulation_steps"] > 1:
        extras.append(f"{settings['accumulation_steps']} batches accumulated")
    labels = f" of {plan['num_labels']} labels" if plan.get("num_labels") else ""
    return (
        f"{plan['model']}: {plan['model_type']}, {plan['parameters']:,} parameters, {plan['task']}{labels}; "
        f"{settings['dtype']} weights, {', '.join(extras)}"
    )


def rows(plan: Mapping[str, Any]) -> list[list[str]]:
    """Returns the table, with a column for full fine-tuning, the method, and inference."""
    runs = plan["runs"]

    def row(name: str, cell: Callable[[str, Mapping[str, Any]], str]) -> list[str]:
        return [name, *(cell(label, run) for label, run in runs.items())]

    def of_trained(key: str) -> Callable[[str, Mapping[str, Any]], str]:
        return lambda label, run: readable(run[key]) if key in run else ""

    table = [
        ["", *runs],
        row("parameters trained", lambda label, run: f"{run.get('trained_parameters', 0):,}"),
        *(row(text, lambda label, run, key=key: readable(run[key])) for key, text in KINDS.items()),
        row("peak", lambda label, run: readable(run["peak"])),
        row("when", lambda label, run: run["moment"]),
        row("kept for the backward", lambda label, run: readable(run["kept"])),
        row("all gradients", lambda label, run: readable(run["all_gradients"])),
        row("checkpoint", of_trained("checkpoint_bytes")),
        row("checkpoint in 16 bits", of_trained("checkpoint_16_bit_bytes")),
    ]
    disk = plan["disk"]
    tasks = f"{disk['tasks']} tasks on disk"
    table.append(
        row(tasks, lambda label, run: readable(disk["tasks_bytes"][label]) if label in disk["tasks_bytes"] else "")
    )
    if disk["checkpoints"] is not None:
        size = readable(plan["settings"]["disk"])
        table.append(row(f"checkpoints on {size}", lambda label, run: _count(disk["checkpoints"].get(label))))
    return table


def _count(number: int | None) -> str:
    return "" if number is None else f"{number:,}"


def notes(plan: Mapping[str, Any]) -> list[str]:
    """Returns the warnings, which runs fit into the memory, and which changes would make the method fit."""
    return [f"warning: {line}" for line in plan["warnings"]] + _fitting(plan) + _devices(plan)


def _devices(plan: Mapping[str, Any]) -> list[str]:
    if plan.get("devices") is None:  # older files have none
        return []
    devices, split = plan["settings"]["devices"], plan["settings"]["tensor_parallel"]
    shape = f"{devices // split} x {split}: sharded by FSDP2 over {devices // split}, layers split over {split}"
    lines = [f"predicted on {devices} devices ({shape}; {plan['devices']['hardware']['name']}), each:"]
    for name, run in plan["devices"]["runs"].items():
        traffic = run["gathered_bytes"] + run["scattered_bytes"]
        lines += [
            f"  {name}: {readable(run['memory'])} at the peak",
            f"  {name}: receives {readable(traffic)} for FSDP2 ({readable(run['adapter_gathered_bytes'])} for "
            f"trained parameters), {readable(run['reduced_bytes'])} for split layers "
            f"({readable(run['adapter_reduced_bytes'])} for adapters)",
            f"  {name}: a step takes {run['step_seconds']:.3g} s: arithmetic {run['compute_seconds']:.3g} s, meanwhile "
            f"FSDP2 {run['sharding_seconds']:.3g} s, then split layers {run['reduce_seconds']:.3g} s; "
            f"{run['tokens_per_second']:,.0f} tokens per second on all devices",
        ]
    return lines


def _fitting(plan: Mapping[str, Any]) -> list[str]:
    capacity, method = plan["capacity"], plan["method"]
    if capacity is None:
        return []
    lines = []
    room = f"{readable(capacity['usable'])} ({readable(plan['settings']['gpu_memory'])} less the reserve)"
    for name, fits in capacity["fits"].items():
        lines.append(f"{name} {'fits' if fits else 'does not fit'} into {room}: {readable(plan['runs'][name]['peak'])}")
    if capacity["fits"][method]:
        return [*lines, *_as_options(plan["finetune_options"], "")]
    if not capacity["changes"]:
        return [*lines, f"{method} would not fit with any change that was tried."]
    lines.append(f"{method} fits with one of these:")
    for change in capacity["changes"]:
        per_device = " each" if change["devices"] > 1 else ""
        lines.append(f"  {' and '.join(change['what'])}: {readable(change['peak'])}{per_device}")
        lines += _as_options(change["finetune_options"], "    ")
    if any(change["setup"]["dtype"] in ("int8", "nf4") for change in capacity["changes"]):
        lines.append(_QUANTISED)
    return lines


def _as_options(options: Sequence[str] | None, indent: str) -> list[str]:
    return [] if options is None else [f"{indent}lora-ext finetune {shlex.join(options)}"]


def document(plan: Mapping[str, Any]) -> str:
    """Returns the content of plan.md."""
    heading, *table = rows(plan)
    listed = [_listed(line) for line in notes(plan)]
    return "\n\n".join([f"# {title(plan)}", markdown.table(heading, table), *listed]) + "\n"


def _listed(line: str) -> str:
    if line.lstrip().startswith("lora-ext "):
        return f"    {line.strip()}" if not line.startswith(" ") else f"      {line.strip()}"
    return f"- {line.strip()}" if line.startswith("  ") else line


def plot(path: Path, plan: Mapping[str, Any]) -> None:
    """Plots a bar for each run: what its memory holds at the peak."""
    from matplotlib.figure import Figure  # here, because matplotlib is optional

    runs = dict(reversed(plan["runs"].items()))
    unit, divisor = ("GB", 1e9) if max(run["peak"] for run in runs.values()) >= 1e9 else ("MB", 1e6)
    figure = Figure(figsize=(8, 1.4 + 0.6 * len(runs)), layout="constrained")
    axes = figure.subplots()
    ends = [0.0] * len(runs)
    for key, text in KINDS.items():
        widths = [run[key] / divisor for run in runs.values()]
        axes.barh(list(runs), widths, left=ends, label=text)
        ends = [end + width for end, width in zip(ends, widths, strict=True)]
    if plan["settings"]["gpu_memory"] is not None:
        axes.axvline(plan["capacity"]["usable"] / divisor, color="black", linestyle="--", label="usable")
    axes.set(xlabel=f"{unit} at the peak", title=f"{plan['model']}, {plan['settings']['dtype']}")
    axes.legend(loc="upper center", bbox_to_anchor=(0.5, -0.3), ncols=3, frameon=False)
    write_picture(path, figure)
