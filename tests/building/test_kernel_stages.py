"""Tests the stages that bench_kernels.py measures, as far as they need no GPU."""

import sys
from collections import Counter
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parents[2] / "benchmarks"))

import bench_kernels
from harness import stages
from harness.shapes import Shape
from harness.stages import Case

from lora_ext import _C

pytestmark = [pytest.mark.cpu_only("tests a script's arithmetic"), pytest.mark.full]

MIB = 2**20


def test_bytes_of_the_main_shape():
    """Checks 8192 x 4096 -> 4096 in bfloat16: 64 MiB for x, y and their gradients; 4 MiB of mask; the rest is small."""
    case = Case(Shape(8192, 4096, 4096), rank=16)
    skinny = 8192 * 16 * 4 + 16 * 4096 * 2
    assert stages.stage_bytes(case) == {
        "shrink": 68 * MIB + skinny,
        "expand": 64 * MIB + skinny,
        "few_tokens": (64 + 64 + 32) * MIB + skinny,
        "grad_b": 64 * MIB + 2 * skinny,
        "grad_a": 68 * MIB + skinny,
        "grad_x": 68 * MIB + skinny,
        "merge": 2 * 32 * MIB + 2 * 16 * 4096 * 2,
        "unmerge": 2 * 32 * MIB + 2 * 16 * 4096 * 2,
    }
    float64 = Case(Shape(64, 100, 200), rank=4, dtype=torch.float64, dropout=0.0)
    assert stages.stage_bytes(float64)["expand"] == 8 * (64 * 200 + 4 * 200 + 64 * 4)  # sums in float64, too
    assert stages.floor_seconds(case, "expand", 3e12, 8e14) == stages.stage_bytes(case)["expand"] / 3e12
    small = {"shape": Shape(64, 100, 200), "rank": 4}
    wide, narrow = (stages.stage_bytes(Case(**small, factor_dtype=dtype)) for dtype in (torch.float32, torch.bfloat16))
    assert wide["grad_b"] - narrow["grad_b"] == 2 * 2 * 4 * 200  # lora_B, and its gradient
    assert stages.floor_seconds(case, "expand", 3e12, 1e12) == 2 * 8192 * 4096 * 16 / 1e12


def named(kernels: list[str]) -> list[str]:
    return [
        f"void lora_ext::cuda::mma::{kernel}_kernel<__nv_bfloat16, 1>(lora_ext::cuda::Params)" for kernel in kernels
    ]


@pytest.mark.parametrize("factors", ["bfloat16", "float32"])
@pytest.mark.parametrize("rank", [16, 64, 256])
@pytest.mark.parametrize("tokens", [4, 100, 8192])
def test_the_kernels_of_a_plan_are_assigned_to_stages(tokens, rank, factors):
    """By the names of the kernels that a call launches; predictions.py counts the same ones for a rank of 16."""
    few = stages.FEW_TOKENS_LAUNCHES if tokens <= stages.FEW_TOKENS and rank < 256 else stages.FORWARD_LAUNCHES
    for plan, assign, table in (
        (_C.plan_forward, bench_kernels.forward_stages, few),
        (_C.plan_backward, bench_kernels.backward_stages, stages.BACKWARD_LAUNCHES),
    ):
        launches = plan(tokens, 4096, [(4096, rank)], factor_dtype=factors).launches
        kernels = named([launch.kernel for launch in launches])
        assert all(map(bench_kernels.is_ours, kernels))
        found = Counter(stage for stage in assign(kernels) if stage != "pack")
        wanted = {stage: n for stage, n in table.items() if stage not in ("seed", "product")}
        assert found.keys() == wanted.keys() and (rank > 16 or tokens < 8192 or found == wanted), found


def test_other_kernels_and_merges():
    assert not bench_kernels.is_ours("sm90_xmma_gemm_bf16bf16_bf16f32_f32_tn_n_tilesize128x128x64")
    assert bench_kernels.merge_stages("merge", named(["merge", "merge"])) == ["plan", "merge"]
    assert bench_kernels.merge_stages("unmerge", named(["merge"])) == ["unmerge"]


def test_a_profile_is_split_into_its_calls():
    assert bench_kernels.split_evenly(list("abcdef"), 3) == [["a", "b"], ["c", "d"], ["e", "f"]]
    for kernels in ("abcde", ""):
        with pytest.raises(bench_kernels.LostKernels, match=f"saw {len(kernels)} kernels of lora_ext in 3 equal calls"):
            bench_kernels.split_evenly(list(kernels), 3)
