"""Runs analyze and report with every fault at every call that changes files. Argument: a directory."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from support import tiny_classifier

from faults.runs import content_of, left_only_the_lock, skip_slow_steps
from faults.tries import Fault, attempt, each_call, restore
from lora_ext.tasks import WriteError
from lora_ext.tasks.analyze import run as analyze
from lora_ext.tasks.finetune.run import finetune
from lora_ext.tasks.finetune.settings import Settings
from lora_ext.tasks.report import write_report

top = Path(sys.argv[1])
skip_slow_steps()


def draw(analysis: dict[str, Any], out: Path) -> list[str]:
    (out / "spectrum.png").write_bytes(b"a picture")
    return ["spectrum.png"]


analyze.results.draw = draw
settings = Settings(**tiny_classifier.save(top, 40), epochs=1.0, max_length=32, target_modules="query")
tuned = top / "tuned"
assert attempt(lambda: finetune(settings, tuned, measure=False, say=print), Fault(tuned)).ended == "returned"
analysed = analyze.AnalysisSettings((str(tuned / "adapter"),), use_base=False)


def run_analyze(out: Path, again: bool) -> None:
    resume = again and (out / "analysis_settings.json").is_file()
    analyze.analyze(analysed, out, resume=resume, say=lambda line: None)


def run_report(out: Path, again: bool) -> None:
    try:
        out.mkdir(exist_ok=True)
    except OSError as error:  # creating the directory is the user's step
        raise WriteError(str(error)) from error
    write_report(tuned, out / "page.html", say=lambda line: None)


def try_all(run: Callable[[Path, bool], None]) -> dict[str, int]:
    """Runs ``run(out, again)`` with every fault at every call; returns the number of calls by fault."""
    watched = top / run.__name__
    out = watched / "out"
    watched.mkdir()
    assert attempt(lambda: run(out, False), Fault(watched)).ended == "returned"
    expected, calls = content_of(out), {}
    for kind in ("kill", "disk full", "read-only"):
        for at, outcome in each_call(lambda: run(out, False), watched, kind, lambda: restore(out, None)):
            where = (run.__name__, kind, at, outcome)
            if outcome.ended == "raised":
                assert outcome.error == "WriteError" and len(outcome.message.splitlines()) == 1, where
            if left_only_the_lock(outcome, at):
                assert content_of(out) == expected, where
            else:
                assert outcome.ended == {"kill": "killed"}.get(kind, "raised") or outcome.calls < at, where
            again = attempt(lambda: run(out, True), Fault(watched))
            assert again.ended == "returned", (where, again)
            assert content_of(out) == expected and not list(out.rglob(".*")), where
            calls[kind] = at - 1
    return calls


print(json.dumps({run.__name__: try_all(run) for run in (run_analyze, run_report)}))
