"""Runs merge, unmerge or extract with a fault at each call that changes files.

Arguments: a JSON file with the call (``command``, ``arguments``, ``options``); the output; "new" or "overwrite"; the
kinds of faults, where "no rights" runs as a user who may not enter a directory. The output is always the old one or the
new one, the next run continues or removes a fault's leftovers, and errors name the path and the remedy.
"""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path

import torch

from faults.tries import Fault, Outcome, attempt, each_call, restore, snapshot
from lora_ext.checkpoints import extract, merge, unmerge  # nothing larger, because a fork copies the page tables

call, out, overwrite = json.loads(Path(sys.argv[1]).read_text()), Path(sys.argv[2]), sys.argv[3] == "overwrite"
command = {"merge": merge, "unmerge": unmerge, "extract": extract}[call["command"]]
options = call["options"] | ({"dtype": getattr(torch, call["options"]["dtype"])} if "dtype" in call["options"] else {})
os.fsync = lambda fd: None  # slow, and useful only if the machine stops
REMEDIES = {"disk full": "free some space and run the same command again", "read-only": "choose a directory on another"}


def run() -> int:
    return getattr(command(*call["arguments"], out, overwrite=overwrite, **options), "kept", 0)


def finish() -> int:
    """Runs the command to its end; returns the number of files that it kept."""
    outcome = attempt(run, Fault(out.parent))
    assert outcome.ended == "returned", outcome
    assert found() == new
    assert not hidden()
    return outcome.result


def found() -> dict[str, bytes | None] | None:
    """Reads the output, without extract's report, which contains times."""
    content = snapshot(out)
    return content and {name: raw for name, raw in content.items() if name != "extract.json"}


def state() -> int:
    """Hashes the files without inode numbers: runs that start from equal states do the same."""
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


def check_message(outcome: Outcome, kind: str) -> None:
    """Checks that the error names the disk's path and a remedy; after the exchange, the leftovers."""
    assert outcome.ended == "raised", outcome
    if "is complete, but" in outcome.message:
        assert found() == new
        assert any(str(out.parent / name) in outcome.message for name in hidden())
        return
    assert "OSError" in outcome.bases, outcome
    assert f"{out} cannot be written: " in outcome.message, outcome
    assert REMEDIES[kind] in outcome.message, outcome
    assert "\n" not in outcome.message


def try_closed_directories() -> int:
    """Runs without rights to the output's directory and to each one that is read; returns their number."""
    sources = [Path(path) for value in call["arguments"] for path in (value if isinstance(value, list) else [value])]
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
results, seen = {}, {}
for kind in sys.argv[4:]:
    if kind == "no rights":
        results[kind] = try_closed_directories()
        continue
    kept, with_leftovers = [], 0
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
            check_message(outcome, kind)
        with_leftovers += bool(hidden())
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
    results[kind] = {"calls": at - 1, "kept": kept, "left": with_leftovers}
print(json.dumps(results))
