"""The benchmarks as modules, and a fixture that runs one at small sizes."""

from __future__ import annotations

import functools
import importlib
import json
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parents[2] / "benchmarks"))


@pytest.fixture
def run(monkeypatch, tmp_path) -> Callable[..., dict]:
    """Runs a script's main() with options and returns its JSON. All scripts of a test share a results folder."""
    # Inductor would take ten seconds for a layer, whose times mean nothing here.
    monkeypatch.setattr(torch, "compile", functools.partial(torch.compile, backend="aot_eager"))

    def of(script: str, *options: str) -> dict:
        arguments = [*options, "--rounds", "2", "--threads", "2", "--write", "--results", str(tmp_path)]
        monkeypatch.setattr(sys, "argv", [f"benchmarks/{script}.py", *arguments])
        importlib.import_module(script).main()
        (path,) = [path for path in tmp_path.glob("*_cpu.json") if path.stem.removesuffix("_cpu") in script]
        result = json.loads(path.read_text())
        text = path.with_suffix(".md").read_text()
        assert result["heading"] in text and result["command"].startswith(f"python benchmarks/{script}.py ")
        assert "AMX" in result["heading"] and result["info"]["torch_cpu"]["aten"]
        return result

    return of
