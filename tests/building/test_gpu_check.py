"""Tests scripts/gpu_check.py as far as it needs no GPU."""

import json
import signal
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest
import torch
from support.processes import run_python

ROOT = Path(__file__).parents[2]
sys.path[:0] = [str(ROOT / "benchmarks"), str(ROOT / "scripts")]

import gpu_check  # noqa: E402
import gpu_report  # noqa: E402
from gpu_check import FAILED, NOT_FINISHED, NOT_RUN, OUT_OF_TIME, PASSED, Part  # noqa: E402

pytestmark = [pytest.mark.cpu_only("tests a script"), pytest.mark.full]

FACTS = {"card": "NVIDIA H100 80GB HBM3", "arch": "90a", "driver": "580.1", "torch": "2.11.0+cu130"}
FACTS |= {"python": "3.12.3", "commit": "0123456789abcdef", "date": "2026-11-25T10:00:00+00:00"}


@pytest.fixture(autouse=True)
def logs(tmp_path, monkeypatch):
    monkeypatch.setattr(gpu_check, "LOGS", tmp_path / "logs")
    (tmp_path / "logs").mkdir()
    return tmp_path / "logs"


def python(code: str, **more) -> Part:
    return Part("p", [sys.executable, "-c", textwrap.dedent(code)], 60, **more)


# --- the list of parts ------------------------------------------------------------------------------------------------


def test_the_parts(monkeypatch):
    parts = gpu_check.list_parts(FACTS, Path("/usr/local/cuda"), 16)
    names = [part.name for part in parts]
    assert names[:5] == ["build", "golden", "small", "ops", "large"]  # the tests of the ops come first
    assert names[5:] == ["kernels", "layer", "siblings", "host", "grouped", "memcheck", "racecheck", "tests", "rivals"]
    assert parts[0].environment == {"LORA_EXT_CUDA": "1", "LORA_EXT_CUDA_ARCHS": "90a", "MAX_JOBS": "16"} | {
        "CUDA_HOME": "/usr/local/cuda"
    }
    commands = {part.name: " ".join(part.command) for part in parts}
    assert "tests/ops -m not large" in commands["ops"] and commands["ops"].endswith(" -n 8")
    assert "--ignore=tests/ops" in commands["tests"]
    assert "tests/ops/test_cuda.py" in commands["large"] and commands["large"].endswith(" -n 1")  # one at a time
    # Without nvcc, libraries that were built before are checked; without those, setup.py says what is missing.
    for libraries, first in ((("torch",), "library"), ((), "build")):
        monkeypatch.setattr(gpu_check, "LIBRARIES", ["__init__.py"] if libraries else ["no.so"])
        parts = gpu_check.list_parts(FACTS, None, 2)
        assert parts[0].name == first and parts[1].not_run.startswith("no nvcc")


# --- a part -----------------------------------------------------------------------------------------------------------


def test_parts_are_processes_with_limits(logs):
    good = gpu_check.run(python("print('===== 3 passed, 1 skipped in 2 s ====='); print('done')"), 60)
    assert (good["status"], good["detail"]) == (PASSED, "3 passed, 1 skipped in 2 s")
    bad = gpu_check.run(python("print('WRONG'); raise SystemExit(99)"), 60)
    assert (bad["status"], bad["detail"]) == (FAILED, "WRONG")
    absent = gpu_check.run(Part("q", ["/no/such/program"], 60), 60)
    assert absent["status"] == FAILED and "/no/such/program" in absent["detail"]
    assert gpu_check.run(python(""), 3)["detail"].startswith("no time left")
    assert gpu_check.run(python("", not_run="no tool"), 60)["detail"] == "no tool"
    # It is asked first; a grandchild, which would keep the GPU, ends, too; what was measured stays.
    (logs / "p.json").write_text("[0]")  # of an earlier run
    code = f"""
        import pathlib, subprocess, time
        subprocess.Popen(["sh", "-c", "trap '' INT; exec sleep 619"])
        pathlib.Path({str(logs)!r}, "p.json").write_text("[1, 2]")
        try:
            time.sleep(600)
        except KeyboardInterrupt:
            print("2 passed")
    """
    slow = gpu_check.run(python(code, measures=True), 6)
    assert (slow["status"], slow["detail"], slow["measured"]) == (OUT_OF_TIME, "2 passed", [1, 2])
    assert slow["seconds"] < 30 and not subprocess.run(["pgrep", "-f", "sleep 619"], capture_output=True).stdout
    assert gpu_check.run(python("raise SystemExit(1)", measures=True), 60)["measured"] is None


@pytest.mark.parametrize(
    "text, code, status",
    [
        ("9 cases, 0 wrong\n========= ERROR SUMMARY: 0 errors", 0, PASSED),
        ("not finished: 5 of 9 cases in 40 s, 0 wrong\n========= ERROR SUMMARY: 0 errors", 75, NOT_FINISHED),
        ("", 124, NOT_FINISHED),  # torch was still being imported
        ("========= Invalid __global__ read of size 4 bytes", 137, FAILED),
        ("========= Error: Race reported between Write access at f and Read access at g", 75, FAILED),
        ("========= RACECHECK SUMMARY: 2 hazards displayed (2 errors, 0 warnings)", 99, FAILED),
        ("(1, 2) bfloat16: error 3e-1, WRONG", 124, FAILED),
        ("Error: Device not supported", 1, NOT_RUN),
        ("Traceback", 1, FAILED),
    ],
)
def test_a_sanitizer_without_time_is_not_finished(text, code, status):
    assert gpu_check.status_of(python("", sanitizer=True), code, text) == status


# --- the result file --------------------------------------------------------------------------------------------------


def entry(status: str = PASSED, seconds: float = 61.2, measured=None, failures=()) -> dict:
    return {"status": status, "seconds": seconds, "detail": "well", "failures": [*failures], "measured": measured}


def test_entries_and_their_report(tmp_path, monkeypatch):
    case = "8192 x 4096 -> 4096, r=16, bfloat16, p=0.1"
    kernel = {"case": case, "stage": "expand", "us": 25.0, "gb_s": 2700.0, "of_copy": 0.9, "of_floor": 0.91}
    kernel |= {"bytes": 67764224, "flops": 1073741824, "launches": 1}
    row = {"pass": "forward + backward", "dropout": 0.1, "shape": [8192, 4096, 4096], "dtype": "bfloat16"}
    row |= {"rounds": 60, "frozen_ms": 0.7}
    siblings = row | {"shape": [8192, 4096, 4096, 1024, 1024], "ratio": {"siblings": [1.3, 1.2, 1.4]}, "overhead": 0.5}
    rows = row | {"shape": [64, 4096, 4096], "adapters": 64, "pass": "forward", "one adapter_ms": 0.02}
    rows |= {"ratio": {"frozen": [0.8, 0.8, 0.8], "stack": [1.6, 1.6, 1.6]}, "overhead": 0.1}
    figures = {
        "kernels": {"ceilings": {"copy": 3e12, "matrix_bfloat16": 7.9e14}, "rows": [kernel]},
        "layer": [row | {"ratio": {"lora_ext": [1.1, 1.09, 1.12]}}],
        "siblings": [siblings],
        "host": [{"pass": "forward", "microseconds": {"frozen": 12.0, "lora_ext": 50.0, "peft": 60.0}, "ratio": {}}],
        "grouped": [rows],
        "rivals": [row | {"ratio": {"lora_ext": [1.1, 1.09, 1.12], "axolotl": [1.5, 1.4, 1.6]}}],
    }
    path = tmp_path / "gpu_check.json"
    for name, measured in figures.items():
        gpu_report.add_entry(path, FACTS, name, entry(measured=measured))
    later = FACTS | {"commit": "f" * 40}
    gpu_report.add_entry(path, later, "ops", entry(FAILED, failures=["tests/a.py::test_b"]))
    gpu_report.add_entry(path, later, "layer", entry(NOT_RUN, 0.0))  # replaces no figures
    result = gpu_report.read_result(path)
    assert [gpu_report.has_passed(name, result, FACTS) for name in ("layer", "ops", "build")] == [True, False, False]
    assert not gpu_report.has_passed("layer", result, FACTS | {"torch": "2.12.0"})
    text = gpu_report.format_report(result, FACTS, ["build", *figures])
    for expected in (
        "NVIDIA H100 80GB HBM3, driver 580.1, torch 2.11.0+cu130, commit 0123456789ab",
        "| build | not run | 0 | not in this run, nor before |",
        "| layer | passed | 61 | well |",
        "| ops | failed | 61 | (commit ffffffffffff) well |\n| | | | failed: tests/a.py::test_b |",
        "copy 3000 GB/s; matrix products, TFLOP/s: bfloat16 790",
        f"| {case} | expand | 25.0 | 2700 | 90% | 91% |",
        "axolotl",
        "Measured next to predicted (benchmarks/predictions.py, H100 at 3.00 TB/s, 790 TFLOP/s):",
        f"| {case} | expand | 22.6 | 25.0 | 1.11 | 1 (1) |",
        f"| forward + backward, {case} | 1.22-1.28 | 1.10 | faster than predicted |",
        "| 1.30 | slower than predicted |",
        "| 64 adapters, 64 x 4096 -> 4096, r=16, bfloat16 | 1.83 | 2.00 | slower than predicted |",
        "| forward | lora_ext | 30 | 50 | 1.67 |",
        "| forward | 12 | 50 | 60 |",
    ):
        assert expected in text, f"{expected}\n\n{text}"
    other = FACTS | {"card": "NVIDIA L40S"}  # the rates that were measured in the run
    assert "NVIDIA L40S at 3.00 TB/s, 790 TFLOP/s" in gpu_report.format_report(result, other, list(figures))
    monkeypatch.setitem(sys.modules, "bench_grouped", None)  # the benchmarks import lora_ext, whose build failed
    assert "No tables of the figures, which are in the result file: " in gpu_report.format_report(result, FACTS, [])
    path.write_text('{"parts": {"a"')  # a broken file is begun again
    assert gpu_report.read_result(path) == {"parts": {}}


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
