"""Tests the shared code of the benchmarks: time, options, facts about the machine, folders of results."""

import importlib
import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from harness import report
from harness.machine_folder import machine_folder

from lora_ext import _load

pytestmark = [pytest.mark.cpu_only("runs the scripts on the CPU"), pytest.mark.full]

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"


def test_cases_share_the_time(monkeypatch, capsys):
    args = report.parser("A question?", "name").parse_args(["--seconds", "90"])
    now = [0.0]
    monkeypatch.setattr(report.time, "perf_counter", lambda: now[0])
    run = report.Report(args, "title")
    shares = []
    for spent in run.cases([5.0, 60.0, 30.0, 1.0]):
        shares.append(run.case_s)
        now[0] += spent
    assert shares == [20.0, 20.0, 12.5]  # at most 20 of 22.5 and 28.3; half of 25
    assert "out of time: 1 cases are not measured" in capsys.readouterr().out


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
@pytest.mark.parametrize("script", ["bench_layer", "run_all"])
def test_without_a_gpu_cuda_is_refused(script, monkeypatch):
    monkeypatch.setattr(sys, "argv", [script, "--device", "cuda"])
    with pytest.raises(SystemExit, match="--device cuda: torch .* finds no GPU here"):
        importlib.import_module(script).main()


@pytest.mark.skipif("avx2" not in _load.available_cpu_isas(), reason="no AVX2 here")
def test_an_instruction_set_binds_the_whole_process(tmp_path):
    options = ["--shapes", "8x16x24", "--no-compile", "--rounds", "2", "--write", "--results", tmp_path]
    command = [sys.executable, BENCHMARKS / "bench_layer.py", *options, "--machine-isa", "avx2"]
    subprocess.run(command, check=True, capture_output=True)
    result = json.loads((tmp_path / "layer_cpu_avx2.json").read_text())
    assert result["info"]["cpu"]["isa"] == "avx2"
    assert result["info"]["torch_cpu"] == {"onednn_limit": "AVX2", "mkl_limit": "AVX2", "aten": "AVX2", "amx": False}
    assert "limited to AVX2, without AMX" in result["heading"]


def test_results_go_to_the_folder_of_the_machine(monkeypatch, tmp_path):
    assert machine_folder("Intel(R) Core(TM) i7-8700 CPU @ 3.20GHz") == "intel_core_i7_8700"
    assert machine_folder("Intel(R) Xeon(R) Processor") == "intel_xeon"
    assert machine_folder("NVIDIA H100 80GB HBM3") == "nvidia_h100_80gb_hbm3"
    monkeypatch.setattr(report, "RESULTS", tmp_path)
    monkeypatch.setattr(report.info, "cpu_model", lambda: "AMD EPYC 9B45 96-Core Processor")
    run = report.Report(report.parser("A question?", "name").parse_args(["--write"]), "title")
    run.finish([], "table")
    folder = tmp_path / "amd_epyc_9b45"
    assert sorted(path.name for path in folder.iterdir()) == ["name_cpu.json", "name_cpu.md"]
    assert json.loads((folder / "name_cpu.json").read_text())["cpu"] == "AMD EPYC 9B45 96-Core Processor"
