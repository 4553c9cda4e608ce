"""Tests scripts/gpu_check.py and bench_kernels.py as far as they need no GPU."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"
sys.path[:0] = [str(BENCHMARKS), str(BENCHMARKS.parent / "scripts")]

import bench_kernels  # noqa: E402
import gpu_check  # noqa: E402
from bench_kernels import Case  # noqa: E402
from gpu_check import FAILED, NOT_RUN, PASSED, TIMED_OUT, Outcome, Part  # noqa: E402
from harness import timing  # noqa: E402
from harness.shapes import Shape  # noqa: E402

pytestmark = [pytest.mark.cpu_only("tests a script's arithmetic"), pytest.mark.full]

MIB = 2**20


# --- the byte model ---------------------------------------------------------------------------------------------------


def test_bytes_of_the_main_shape():
    """Checks 8192 x 4096 -> 4096 in bfloat16: 64 MiB for x, y and their gradients; 4 MiB of mask; the rest is small."""
    case = Case(Shape(8192, 4096, 4096), rank=16)
    skinny = 8192 * 16 * 4 + 16 * 4096 * 2
    assert bench_kernels.stage_bytes(case) == {
        "shrink": 68 * MIB + skinny,
        "expand": 64 * MIB + skinny,
        "few_tokens": (64 + 64 + 32) * MIB + skinny,
        "grad_b": 64 * MIB + 2 * skinny,
        "grad_a": 68 * MIB + skinny,
        "grad_x": 68 * MIB + skinny,
        "merge": 2 * 32 * MIB + 2 * 16 * 4096 * 2,
        "unmerge": 2 * 32 * MIB + 2 * 16 * 4096 * 2,
    }


def test_bytes_follow_the_case():
    def of(stage, **changes):
        return bench_kernels.stage_bytes(Case(**({"shape": Shape(64, 100, 200), "rank": 4} | changes)))[stage]

    assert of("shrink") - of("shrink", dropout=0.0) == 64 * 16  # rows of the mask are whole 64-bit words
    assert of("expand") == of("expand", dropout=0.0)
    assert of("expand", dtype=torch.float32) - of("expand") == 2 * (64 * 200 + 4 * 200)
    assert of("expand", dtype=torch.float64) == 8 * (64 * 200 + 4 * 200 + 64 * 4)  # sums in float64, too
    assert of("grad_a", shape=Shape(64, 100, 999)) == of("grad_a")


def test_floor_is_the_longer_of_bytes_and_products():
    case = Case(Shape(8192, 4096, 4096), rank=16)
    by_bytes = bench_kernels.stage_bytes(case)["expand"] / 3e12
    assert bench_kernels.floor_seconds(case, "expand", 3e12, 8e14) == by_bytes
    assert bench_kernels.floor_seconds(case, "expand", 3e12, 1e12) == 2 * 8192 * 4096 * 16 / 1e12
    assert bench_kernels.stage_flops(case)["grad_b"] == 2 * bench_kernels.stage_flops(case)["expand"]


def named(*kernels: str) -> list[str]:
    return [f"void lora_ext::cuda::mma::{kernel}<__nv_bfloat16, 1>(lora_ext::cuda::Params)" for kernel in kernels]


def test_kernels_are_assigned_to_stages():
    assert bench_kernels.is_ours(named("shrink_kernel")[0])
    assert not bench_kernels.is_ours("sm90_xmma_gemm_bf16bf16_bf16f32_f32_tn_n_tilesize128x128x64")
    assert bench_kernels.forward_stages(named("shrink_kernel", "expand_short_kernel")) == ["shrink", "expand"]
    assert bench_kernels.forward_stages(named("shrink_kernel", "few_tokens_kernel")) == ["shrink", "few_tokens"]
    packed = named("pack_factors_kernel", "shrink_kernel", "rank_sums_kernel", "expand_short_kernel")
    assert bench_kernels.forward_stages(packed) == ["pack", "shrink", "shrink", "expand"]

    fused = named("shrink_and_sum_kernel", "expand_short_kernel", "token_sum_kernel", "gradient_sums_kernel")
    assert bench_kernels.backward_stages(fused) == ["grad_b", "grad_x", "grad_a", "grad_a"]
    split = ["pack_factors_kernel", "shrink_kernel", "token_sum_kernel", "rank_sums_kernel", "expand_short_kernel"]
    expected = ["pack", "grad_b", "grad_b", "grad_b", "grad_x", "grad_a", "grad_a"]
    assert bench_kernels.backward_stages(named(*split, "token_sum_kernel", "gradient_sums_kernel")) == expected
    assert bench_kernels.merge_stages("merge", named("merge_kernel", "merge_kernel")) == ["plan", "merge"]


def test_inputs_rotate_beyond_the_cache():
    large, small = Case(Shape(8192, 4096, 4096)), Case(Shape(64, 384, 384))
    assert bench_kernels.count_of_sets(large, 50 * MIB) == 2
    assert bench_kernels.count_of_sets(small, 50 * MIB) == 16
    set_bytes = (64 * 768 + 384 * 384) * 2
    assert bench_kernels.count_of_sets(small, set_bytes) == 4


def test_rows_and_table():
    case = Case(Shape(8192, 4096, 4096), dropout=0.0)
    expand = bench_kernels.stage_bytes(case)["expand"]
    ceilings = {"copy": 3e12, "matrix_bfloat16": 8e14}
    rows = bench_kernels.rows_of(case, {"pack": 2e-6, "expand": 2 * expand / 3e12}, ceilings)
    assert rows[0] == {"case": str(case), "stage": "pack", "us": pytest.approx(2)}
    assert rows[1]["of_copy"] == rows[1]["of_floor"] == pytest.approx(0.5)
    lines = bench_kernels.table(rows).splitlines()
    assert lines[3].startswith("| 8192 x 4096 -> 4096, r=16, bfloat16 | expand | ")
    assert lines[3].endswith("| 1500 | 50% | 50% |") and lines[2].endswith("| pack | 2.0 |  |  |  |")


def test_a_profile_is_split_into_its_calls():
    assert bench_kernels.split_evenly(list("abcdef"), 3) == [["a", "b"], ["c", "d"], ["e", "f"]]
    for kernels in ("abcde", ""):
        with pytest.raises(SystemExit, match=f"saw {len(kernels)} kernels of lora_ext in 3 equal calls"):
            bench_kernels.split_evenly(list(kernels), 3)


# --- the parts and their time -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "capability, arch",
    [((8, 0), "80"), ((8, 6), "86"), ((8, 9), "89"), ((9, 0), "90a"), ((10, 0), "100"), ((12, 0), "120")],
)
def test_architecture_of_the_card(capability, arch):
    assert gpu_check.arch_of(capability) == arch


def toolkit(folder: Path, version: str) -> Path:
    (folder / "bin").mkdir(parents=True)
    nvcc = folder / "bin" / "nvcc"
    nvcc.write_text(f"#!/bin/sh\necho 'Cuda compilation tools, release {version}, V{version}.48'\n")
    nvcc.chmod(0o755)
    return folder


def test_the_toolkit_is_that_of_torch(tmp_path):
    old, other, same = (toolkit(tmp_path / v, v) for v in ("12.9", "13.2", "13.0"))
    missing = tmp_path / "missing"
    find = gpu_check.find_cuda_home
    assert find("13.0", [missing, old, other, same]) == same
    assert find("13.1", [missing, old, other, same]) == other  # the first of the same major version
    assert find("13.0", [missing, old]) is None
    assert find("1.0", [old]) is None


def part(name: str, limit: float = 100, least: float = 20, **more) -> Part:
    return Part(name, ["true"], limit, least, **more)


def test_time_is_kept_for_later_parts():
    later = [part("b"), part("c", least=30)]
    assert gpu_check.seconds_for(part("a"), later, 400) == 100
    assert gpu_check.seconds_for(part("a"), later, 110) == 60
    assert gpu_check.seconds_for(part("a"), later, 40) == 0


def test_a_part_that_fails_leaves_the_later_ones_their_time(capsys):
    now = [0.0]
    allotted = {}

    def fake_run(one: Part, limit: float) -> Outcome:
        allotted[one.name] = limit
        now[0] += limit  # uses all its time
        return Outcome(one.name, TIMED_OUT if one.name == "a" else PASSED, limit, "", "")

    parts = [part("a", 90), part("b", 90), part("c", 90), part("d", needs=("a",)), part("e", not_run="no tool")]
    outcomes = gpu_check.run_all(parts, 150, clock=lambda: now[0], run_part=fake_run)
    assert allotted == {"a": 90, "b": 20, "c": 20, "e": 20}
    assert [o.status for o in outcomes] == [TIMED_OUT, PASSED, PASSED, FAILED, PASSED]
    assert outcomes[3].detail == "a did not pass" and "a did not pass" in capsys.readouterr().out


def test_parts_are_processes_with_limits(tmp_path, monkeypatch):
    monkeypatch.setattr(gpu_check, "LOGS", tmp_path)

    def run(code: str, limit: float = 60) -> Outcome:
        return gpu_check.run(Part("p", [sys.executable, "-c", code], limit, 0), limit)

    good = run("print('===== 3 passed, 1 skipped in 2 s ====='); print('done')")
    assert (good.status, good.detail) == (PASSED, "3 passed, 1 skipped in 2 s")
    bad = run("print('WRONG'); raise SystemExit(99)")
    assert (bad.status, bad.detail) == (FAILED, "WRONG")
    # The grandchild ends, too; it would keep the pipe and the GPU.
    slow = run("import subprocess; subprocess.run(['sleep', '600'])", 6)
    assert slow.status == TIMED_OUT and slow.seconds < 30
    assert run("", 3).detail == "no time left"
    hidden = run("print('Error: Device not supported'); raise SystemExit(1)")
    assert (hidden.status, hidden.detail) == (NOT_RUN, "compute-sanitizer does not support this machine")
    assert gpu_check.run(part("q", not_run="no tool"), 60).detail == "no tool"


def test_exit_status():
    def status(*pairs):
        return gpu_check.exit_status([Outcome(name, status, 0, "", "") for name, status in pairs])

    assert status(("build", PASSED), ("memcheck", NOT_RUN)) == 0
    for bad in (("tests", FAILED), ("layer", TIMED_OUT), ("tests", NOT_RUN), ("racecheck", FAILED)):
        assert status(("build", PASSED), bad) == 1


FACTS = {"card": "NVIDIA H100 80GB HBM3", "arch": "90a", "driver": "580.1", "torch": "2.11.0+cu130", "cuda": "13.0"}
FACTS |= {"python": "3.12.3", "commit": "0123456789abcdef", "date": "2026-11-25T10:00:00+00:00", "nvcc": "13.0.48"}


def test_all_parts_fit():
    parts = gpu_check.list_parts(FACTS, Path("/usr/local/cuda"), 16)
    names = [part.name for part in parts]
    assert names == ["build", "golden", "small", "tests", "memcheck", "racecheck", "kernels", "layer"]
    assert sum(part.least_s for part in parts) < 300 < 465 < 480
    assert parts[0].environment["LORA_EXT_CUDA_ARCHS"] == "90a"
    assert all(part.not_run == "" for part in parts if part.name in ("tests", "kernels", "layer"))
    commands = [gpu_check.shown(part.command) for part in parts]
    assert commands[0] == "python setup.py build_ext --inplace"
    assert commands[-2] == "python benchmarks/bench_kernels.py --json build/gpu_check/kernels.json --seconds 45"
    assert not any(str(BENCHMARKS.parent) in command for command in commands)
    without = gpu_check.list_parts(FACTS, None, 2)
    assert without[0].not_run == "no CUDA toolkit for torch's CUDA 13.0: set CUDA_HOME"


def test_report_and_json():
    kernel = {"case": "a case", "stage": "expand", "us": 25.0, "gb_s": 2700.0, "of_copy": 0.9, "of_floor": 0.91}
    kernels = {"ceilings": {"copy": 3e12, "matrix_bfloat16": 7.9e14}, "rows": [kernel]}
    row = {"pass": "forward + backward", "dropout": 0.1, "shape": [8192, 4096, 4096], "dtype": "bfloat16"}
    row |= {"rounds": 60, "frozen_ms": 0.7}
    layer = [row | {"ratio": {"lora_ext": [1.1, 1.09, 1.12]}}]
    outcomes = [
        Outcome("build", PASSED, 61.2, "python setup.py", "built"),
        Outcome("tests", FAILED, 9, "pytest", "1 failed"),
    ]
    result = json.loads(json.dumps(gpu_check.collect(FACTS, outcomes, kernels, layer)))
    assert result["parts"][1]["command"] == "pytest" and result["kernels"] == [kernel] and result["layer"] == layer
    text = gpu_check.format_report(result)
    for expected in ("NVIDIA H100 80GB HBM3", "| tests | failed | 9 | 1 failed |", "copy 3000 GB/s", "bfloat16 790"):
        assert expected in text
    assert "| a case | expand | 25.0 | 2700 | 90% | 91% |" in text
    assert "forward + backward, dropout 0.1" in text and "1.10 (1.09-1.12)" in text
    # A run without measurements still reports.
    empty = gpu_check.collect(FACTS, outcomes, None, None)
    assert "| build | passed | 61 | built |" in gpu_check.format_report(empty)
    assert gpu_check.machine_folder(FACTS["card"]) == "nvidia_h100_80gb_hbm3"


def test_without_a_gpu_it_says_so():
    if torch.cuda.is_available():
        pytest.skip("there is a GPU")
    script = BENCHMARKS.parent / "scripts" / "gpu_check.sh"
    result = subprocess.run([script, sys.executable], capture_output=True, text=True)
    assert result.returncode == 1 and "finds no GPU" in result.stderr


# --- timing -----------------------------------------------------------------------------------------------------------


def test_contestants_are_timed_by_the_clock_they_are_given():
    calls = []
    clock = lambda call: call() or 2.0  # noqa: E731
    seconds = timing.interleaved({"a": lambda: calls.append("a"), "b": lambda: calls.append("b")}, 4, clock=clock)
    assert seconds == {"a": [2.0] * 4, "b": [2.0] * 4}
    assert calls.count("a") == calls.count("b") == 4 + 3  # warm-up rounds are not counted
