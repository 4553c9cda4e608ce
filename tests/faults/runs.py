"""Runs tasks with faults at calls that change files, and resumes them without a fault."""

from __future__ import annotations

import itertools
import json
import os
import shutil
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch

from faults.tries import Fault, Outcome, attempt
from lora_ext.tasks.comparison import compare
from lora_ext.tasks.finetune import results
from lora_ext.tasks.shared.whole_files import write_whole

_TIMES = ("date", "train_seconds", "tokens_per_second", "peak_memory_bytes", "latency", "costs")
_TIMED = ("seconds", "_runtime", "_per_second", "_ms")


def skip_slow_steps() -> None:
    """Disables drawing and syncing, which do not affect the files."""
    for module in (results, compare):
        module.write_picture = lambda path, figure: write_whole(path, b"a picture")
    os.fsync = lambda fd: None


def content_of(directory: Path) -> dict[str, Any]:
    """Reads every file in ``directory`` except hidden ones, without values that differ from run to run."""
    found: dict[str, Any] = {}
    for path in sorted(directory.rglob("*")):
        name = str(path.relative_to(directory))
        if name.startswith(".") or "/." in name:
            continue
        if path.suffix == ".json":
            found[name] = _without_times(json.loads(path.read_text()))
        elif path.suffix in (".pt", ".pth"):
            found[name] = repr(torch.load(path, weights_only=False))
        elif path.is_file():
            found[name] = path.read_bytes()
    return found


def _without_times(content: Any) -> Any:
    if isinstance(content, dict):
        return {k: _without_times(v) for k, v in content.items() if k not in _TIMES and not k.endswith(_TIMED)}
    return [_without_times(entry) for entry in content] if isinstance(content, list) else content


def left_only_the_lock(outcome: Outcome, at: int) -> bool:
    """Returns whether the fault met the last call, which removes the file that a run holds: the results are whole."""
    return (outcome.ended, outcome.last, outcome.calls) == ("returned", "unlink", at)


def try_calls(
    run: Callable[[bool], None],
    out: Path,
    kinds: Sequence[str],
    step: int,
    *,
    marker: str,
    left_alone: Sequence[str] = (),
    check: Callable[[dict[str, Any]], None] = lambda expected: None,
) -> dict[str, dict[str, Any]]:
    """Runs ``run(resume)`` with each kind of fault at its first call and at some of the others, and resumes it.

    Args:
        run: writes its results to ``out``; calls below the parent of ``out`` are counted.
        step: distance between the tried calls of all kinds, which take turns: with three kinds and a step of 30, the
            first one meets calls 1, 31, 121, 211 ..., the second one 1, 61, 151 ... With a step of 1, every call.
        marker: the file that marks a run that can be resumed.
        left_alone: names of files that differ from run to run.
        check: checks ``out`` after a fault; gets the results of a run without faults.

    Returns:
        For each kind, ``calls`` of a whole run, ``tries``, and ``kinds``: the number of failed calls by name.
    """

    def prepare() -> None:
        shutil.rmtree(out.parent, ignore_errors=True)
        out.parent.mkdir()

    def written() -> dict[str, Any]:
        return {name: content for name, content in content_of(out).items() if name not in left_alone}

    def try_call(kind: str, at: int) -> Outcome | None:
        """Returns the outcome, or None if there are fewer calls."""
        prepare()
        outcome = attempt(lambda: run(False), Fault(out.parent, kind, at))
        if outcome.ended == "returned" and outcome.calls < at:
            return None
        where = (kind, at, outcome)
        if kind == "kill":
            assert outcome.ended in ("killed", "returned"), where
        elif left_only_the_lock(outcome, at):
            assert written() == expected, where
        else:
            assert outcome.ended == "raised" and outcome.error == "WriteError", where
            assert len(outcome.message.splitlines()) == 1 and "cannot be written: " in outcome.message, where
        if out.exists():
            check(expected)
        resume = (out / marker).is_file()
        again = attempt(lambda: run(resume), Fault(out.parent))
        assert again.ended == "returned", (where, again)
        found = written()
        different = [name for name in {**found, **expected} if found.get(name) != expected.get(name)]
        assert not different, (where, different)
        assert not list(out.rglob(".*")), where
        return outcome

    prepare()
    first = attempt(lambda: run(False), Fault(out.parent))
    assert first.ended == "returned", first
    expected, results = written(), {}
    for number, kind in enumerate(kinds, 1):
        later = itertools.count(2) if step == 1 else itertools.count(1 + number * step, len(kinds) * step)
        outcomes = [try_call(kind, 1)]
        while outcomes[-1] is not None:
            at = next(later)
            # The number of calls that take space is unknown.
            outcomes.append(try_call(kind, at) if at <= first.calls or kind == "disk full" else None)
        failed = Counter(outcome.last for outcome in outcomes[:-1] if kind != "kill")
        results[kind] = {"calls": first.calls, "tries": len(outcomes) - 1, "kinds": failed}
    return results
