"""Writes docs/architectures.md: what was compared, for each architecture."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path

from architectures.compare import CHECKS, Comparison
from architectures.table import ARCHITECTURES, Architecture

DOCUMENT = Path(__file__).parents[2] / "docs" / "architectures.md"
TARGETS = ("all-linear", "usual")
UNEXPLAINED = "Not equal yet: see [limitations.md](limitations.md)."

_TITLE = """# Architectures

Each of these models was built from a tiny config with random weights and adapted twice with the same factors, by
`inject` and by PEFT. All linear layers (`target_modules="all-linear"`) and the usual targets were tried. The columns:

| column | yes means |
|---|---|
| targets | the same modules and parameters are adapted, and the same number of parameters is trained |
| outputs | equal outputs, and the adapter changes them |
| merge | a merged model computes the same, unmerging restores every bit, and `merge_and_unload` gives PEFT's weights |
| files | PEFT's file is the same after it was loaded and saved here; PEFT computes the same with our file |
| tokens | `generate` gives the same tokens, merged and not; -: the model generates nothing |
| gradients | equal gradients of all factors |
| step | equal losses and factors after a step of SGD that lowers the loss |

Equal means: up to the rounding of float32 (most models compute some operations in float32, even if their weights are
float64). Counts are those of the tiny model: adapted layers, then trained parameters of rank 2. The
tests also save each merged model with `save_pretrained` and load it without this package.

`PYTHONPATH=tests python -m architectures --write` wrote this page. `tests/architectures/test_architectures.py` repeats
the comparison. A new architecture is a row in `tests/architectures/table.py`.

"""


def counts(comparison: Comparison) -> str:
    """The cell with the size of the adapter."""
    return f"{comparison.layers}, {comparison.parameters}" if comparison.layers else "not with PEFT"


def page(found: Mapping[tuple[str, str], Comparison]) -> str:
    """The page's text. ``found``: the comparison for each architecture's name and choice of targets."""
    header = ["architecture", "class", "all-linear", "usual targets", *CHECKS]
    lines = [f"| {' | '.join(header)} |", "|---" * len(header) + "|"]
    notes: list[str] = []
    for architecture in ARCHITECTURES:
        lines.append(_row(architecture, {targets: found[architecture.name, targets] for targets in TARGETS}, notes))
    numbered = [f"{number}. {note}" for number, note in enumerate(notes, start=1)]
    return _TITLE + "\n".join([*lines, "", *numbered]).rstrip() + "\n"


def names(text: str) -> list[tuple[str, str]]:
    """The architectures and classes in the page's table, in order."""
    return re.findall(r"^\| ([^|]+) \| `(\w+)` \|", text, re.M)


def row(text: str, name: str) -> str:
    return next(line for line in text.splitlines() if line.startswith(f"| {name} | `"))


def _row(architecture: Architecture, found: Mapping[str, Comparison], notes: list[str]) -> str:
    reasons = {(known.targets, check): known.reason for known in architecture.known for check in known.checks.split()}
    cells = [architecture.name, f"`{architecture.model}`", counts(found["all-linear"])]
    cells.append(f"{architecture.targets.replace(' ', ', ')}: {counts(found['usual'])}")
    for check in CHECKS:
        failed = [
            f"{targets}: {reasons[targets, check]}" if (targets, check) in reasons else UNEXPLAINED
            for targets in found
            if check in found[targets].differences
        ]
        failed = list(dict.fromkeys(failed))
        notes += [note for note in failed if note not in notes]
        yes = "-" if check == "tokens" and not architecture.generates else "yes"
        cells.append(f"no ({', '.join(str(notes.index(note) + 1) for note in failed)})" if failed else yes)
    return f"| {' | '.join(cells)} |"
