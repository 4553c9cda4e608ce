"""What ``plan`` found: the memory of training by kind, whether it fits, and what would make it fit."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from lora_ext.tasks.plan.results import KINDS, readable, title
from lora_ext.tasks.report.bars import Bar, bars
from lora_ext.tasks.report.facts import reproduce
from lora_ext.tasks.report.markup import Cell, Html, cell, el, figure_text, join, paragraph, table
from lora_ext.tasks.report.pictures import Pictures
from lora_ext.tasks.report.results import Result

__all__ = ["show_memory"]

_Memories = Mapping[str, Mapping[str, Any]]


def show_memory(result: Result, pictures: Pictures) -> Html:
    """The section's content: the runs, and the changed ones that would fit, as bars and a table; the rest as a list."""
    content = result.content
    runs, changed = dict(content["runs"]), dict(_changed(content))
    usable = (content["capacity"] or {}).get("usable")
    memories = runs | changed
    rest = [[name, cell(value) if _is_number(value) else Cell(figure_text(value))] for name, value in _leaves(content)]
    return join(
        [
            el("p", f"{title(content)}."),
            paragraph(*_reading(content, usable, changed)),
            el("p", "A bar is what one device holds at the moment of a step when that is the most."),
            _stacked(memories, usable),
            _table(memories, usable),
            _kept(runs),
            el("details", el("summary", "Every figure"), table("Every figure", ["figure", "value"], rest)),
            reproduce(result),
        ]
    )


def _changed(content: Mapping[str, Any]) -> Iterator[tuple[str, Mapping[str, Any]]]:
    """Changes of the run that would make it fit."""
    for change in (content["capacity"] or {}).get("changes", ()):
        yield f"{content['method']} with {' and '.join(change['what'])}", change


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)


def _leaves(value: Any, name: str = "") -> Iterator[tuple[str, Any]]:
    """Every value of the file, with the way to it."""
    if isinstance(value, (Mapping, list)):
        for key, each in value.items() if isinstance(value, Mapping) else enumerate(value, 1):
            text = str(key).replace("_", " ")
            yield from _leaves(each, f"{name}, {text}" if name else text)
    elif value is not None:
        yield name, value


def _reading(content: Mapping[str, Any], usable: int | None, changed: _Memories) -> list[str | None]:
    name, runs = content["method"], content["runs"]
    size = runs[name]["peak"]
    largest = max(KINDS, key=lambda kind: runs[name][kind])
    sentences = [
        f"Training with {name} takes {readable(size)}, of which {runs[name][largest] / size:.0%} are {KINDS[largest]}."
    ]
    if name != "full" and (full := runs["full"]["peak"]) > size:
        sentences.append(f"That is {size / full:.0%} of what full fine-tuning takes ({readable(full)}).")
    if usable is not None:
        sentences.append(
            f"It {'fits' if size <= usable else 'does not fit'} into {readable(usable)}, which the line marks."
        )
        if size > usable:
            fitting = [each for each, memory in changed.items() if memory["peak"] <= usable]
            sentences.append(
                f"What fits: {'; '.join(fitting)}." if fitting else "No change that was tried makes it fit."
            )
    return sentences


def _stacked(memories: _Memories, usable: int | None) -> Html:
    rows = [Bar(name, [memory[kind] for kind in KINDS], readable(memory["peak"])) for name, memory in memories.items()]
    limit = None if usable is None else (float(usable), f"usable: {readable(usable)}")
    return bars("Memory of a device by what is in it.", rows, names=list(KINDS.values()), limit=limit)


def _table(memories: _Memories, usable: int | None) -> Html:
    rows = []
    for name, memory in memories.items():
        row = [name, *(cell(memory[kind], readable(memory[kind])) for kind in KINDS)]
        row += [cell(memory["peak"], readable(memory["peak"])), memory.get("moment", "")]
        rows.append(row if usable is None else [*row, "yes" if memory["peak"] <= usable else "no"])
    heading = ["run", *KINDS.values(), "in all", "when"]
    return table("Memory of a device", heading if usable is None else [*heading, "fits"], rows)


def _kept(runs: _Memories) -> Html | None:
    """What is trained and has to be kept for a task."""
    rows = [
        [name, cell(run["trained_parameters"]), cell(run["checkpoint_bytes"], readable(run["checkpoint_bytes"]))]
        for name, run in runs.items()
        if "checkpoint_bytes" in run
    ]
    return table("What is trained and kept", ["run", "parameters", "checkpoint"], rows) if rows else None
