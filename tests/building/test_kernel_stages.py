"""Tests the stages that bench_kernels.py measures, as far as they need no GPU."""

import sys
from collections import Counter
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parents[2] / "benchmarks"))

import bench_kernels
from harness import stages

from lora_ext import _C

pytestmark = [pytest.mark.cpu_only("tests a script's arithmetic"), pytest.mark.full]


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
        found = Counter(assign(kernels))
        wanted = {stage: n for stage, n in table.items() if stage not in ("seed", "product")}
        assert found.keys() == wanted.keys() and (rank > 16 or tokens < 8192 or found == wanted), found
