"""Tests scripts/gpu_check.py as far as it needs no GPU."""

import json
import signal
import sys
from pathlib import Path

import pytest
import torch
from support.processes import run_python

ROOT = Path(__file__).parents[2]
sys.path[:0] = [str(ROOT / "benchmarks"), str(ROOT / "scripts")]

import gpu_check  # noqa: E402
from gpu_check import PASSED  # noqa: E402

pytestmark = [pytest.mark.cpu_only("tests a script"), pytest.mark.full]


@pytest.fixture(autouse=True)
def logs(tmp_path, monkeypatch):
    monkeypatch.setattr(gpu_check, "LOGS", tmp_path / "logs")
    (tmp_path / "logs").mkdir()
    return tmp_path / "logs"


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu_it_says_so():
    result = run_python(ROOT / "scripts" / "gpu_check.py")
    assert result.returncode == 1 and "finds no GPU" in result.stderr and "--dry" in result.stderr


def test_a_dry_run_goes_from_the_options_to_the_result_file(tmp_path, logs, monkeypatch, capsys):
    handler = signal.getsignal(signal.SIGINT)
    monkeypatch.setattr(sys, "argv", ["gpu_check.py", "--dry", "--results", str(tmp_path), "--only", "rivals"])
    try:
        assert gpu_check.main() == 0, capsys.readouterr().out
    finally:
        signal.signal(signal.SIGINT, handler)
    found = json.loads((tmp_path / "gpu_check.json").read_text())["parts"]["rivals"]
    assert (found["status"], found["detail"]) == (PASSED, "no rival can be measured")
    assert "unsloth: not measured, unsloth is not installed" in (logs / "rivals.log").read_text()
    said = capsys.readouterr().out
    assert "| golden | not run | 0 | not in this run, nor before |" in said and "| rivals | passed |" in said
    assert "predicted" not in said  # nothing was measured on a GPU
    monkeypatch.setattr(sys, "argv", ["gpu_check.py", "--dry", "--only", "rivals,x"])
    with pytest.raises(SystemExit, match="no part x; there are golden, layer"):
        gpu_check.main()
