"""merge, unmerge or extract, at each call that changes files: the process is killed, or the disk is full or read-only.

Arguments: a file with what is called, as JSON (``command``, ``arguments``, ``options``); the output; "new" or
"overwrite"; the kinds of faults, of which "no rights" is met as a user whom a directory does not let in. The output is
the old one or the new one at any time, what a fault left is continued or removed by the next run, and errors name the
path and what to do.
"""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path

import torch

from faults.tries import Fault, Outcome, attempt, each_call, restore, snapshot
from lora_ext.checkpoints import extract, merge, unmerge  # and nothing larger: a fork copies the page tables

call, out, overwrite = json.loads(Path(sys.argv[1]).read_text()), Path(sys.argv[2]), sys.argv[3] == "overwrite"
command = {"merge": merge, "unmerge": unmerge, "extract": extract}[call["command"]]
options = call["options"] | ({"dtype": getattr(torch, call["options"]["dtype"])} if "dtype" in call["options"] else {})
os.fsync = lambda fd: None  # slow, and of use only where the machine stops
REMEDIES = {"disk full": "free some space and run the same command again", "read-only": "choose a directory on another"}


def run() -> int:
    return getattr(command(*call["arguments"], out, overwrite=overwrite, **options), "kept", 0)


def finish() -> int:
    """Runs the command to its end; returns how many files were there already."""
    outcome = attempt(run, Fault(out.parent))
    assert outcome.ended == "returned", outcome
    assert found() == new
    assert not hidden()
    return outcome.result


def found() -> dict[str, bytes | None] | None:
    """The output; without extract's report, which has seconds in it."""
    content = snapshot(out)
    return content and {name: raw for name, raw in content.items() if name != "extract.json"}


def state() -> int:
    """All that lies there, except the numbers of inodes: two runs that begin with the same do the same."""
    content = snapshot(out.parent)
    journal = out.parent / f".{out.name}.unfinished.json"
    if journal.exists():
        values = json.loads(journal.read_bytes())
        path = out.parent / f".{out.name}.unfinished"
        values["directory"] = path.exists() and values["directory"][1] == path.stat().st_ino
        content[journal.name] = json.dumps(values).encode()
    return hash(tuple(sorted((name, raw or b"") for name, raw in content.items())))


def hidden() -> list[str]:
    return [path.name for path in out.parent.iterdir() if path.name.startswith(".")]


def check_told(outcome: Outcome, kind: str) -> None:
    """The error is about the disk, and says where and what to do; one after the exchange, what is left."""
    assert outcome.ended == "raised", outcome
    if "is complete, but" in outcome.message:
        assert found() == new
        assert any(str(out.parent / name) in outcome.message for name in hidden())
        return
    assert "OSError" in outcome.bases, outcome
    assert f"{out} cannot be written: " in outcome.message, outcome
    assert REMEDIES[kind] in outcome.message, outcome
    assert "\n" not in outcome.message


def meet_closed_directories() -> int:
    """That of the output, and each that is read. Returns how many there were."""
    sources = [Path(one) for value in call["arguments"] for one in (value if isinstance(value, list) else [value])]
    for directory in (out.parent, *sources):
        restore(out, old)
        directory.chmod(0o500 if directory == out.parent else 0)
        outcome = attempt(run, Fault(directory), as_owner_only=True)
        directory.chmod(0o700)
        assert outcome.error == "PermissionError", outcome
        assert str(directory) in outcome.message
        assert ("cannot be written: Permission denied; choose" in outcome.message) == (directory == out.parent), outcome
        assert found() == old
        assert not hidden()
    return len(sources) + 1


old = found()
assert attempt(run, Fault(out.parent)).ended == "returned"
new = found()
assert new not in (None, old)
told, seen = {}, {}
for kind in sys.argv[4:]:
    if kind == "no rights":
        told[kind] = meet_closed_directories()
        continue
    kept, left = [], 0
    for at, outcome in each_call(run, out.parent, kind, lambda: restore(out, old)):
        there = found()
        assert there in (old, new), (kind, at, there and sorted(there))
        if outcome.ended == "returned":
            assert there == new, (kind, at, outcome)
            assert not hidden(), (kind, at, hidden())
            continue
        if kind == "kill":
            assert outcome.ended == "killed", (at, outcome)
        else:
            check_told(outcome, kind)
        left += bool(hidden())
        before = state()
        if before in seen:
            kept.append(seen[before])
        elif there == new and not overwrite:
            again = attempt(run, Fault(out.parent))
            assert again.error == "FileExistsError", (kind, at, again)
            assert not hidden(), (kind, at)
        else:
            seen[before] = finish()
            kept.append(seen[before])
    told[kind] = {"calls": at - 1, "kept": kept, "left": left}
print(json.dumps(told))
