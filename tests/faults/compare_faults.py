"""Runs compare with faults. Arguments: a directory, kinds of faults by commas, the step between calls."""

from __future__ import annotations

import json
import sys
from dataclasses import fields
from pathlib import Path
from typing import Any

from support import tiny_classifier

from faults.runs import skip_slow_steps, try_calls
from lora_ext.tasks.comparison import compare, costs, pools
from lora_ext.tasks.finetune.settings import Settings

top, kinds, step = Path(sys.argv[1]), sys.argv[2].split(","), int(sys.argv[3])
out = top / "watched" / "out"
options = {
    **{field.name: field.default for field in fields(Settings)},
    **tiny_classifier.save(top, 40),
    "epochs": 1.0,
    "max_length": 32,
    "learning_rate": None,
}


def here(function: Any, *args: Any, log: Path, threads: Any, device: Any, ending: Any = None, **more: Any) -> Any:
    """Replaces ``in_process``, because a new process would not be watched."""
    return function(*args, **more)


pools.in_process = here
costs._ROUNDS = 2
skip_slow_steps()


def run(resume: bool) -> None:
    compare.compare(["head-only", "bitfit"], [0], options, out, resume=resume, say=lambda line: None)


how = {"marker": "compare-settings.json", "left_alone": ["compare.md"]}
print(json.dumps(try_calls(run, out, kinds, step, **how)))
