"""The section on ``plan``: the memory of training by kind, whether it fits, and changes that make it fit."""

from __future__ import annotations

import shlex
from collections.abc import Iterator, Mapping
from typing import Any

from lora_ext.tasks.report.charts import Bar, Chart, bar_chart
from lora_ext.tasks.report.pictures import Pictures
from lora_ext.tasks.report.results import Result
from lora_ext.tasks.report.tables import Table, cell, table

_Memories = Mapping[str, Mapping[str, Any]]
KINDS = {  # kinds of memory: keys in plan.json and their names
    "weights": "weights",
    "optimizer_state": "optimizer state",
    "gradients": "gradients",
    "activations": "activations, temporaries",
}


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


def show_memory(result: Result, pictures: Pictures) -> dict[str, Any]:
    """Returns the section's content: the runs, and the changed runs that would fit."""
    content = result.content
    runs, changed = content["runs"], dict(_changed(content))
    usable = (content["capacity"] or {}).get("usable")
    return {
        "title": title(content),
        "reading": _reading(content, usable, changed),
        "memory": _bars(runs | changed, usable),
        "memories": _table(runs | changed, usable),
        "kept": _kept(runs),
        "figures": table("All figures", ["figure", "value"], [*_leaves(content)]),
    }


def _changed(content: Mapping[str, Any]) -> Iterator[tuple[str, Mapping[str, Any]]]:
    """Yields the changes that would make the run fit."""
    for change in (content["capacity"] or {}).get("changes", ()):
        yield f"{content['method']} with {' and '.join(change['what'])}", change


def _leaves(value: Any, name: str = "") -> Iterator[tuple[str, Any]]:
    """Yields every value of the file, with the keys that lead to it."""
    if isinstance(value, list) and name.endswith("finetune options"):
        yield name, shlex.join(value)
    elif isinstance(value, (Mapping, list)):
        for key, inner in value.items() if isinstance(value, Mapping) else enumerate(value, 1):
            text = str(key).replace("_", " ")
            yield from _leaves(inner, f"{name}, {text}" if name else text)
    elif value is not None:
        yield name, value


def _reading(content: Mapping[str, Any], usable: int | None, changed: _Memories) -> list[str]:
    name, runs = content["method"], content["runs"]
    size = runs[name]["peak"]
    largest = max(KINDS, key=lambda kind: runs[name][kind])
    sentences = [
        f"Training with {name} takes {readable(size)}; {runs[name][largest] / size:.0%} of it is {KINDS[largest]}."
    ]
    if name != "full" and (full := runs["full"]["peak"]) > size:
        sentences.append(f"That is {size / full:.0%} of the memory of full fine-tuning ({readable(full)}).")
    sentences += [f"Warning: {line}." for line in content.get("warnings", ())]
    if usable is not None:
        fits = "fits" if size <= usable else "does not fit"
        sentences.append(f"It {fits} into {readable(usable)}, which the vertical line marks.")
        if size > usable:
            fitting = [what for what, memory in changed.items() if memory["peak"] <= usable]
            sentences.append(
                f"What fits: {'; '.join(fitting)}." if fitting else "No change that was tried makes it fit."
            )
    return sentences


def _bars(memories: _Memories, usable: int | None) -> Chart:
    rows = []
    for name, memory in memories.items():
        parts = [(memory[kind], f"{name}: {readable(memory[kind])} {text}") for kind, text in KINDS.items()]
        rows.append(Bar(name, parts, readable(memory["peak"])))
    limit = None if usable is None else (float(usable), f"usable: {readable(usable)}")
    return bar_chart("Memory of a device by content.", rows, names=list(KINDS.values()), limit=limit)


def _table(memories: _Memories, usable: int | None) -> Table:
    rows = []
    for name, memory in memories.items():
        row = [name, *(cell(memory[kind], readable(memory[kind])) for kind in KINDS)]
        row += [cell(memory["peak"], readable(memory["peak"])), memory.get("moment", "")]
        rows.append(row if usable is None else [*row, "yes" if memory["peak"] <= usable else "no"])
    heading = ["run", *KINDS.values(), "total", "when"]
    return table("Memory of a device", heading if usable is None else [*heading, "fits"], rows)


def _kept(runs: _Memories) -> Table:
    """Returns a table of the trained parameters and checkpoint bytes per task."""
    rows = [
        [name, run["trained_parameters"], cell(run["checkpoint_bytes"], readable(run["checkpoint_bytes"]))]
        for name, run in runs.items()
        if "checkpoint_bytes" in run
    ]
    return table("What is trained and kept", ["run", "parameters", "checkpoint"], rows)
