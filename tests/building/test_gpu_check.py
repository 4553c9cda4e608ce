"""Tests scripts/gpu_check.py and its parts as far as they need no GPU."""

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
import gpu_parts  # noqa: E402
import gpu_report  # noqa: E402
import gpu_toolkit  # noqa: E402
import timed_parts  # noqa: E402
from timed_parts import FAILED, NOT_RUN, PASSED, TIMED_OUT, Outcome, Part  # noqa: E402

pytestmark = [pytest.mark.cpu_only("tests a script"), pytest.mark.full]

FACTS = {"card": "NVIDIA H100 80GB HBM3", "arch": "90a", "driver": "580.1", "torch": "2.11.0+cu130", "cuda": "13.0"}
FACTS |= {"python": "3.12.3", "commit": "0123456789abcdef", "date": "2026-11-25T10:00:00+00:00", "nvcc": "13.0.48"}


@pytest.fixture(autouse=True)
def logs(tmp_path, monkeypatch):
    for module in (timed_parts, gpu_report, gpu_parts):
        monkeypatch.setattr(module, "LOGS", tmp_path / "logs")
    (tmp_path / "logs").mkdir()
    return tmp_path / "logs"


# --- the list of parts ------------------------------------------------------------------------------------------------


def test_all_parts_fit():
    parts = gpu_parts.list_parts(FACTS, Path("/usr/local/cuda"), 16)
    names = [part.name for part in parts]
    assert names[:5] == ["build", "golden", "small", "ops", "large"]  # the tests of the ops come first
    assert names[5:] == ["kernels", "layer", "siblings", "host", "grouped", "memcheck", "racecheck", "tests", "rivals"]
    assert sum(part.least_s for part in parts) < 400 < 465 < 480
    assert parts[0].environment["LORA_EXT_CUDA_ARCHS"] == "90a"
    by_name = {part.name: part for part in parts}
    commands = {name: timed_parts.shown(part.command) for name, part in by_name.items()}
    assert commands["build"] == "python setup.py build_ext --inplace"
    assert commands["kernels"].startswith("python benchmarks/bench_kernels.py --json ")
    assert commands["kernels"].endswith("kernels.json --seconds 45")
    assert "tests/ops -m not large" in commands["ops"] and "--ignore=tests/ops" in commands["tests"]
    assert "-m large" in commands["large"] and commands["large"].endswith(" -n 1")  # one at a time
    assert commands["ops"].endswith(" -n 8")
    assert "tests/ops/test_cuda.py" in commands["large"]
    assert not any(str(ROOT) in command for command in commands.values())
    for name in ("memcheck", "racecheck"):
        limit = by_name[name].limit_s
        assert f"--seconds {gpu_parts.SANITIZER_S}" in commands[name] and limit > gpu_parts.SANITIZER_S + 30
        assert "--report-api-errors no" in commands[name]  # torch asks CUDA for functions that a driver may lack


def test_without_nvcc(monkeypatch, tmp_path):
    monkeypatch.setattr(gpu_parts, "PACKAGE", tmp_path)
    parts = gpu_parts.list_parts(FACTS, None, 2)
    assert parts[0].not_run.startswith("no CUDA toolkit of 12.8 or newer for torch's CUDA 13.0: set CUDA_HOME, or give")
    outcomes = timed_parts.run_all(parts, 400, run_part=lambda p, s: timed_parts.run(p, s) if p.not_run else 1 / 0)
    assert {o.status for o in outcomes} == {NOT_RUN}
    assert [o.detail for o in outcomes if o.name in ("ops", "layer")] == ["build was not run"] * 2
    assert timed_parts.exit_status(parts, outcomes) == 1

    with_library = gpu_parts.list_parts(FACTS, None, 2, tmp_path / "x.whl")
    assert timed_parts.shown(with_library[0].command).endswith(f"gpu_check.py --check-library {tmp_path / 'x.whl'}")
    assert with_library[1].not_run == "no nvcc, which compiles tests/simt/golden.cu" and with_library[1].optional
    assert {part.needs for part in with_library[2:]} == {("library",)}
    # A library in the package was built before, or came by --library.
    for name in gpu_toolkit.LIBRARIES:
        (tmp_path / name).touch()
    assert gpu_parts.list_parts(FACTS, None, 2)[0].command[-1] == "--check-library"
    assert gpu_parts.list_parts(FACTS, Path("/usr/local/cuda"), 2)[0].name == "build"


def parts_named(*names: str) -> list[Part]:
    return [Part(name, ["true"], 100, 20) for name in names]


def test_parts_can_be_chosen():
    parts = parts_named("a", "b", "c")
    assert [p.name for p in gpu_parts.chosen(parts, "c,a")] == ["a", "c"]
    with pytest.raises(SystemExit, match=r"gpu_check: no part x; there are a, b, c"):
        gpu_parts.chosen(parts, "a,x")


# --- the result file --------------------------------------------------------------------------------------------------


def test_each_part_writes_its_entry_at_once(tmp_path, logs):
    path = tmp_path / "results" / "gpu_check.json"
    (logs / "layer.json").write_text("[3]")
    gpu_report.add_outcome(path, FACTS, Outcome("layer", PASSED, 9.0, "python", "good"), "layer.json")
    later = FACTS | {"commit": "f" * 40, "date": "2026-11-26T10:00:00+00:00"}
    gpu_report.add_outcome(path, later, Outcome("ops", FAILED, 5.0, "pytest", "1 failed", ["tests/a.py::test_b"]))
    result = json.loads(path.read_text())
    assert result["card"] == FACTS["card"] and list(result["parts"]) == ["layer", "ops"]
    assert (
        result["parts"]["layer"]["measured"] == [3] and result["parts"]["layer"]["facts"]["commit"] == FACTS["commit"]
    )
    assert result["parts"]["ops"]["failures"] == ["tests/a.py::test_b"]
    # A part that did not start replaces no figures.
    for outcome in (Outcome("layer", NOT_RUN, 0.0, "", "build was not run"), Outcome("layer", TIMED_OUT, 0.0, "", "")):
        gpu_report.add_outcome(path, later, outcome, "layer.json")
    result = gpu_report.read_result(path)
    assert result["parts"]["layer"]["measured"] == [3]
    result["parts"]["layer"]["measured"] = None
    text = gpu_report.format_report(result, later, ["build", "ops", "layer"])
    assert "| build | not run | 0 | not in this run, nor before |" in text
    assert f"| layer | passed | 9 | (commit {FACTS['commit'][:12]}) good |" in text
    assert "| ops | failed | 5 | 1 failed |\n| | | | failed: tests/a.py::test_b |" in text
    path.write_text('{"parts": {"a"')  # a broken file is begun again
    gpu_report.add_outcome(path, FACTS, Outcome("ops", PASSED, 5.0, "pytest", ""))
    assert list(gpu_report.read_result(path)["parts"]) == ["ops"]


def test_a_run_is_continued(tmp_path):
    path = tmp_path / "gpu_check.json"
    for name, status in (("build", PASSED), ("ops", FAILED), ("large", TIMED_OUT), ("layer", PASSED)):
        facts = FACTS | ({"torch": "2.12.0"} if name == "layer" else {})
        gpu_report.add_outcome(path, facts, Outcome(name, status, 5.0, "", ""))
    parts = parts_named("build", "ops", "large", "layer", "host")
    result = gpu_report.read_result(path)
    assert [p.name for p in gpu_report.not_yet_passed(parts, result, FACTS)] == ["ops", "large", "layer", "host"]
    changed = FACTS | {"commit": FACTS["commit"] + "+changes"}
    assert gpu_report.not_yet_passed(parts, result, changed) == parts


def test_report_and_json(tmp_path, logs):
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
        (logs / f"{name}.json").write_text(json.dumps(measured))
        gpu_report.add_outcome(path, FACTS, Outcome(name, PASSED, 61.2, "python", "measured"), f"{name}.json")
    text = gpu_report.format_report(gpu_report.read_result(path), FACTS, list(figures))
    for expected in (
        "NVIDIA H100 80GB HBM3, driver 580.1, torch 2.11.0+cu130, nvcc 13.0.48, commit 0123456789ab",
        "copy 3000 GB/s; matrix products, TFLOP/s: bfloat16 790",
        f"| {case} | expand | 25.0 | 2700 | 90% | 91% |",
        "axolotl",
        "Measured next to predicted (benchmarks/predictions.py, H100 at 3.00 TB/s, 790 TFLOP/s):",
        f"| {case} | expand | 22.6 | 25.0 | 1.11 | 1 (1) |",
        f"| forward + backward, {case} | 1.19-1.25 | 1.10 | faster than predicted |",
        "| 1.30 | slower than predicted |",
        "| 64 adapters, 64 x 4096 -> 4096, r=16, bfloat16 | 1.75 | 2.00 | slower than predicted |",
        "| forward | lora_ext | 30 | 50 | 1.67 |",
        "| forward | 12 | 50 | 60 |",
    ):
        assert expected in text, f"{expected}\n\n{text}"
    # Another card: the rates that were measured in the run; none: no predictions.
    other = FACTS | {"card": "NVIDIA L40S"}
    text = gpu_report.format_report(gpu_report.read_result(path), other, list(figures))
    assert "NVIDIA L40S at 3.00 TB/s, 790 TFLOP/s" in text
    empty = gpu_report.format_report({"parts": {}}, other, ["build"])
    assert "predicted" not in empty and "| build | not run |" in empty


def test_a_failed_build_is_reported_though_lora_ext_cannot_be_imported(tmp_path, logs, monkeypatch):
    """The benchmarks, which format the tables, import lora_ext."""
    monkeypatch.setitem(sys.modules, "bench_grouped", None)
    path = tmp_path / "gpu_check.json"
    gpu_report.add_outcome(path, FACTS, Outcome("build", FAILED, 5.0, "python setup.py", "nvcc: error"))
    (logs / "layer.json").write_text("[3]")  # from an earlier run
    gpu_report.add_outcome(path, FACTS, Outcome("layer", PASSED, 9.0, "python", "good"), "layer.json")
    text = gpu_report.format_report(gpu_report.read_result(path), FACTS, ["build", "layer"])
    assert "| build | failed | 5 | nvcc: error |" in text
    assert "| layer | passed | 9 | good |\n\nNo tables of the figures, which are in the result file: " in text


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu_it_says_so():
    result = run_python(ROOT / "scripts" / "gpu_check.py")
    assert result.returncode == 1 and "finds no GPU" in result.stderr and "--dry" in result.stderr


def test_a_dry_run_goes_from_the_options_to_the_result_file(tmp_path, logs, monkeypatch, capsys):
    monkeypatch.setattr(gpu_check, "LOGS", logs)
    handlers = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    arguments = ["--dry", "--results", str(tmp_path), "--seconds", "300", "--only", "rivals"]
    monkeypatch.setattr(sys, "argv", ["gpu_check.py", *arguments])
    try:
        assert gpu_check.main() == 0, capsys.readouterr().out
    finally:
        for number, handler in handlers.items():
            signal.signal(number, handler)
    entry = json.loads((tmp_path / "gpu_check.json").read_text())["parts"]["rivals"]
    assert (entry["status"], entry["detail"]) == (PASSED, "no rival can be measured")
    assert "unsloth: not measured, unsloth is not installed" in (logs / "rivals.log").read_text()
    said = capsys.readouterr().out
    for expected in ("| golden | not run | 0 | not in this run, nor before |", "| rivals | passed |"):
        assert expected in said, said
    assert "predicted" not in said  # nothing was measured on a GPU


def measuring(code: str, limit: float) -> Outcome:
    return timed_parts.run(Part("p", [sys.executable, "-c", code], limit, 0, measures="m.json"), limit)


def test_what_was_measured_before_the_limit_is_kept(logs, tmp_path):
    """The figures that a part wrote are in the result file, though it was interrupted."""
    code = f"import pathlib, time; pathlib.Path({str(logs)!r}, 'm.json').write_text('[1, 2]'); time.sleep(600)"
    (logs / "m.json").write_text("[0]")  # of an earlier run
    outcome = measuring(code, 8)
    assert outcome.status == TIMED_OUT
    gpu_report.add_outcome(tmp_path / "r.json", FACTS, outcome, "m.json")
    assert gpu_report.measured(gpu_report.read_result(tmp_path / "r.json"), "p") == [1, 2]
    outcome = measuring("raise SystemExit(1)", 60)  # measured nothing
    gpu_report.add_outcome(tmp_path / "r.json", FACTS, outcome, "m.json")
    assert gpu_report.measured(gpu_report.read_result(tmp_path / "r.json"), "p") is None
