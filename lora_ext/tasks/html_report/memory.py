"""What ``plan`` found: the memory of training by kind, whether it fits, and what would make it fit."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from .bars import Bar, bars
from .facts import reproduce
from .markup import Cell, Html, cell, el, figure_text, join, paragraph, table
from .pictures import Pictures
from .results import Result

__all__ = ["show_memory"]

_KINDS = {
    "weights": "weights",
    "optimizer_state": "optimizer state",
    "gradients": "gradients",
    "activations": "activations, temporaries",
}
_Memories = Mapping[str, Mapping[str, Any]]


def show_memory(result: Result, pictures: Pictures) -> Html:
    """The section's content: the runs, and the changed ones that would fit, as bars and a table; the rest as a list."""
    content = result.content
    runs, changed = dict(content["runs"]), dict(_changed(content))
    usable = (content.get("capacity") or {}).get("usable")
    memories = runs | changed
    rest = [[name, cell(value) if _is_number(value) else Cell(figure_text(value))] for name, value in _leaves(content)]
    return join(
        [
            paragraph(*_reading(content, usable, changed)),
            el("p", "A bar is what one device holds at the moment of a step when that is the most."),
            _stacked(memories, usable),
            _table(memories, usable),
            _kept(runs),
            el("details", el("summary", "Every figure"), table("Every figure", ["figure", "value"], rest)),
            reproduce(result),
        ]
    )


def _size(memory: Mapping[str, Any]) -> int:
    return sum(memory[kind] for kind in _KINDS)


def _bytes(count: float) -> str:
    """In decimal units, as the LoRA paper has them."""
    for unit, name in ((1e12, "TB"), (1e9, "GB"), (1e6, "MB"), (1e3, "kB")):
        if count >= unit:
            return f"{count / unit:.3g} {name}"
    return f"{count} B"


def _changed(content: Mapping[str, Any]) -> Iterator[tuple[str, Mapping[str, Any]]]:
    """Changes of the run that would make it fit."""
    for change in (content.get("capacity") or {}).get("changes", ()):
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
    size = _size(runs[name])
    largest = max(_KINDS, key=lambda kind: runs[name][kind])
    sentences = [
        f"Training with {name} takes {_bytes(size)}, of which {runs[name][largest] / size:.0%} are {_KINDS[largest]}."
    ]
    if "full" in runs and name != "full" and (full := _size(runs["full"])) > size:
        sentences.append(f"That is {size / full:.0%} of what full fine-tuning takes ({_bytes(full)}).")
    if usable is not None:
        sentences.append(
            f"It {'fits' if size <= usable else 'does not fit'} into {_bytes(usable)}, which the line marks."
        )
        if size > usable:
            fitting = [each for each, memory in changed.items() if _size(memory) <= usable]
            sentences.append(
                f"What fits: {'; '.join(fitting)}." if fitting else "No change that was tried makes it fit."
            )
    return sentences


def _stacked(memories: _Memories, usable: int | None) -> Html:
    rows = [Bar(name, [memory[kind] for kind in _KINDS], _bytes(_size(memory))) for name, memory in memories.items()]
    limit = None if usable is None else (float(usable), f"usable: {_bytes(usable)}")
    return bars("Memory of a device by what is in it.", rows, names=list(_KINDS.values()), limit=limit)


def _table(memories: _Memories, usable: int | None) -> Html:
    rows = []
    for name, memory in memories.items():
        row = [name, *(cell(memory[kind], _bytes(memory[kind])) for kind in _KINDS)]
        row += [cell(_size(memory), _bytes(_size(memory))), memory.get("moment", "")]
        rows.append(row if usable is None else [*row, "yes" if _size(memory) <= usable else "no"])
    heading = ["run", *_KINDS.values(), "in all", "when"]
    return table("Memory of a device", heading if usable is None else [*heading, "fits"], rows)


def _kept(runs: _Memories) -> Html | None:
    """What is trained and has to be kept for a task."""
    rows = [
        [name, cell(run["trained_parameters"]), cell(run["checkpoint_bytes"], _bytes(run["checkpoint_bytes"]))]
        for name, run in runs.items()
        if "checkpoint_bytes" in run
    ]
    return table("What is trained and kept", ["run", "parameters", "checkpoint"], rows) if rows else None
