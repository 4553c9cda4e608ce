"""Makes results of compare, sweep, analyze and finetune on a tiny model."""

from __future__ import annotations

import functools
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from support import tiny_classifier

from lora_ext.tasks.analyze import run as analyze
from lora_ext.tasks.comparison import compare, costs, pools, sweep
from lora_ext.tasks.finetune import results
from lora_ext.tasks.finetune.run import finetune
from lora_ext.tasks.finetune.settings import Settings
from lora_ext.tasks.shared.whole_files import write_picture

METHODS = ["bitfit", "lora:r=2", "lora:r=3"]
COMPARE, SWEEP, ANALYSIS = Path("compare/compare.json"), Path("sweep/sweep.json"), Path("analysis/analysis.json")


def results_of_the_session(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Makes a directory with ``compare``, ``sweep``, ``analysis`` and ``single``, once for all modules."""
    return _save_results(tmp_path_factory.getbasetemp() / "report")


@functools.cache
def _save_results(folder: Path) -> Path:
    folder.mkdir()
    inputs = tiny_classifier.save(folder, 60)
    options = {**inputs, "max_length": 32, "epochs": 1.0, "test_split": 0.3}
    out = folder / "results"
    with pytest.MonkeyPatch.context() as patch:
        # The first module that asks may draw no curves (tests/tasks/conftest.py), but later ones read these.
        patch.setattr(results, "write_picture", write_picture)
        patch.setattr(pools, "in_process", _here)  # processes take longer than the rest
        patch.setattr(costs, "_ROUNDS", 3)
        patch.setattr(analyze.results, "draw", lambda analysis, out: [])
        compare.compare(METHODS, [0, 1], options, out / "compare", say=_silent)
        sweep.sweep([1, 2], ["q", "q,v"], [0, 1], options, out / "sweep", budget=256, say=_silent)
        runs = out / "compare" / "runs" / "lora-r=3"
        adapters = tuple(str(runs / f"seed-{seed}" / "adapter") for seed in (0, 1))
        analyze.analyze(analyze.AnalysisSettings(adapters, base=inputs["model"]), out / "analysis", say=_silent)
        finetune(Settings.load(runs / "seed-0"), out / "single", say=_silent)
    return out


def change_json(path: Path, change: Callable[[Any], object]) -> None:
    content = json.loads(path.read_text())
    change(content)
    path.write_text(json.dumps(content))


def _here(
    function: Callable[..., Any], *args: Any, log: Path, threads: int, device: None, ending: object = None, **more: Any
) -> Any:
    return function(*args, **more)


def _silent(line: str) -> None:
    pass
