"""A merge on disk is killed at each call that changes files. Arguments: base, adapter, out, "new" or "overwrite"."""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path

from faults.tries import Fault, attempt, each_call, restore, snapshot
from lora_ext.offline.merge import merge  # and nothing larger: a fork copies the page tables

base, adapter, out, overwrite = Path(sys.argv[1]), Path(sys.argv[2]), Path(sys.argv[3]), sys.argv[4] == "overwrite"
os.fsync = lambda fd: None  # slow, and of use only where the machine stops


def run() -> int:
    return merge(base, [adapter], out, overwrite=overwrite).kept


def finish() -> int:
    outcome = attempt(run, Fault(out.parent))
    assert outcome.ended == "returned", outcome
    return outcome.result


old = snapshot(out)
assert finish() == 0
new = snapshot(out)
kept = []
for at, outcome in each_call(run, out.parent, "kill", lambda: restore(out, old)):
    assert outcome.ended != "raised", (at, outcome)
    there = snapshot(out)
    assert there in (None, old, new), (at, there and sorted(there))
    if there is None and overwrite:
        assert snapshot(out.parent / f".{out.name}.replaced") == old, at
    if outcome.ended == "killed" and there != new:
        kept.append(finish())
        assert snapshot(out) == new, at
    elif outcome.ended == "killed" and not overwrite:
        again = attempt(run, Fault(out.parent))
        assert again.error == "FileExistsError", (at, again)
hidden = [path.name for path in out.parent.iterdir() if path.name.startswith(".")]
print(json.dumps({"calls": at - 1, "kept": kept, "hidden": hidden}))
