"""Runs finetune with faults. Arguments: a directory, kinds of faults by commas, the step between calls, the method."""

from __future__ import annotations

import json
import shutil
import sys
from pathlib import Path
from typing import Any

from support import tiny_classifier

import lora_ext.tasks.finetune.run as module
from faults.runs import content_of, skip_slow_steps, try_calls
from faults.tries import Fault, attempt
from lora_ext.tasks.finetune import run_checkpoints as checkpoints
from lora_ext.tasks.finetune.settings import Settings

top, kinds, step, method = Path(sys.argv[1]), sys.argv[2].split(","), int(sys.argv[3]), sys.argv[4]
out = top / "watched" / "out"
settings = Settings(
    **tiny_classifier.save(top, 40),
    epochs=1.5,
    batch_size=16,
    max_length=32,
    ema_decay=0.5,
    method=method,
)
checkpoints.SECONDS = checkpoints._SHARE = module._SECONDS = 0.0
skip_slow_steps()


def run(resume: bool) -> None:
    module.finetune(settings, out, resume=resume, say=lambda line: None)


def check_nothing_is_half(expected: dict[str, Any]) -> None:
    """Checks that every file under its final name equals that of a run without faults."""
    for path in out.iterdir():
        if path.name.startswith("."):
            continue
        if path.name == "checkpoints":
            for checkpoint in path.glob("checkpoint-*"):
                assert content_of(checkpoint) == written[checkpoint.name], checkpoint
        elif path.is_dir():
            files = {name.partition("/")[2]: c for name, c in expected.items() if name.startswith(f"{path.name}/")}
            assert content_of(path) == files, path
        elif path.name == "metrics.json":  # written twice, the second time with measurements
            there = content_of(out)
            assert there["metrics.json"].items() <= expected["metrics.json"].items()
            assert all(there.get(name) == content for name, content in expected.items() if name != "metrics.json")
        elif path.name != "settings.json":
            assert content_of(out)[path.name] == expected[path.name], path


out.parent.mkdir()
checkpoints._KEPT = 100
assert attempt(lambda: run(False), Fault(out.parent)).ended == "returned"
written = {path.name: content_of(path) for path in (out / "checkpoints").iterdir()}
assert len(written) == 3
checkpoints._KEPT = 2
shutil.rmtree(out)
how = {"marker": "settings.json", "check": check_nothing_is_half}
print(json.dumps(try_calls(run, out, kinds, step, **how)))
