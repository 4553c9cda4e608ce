"""Tests bench_kernels.py, and the stages that it measures, as far as they need no GPU."""

import sys
from collections import Counter
from pathlib import Path

import pytest
import torch

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"
sys.path.insert(0, str(BENCHMARKS))

import bench_kernels  # noqa: E402
from harness import stages  # noqa: E402
from harness.shapes import Shape  # noqa: E402
from harness.stages import Case  # noqa: E402

pytestmark = [pytest.mark.cpu_only("tests a script's arithmetic"), pytest.mark.full]

MIB = 2**20


# --- the byte model ---------------------------------------------------------------------------------------------------


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


def test_bytes_follow_the_case():
    def of(stage, **changes):
        return stages.stage_bytes(Case(**({"shape": Shape(64, 100, 200), "rank": 4} | changes)))[stage]

    assert of("shrink") - of("shrink", dropout=0.0) == 64 * 16  # rows of the mask are whole 64-bit words
    assert of("expand") == of("expand", dropout=0.0)
    assert of("expand", dtype=torch.float32) - of("expand") == 2 * (64 * 200 + 4 * 200)
    assert of("expand", dtype=torch.float64) == 8 * (64 * 200 + 4 * 200 + 64 * 4)  # sums in float64, too
    assert of("grad_a", shape=Shape(64, 100, 999)) == of("grad_a")


def test_floor_is_the_longer_of_bytes_and_products():
    case = Case(Shape(8192, 4096, 4096), rank=16)
    by_bytes = stages.stage_bytes(case)["expand"] / 3e12
    assert stages.floor_seconds(case, "expand", 3e12, 8e14) == by_bytes
    assert stages.floor_seconds(case, "expand", 3e12, 1e12) == 2 * 8192 * 4096 * 16 / 1e12
    assert stages.stage_flops(case)["grad_b"] == 2 * stages.stage_flops(case)["expand"]


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
    assert bench_kernels.merge_stages("unmerge", named("merge_kernel")) == ["unmerge"]

    # The predictions count the same launches, and PyTorch's seed and product.
    for table, found in (
        (stages.FORWARD_LAUNCHES, bench_kernels.forward_stages(named("shrink_kernel", "expand_short_kernel"))),
        (stages.FEW_TOKENS_LAUNCHES, bench_kernels.forward_stages(named("shrink_kernel", "few_tokens_kernel"))),
        (stages.BACKWARD_LAUNCHES, bench_kernels.backward_stages(fused)),
    ):
        assert Counter(found) == {stage: n for stage, n in table.items() if stage not in ("seed", "product")}


def test_a_profile_is_split_into_its_calls():
    assert bench_kernels.split_evenly(list("abcdef"), 3) == [["a", "b"], ["c", "d"], ["e", "f"]]
    for kernels in ("abcde", ""):
        with pytest.raises(bench_kernels.LostKernels, match=f"saw {len(kernels)} kernels of lora_ext in 3 equal calls"):
            bench_kernels.split_evenly(list(kernels), 3)
