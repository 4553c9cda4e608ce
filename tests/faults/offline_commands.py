"""Runs merge, unmerge and extract with a fault at each call that changes files.

Argument: a JSON file with a list of calls, the arguments of ``Tries``. The output is always the old one or the new one,
the next run continues or removes a fault's leftovers, and errors name the path and the remedy.
"""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from typing import Any

import torch

from faults.tries import Fault, Outcome, attempt, each_call, restore, snapshot
from lora_ext.checkpoints import extract, merge, unmerge  # nothing larger, because a fork copies the page tables

COMMANDS = {"merge": merge, "unmerge": unmerge, "extract": extract}
os.fsync = lambda fd: None  # slow, and useful only if the machine stops
REMEDIES = {"disk full": "free some space and run the same command again", "read-only": "choose a directory on another"}


class Tries:
    """The tries of one call, whose output is ``out``; of the kinds, "no rights" may not enter a directory."""

    def __init__(
        self, command: str, arguments: list, options: dict[str, Any], out: str, overwrite: bool, kinds: list[str]
    ) -> None:
        options = options | ({"dtype": getattr(torch, options["dtype"])} if "dtype" in options else {})
        self.command, self.arguments, self.out = COMMANDS[command], arguments, Path(out)
        self.options, self.kinds = options | {"overwrite": overwrite}, kinds
        self.old = self.found()
        assert attempt(self.run, Fault(self.out.parent)).ended == "returned"
        self.new = self.found()
        assert self.new not in (None, self.old)

    def run(self) -> int:
        return getattr(self.command(*self.arguments, self.out, **self.options), "kept", 0)

    def finish(self) -> int:
        """Runs the command to its end; returns the number of files that it kept."""
        outcome = attempt(self.run, Fault(self.out.parent))
        assert outcome.ended == "returned", outcome
        assert self.found() == self.new
        assert not self.hidden()
        return outcome.result

    def found(self) -> dict[str, bytes | None] | None:
        """Reads the output, without extract's report, which contains times."""
        content = snapshot(self.out)
        return content and {name: raw for name, raw in content.items() if name != "extract.json"}

    def state(self) -> int:
        """Hashes the files without inode numbers: runs that start from equal states do the same."""
        content = snapshot(self.out.parent)
        journal = self.out.parent / f".{self.out.name}.unfinished.json"
        if journal.exists():
            values = json.loads(journal.read_bytes())
            path = self.out.parent / f".{self.out.name}.unfinished"
            values["directory"] = path.exists() and values["directory"][1] == path.stat().st_ino
            content[journal.name] = json.dumps(values).encode()
        return hash(tuple(sorted((name, raw or b"") for name, raw in content.items())))

    def hidden(self) -> list[str]:
        return [path.name for path in self.out.parent.iterdir() if path.name.startswith(".")]

    def check_message(self, outcome: Outcome, kind: str) -> None:
        """Checks that the error names the disk's path and a remedy; after the exchange, the leftovers."""
        assert outcome.ended == "raised", outcome
        if "is complete, but" in outcome.message:
            assert self.found() == self.new
            assert any(str(self.out.parent / name) in outcome.message for name in self.hidden())
            return
        assert "OSError" in outcome.bases, outcome
        assert f"{self.out} cannot be written: " in outcome.message, outcome
        assert REMEDIES[kind] in outcome.message, outcome
        assert "\n" not in outcome.message

    def try_closed_directories(self) -> int:
        """Runs without rights to the output's directory and to each one that is read; returns their number."""
        sources = [Path(path) for value in self.arguments for path in (value if isinstance(value, list) else [value])]
        for directory in (self.out.parent, *sources):
            restore(self.out, self.old)
            directory.chmod(0o500 if directory == self.out.parent else 0)
            outcome = attempt(self.run, Fault(directory), as_owner_only=True)
            directory.chmod(0o700)
            assert outcome.error == "PermissionError", outcome
            assert str(directory) in outcome.message
            chooses = "cannot be written: Permission denied; choose" in outcome.message
            assert chooses == (directory == self.out.parent), outcome
            assert self.found() == self.old
            assert not self.hidden()
        return len(sources) + 1

    def try_all(self) -> dict[str, Any]:
        """Tries every kind of fault at each call; returns what happened, by kind."""
        results, seen = {}, {}
        for kind in self.kinds:
            if kind == "no rights":
                results[kind] = self.try_closed_directories()
                continue
            kept, with_leftovers = [], 0
            for at, outcome in each_call(self.run, self.out.parent, kind, lambda: restore(self.out, self.old)):
                there = self.found()
                assert there in (self.old, self.new), (kind, at, there and sorted(there))
                if outcome.ended == "returned":
                    assert there == self.new, (kind, at, outcome)
                    assert not self.hidden(), (kind, at, self.hidden())
                    continue
                if kind == "kill":
                    assert outcome.ended == "killed", (at, outcome)
                else:
                    self.check_message(outcome, kind)
                with_leftovers += bool(self.hidden())
                before = self.state()
                if before in seen:
                    kept.append(seen[before])
                elif there == self.new and not self.options["overwrite"]:
                    again = attempt(self.run, Fault(self.out.parent))
                    assert again.error == "FileExistsError", (kind, at, again)
                    assert not self.hidden(), (kind, at)
                else:
                    seen[before] = self.finish()
                    kept.append(seen[before])
            results[kind] = {"calls": at - 1, "kept": kept, "left": with_leftovers}
        return results


print(json.dumps([Tries(**call).try_all() for call in json.loads(Path(sys.argv[1]).read_text())]))
