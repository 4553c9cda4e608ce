"""Tests ``--trim-vocabulary`` of ``compare`` and ``sweep``."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from support import tiny_classifier
from support.optional import matplotlib  # noqa: F401

from lora_ext.tasks.comparison import pools
from lora_ext.tasks.comparison.compare import compare
from lora_ext.tasks.comparison.sweep import sweep
from lora_ext.tasks.finetune.run import finetune
from lora_ext.tasks.finetune.settings import Settings

pytestmark = pytest.mark.cpu_only("the Trainer chooses the device")


@pytest.mark.full
def test_all_runs_of_a_comparison_take_one_trimmed_checkpoint(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    def here(function: Any, *args: Any, log: Path, threads: int, device: None, ending: Any = None, **more: Any) -> Any:
        return function(*args, **more)

    monkeypatch.setattr(pools, "in_process", here)
    rows = [row for row in tiny_classifier.reviews(60) if not {"script", "story"} & {*row[0].split()}]
    options = {"model": str(tiny_classifier.save_model(tmp_path / "model")), "max_length": 32, "epochs": 1.0}
    options |= {"data": str(tiny_classifier.save_reviews(tmp_path / "reviews.csv", rows)), "trim_vocabulary": True}
    alone = finetune(
        Settings(**options, r=2, target_modules="all-linear"), tmp_path / "alone", measure=False, say=lambda line: None
    )
    weights = Path("adapter/adapter_model.safetensors")
    said: list[str] = []
    methods = ["lora:r=2:target-modules=all-linear:name=two"]
    result = compare(methods, [0], options, tmp_path / "compare", say=said.append)
    assert any(
        line.startswith(f"--trim-vocabulary: {alone['trimmed_vocabulary']['tokens']} of 20 tokens") for line in said
    )
    assert result["command"].count("--trim-vocabulary") == 1 and str(tmp_path / "model") in result["command"]
    assert result["methods"][0]["total_parameters"] == alone["total_parameters"]
    sweep([2], ["all-linear"], [0], options, tmp_path / "sweep", budget=10_000, say=said.append)
    for run in ("compare/runs/two", "sweep/runs/r=2-all-linear"):
        assert (tmp_path / run / "seed-0" / weights).read_bytes() == (tmp_path / "alone" / weights).read_bytes()
        config = json.loads((tmp_path / run / "seed-0/adapter/adapter_config.json").read_text())
        assert config["base_model_name_or_path"] == str(tmp_path / run.partition("/")[0] / "base")
    before = (tmp_path / "compare/base/model.safetensors").stat().st_mtime_ns
    compare(methods, [0], options, tmp_path / "compare", resume=True, say=said.append)
    assert (tmp_path / "compare/base/model.safetensors").stat().st_mtime_ns == before
    (tmp_path / "compare").rename(tmp_path / "moved")
    done = tmp_path / "moved/runs/two/seed-0/metrics.json"
    written = done.stat().st_mtime_ns
    compare(methods, [0], options, tmp_path / "moved", resume=True, say=said.append)
    assert done.stat().st_mtime_ns == written  # the run was not repeated
