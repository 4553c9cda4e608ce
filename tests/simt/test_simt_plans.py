"""Tests the kernels' plans at the sizes of real layers: how many launches, how many blocks."""

from __future__ import annotations

import pytest
import torch

from simt import planned
from simt.planned import kernel_names

pytestmark = [pytest.mark.cpu_only("plans of the CUDA kernels, made on the CPU"), pytest.mark.full]

GPUS = {"A100": 108, "H100 PCIe": 114, "H100": 132, "B200": 148, "L4": 58}
PASSES = ("shrink_kernel", "shrink_and_sum_kernel", "token_sum_kernel")  # read x or grad_y


@pytest.mark.parametrize("gpu", GPUS)
@pytest.mark.parametrize("tokens", [2048, 8192])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_the_blocks_of_a_pass_fit_the_multiprocessors(dtype, tokens, gpu):
    """A pass that does not fill its last round of blocks leaves multiprocessors idle."""
    arguments = tokens, 4096, [(4096, 16)], dtype, dtype
    launches = planned.forward(*arguments, multiprocessors=GPUS[gpu])
    launches += planned.backward(*arguments, multiprocessors=GPUS[gpu])
    passes = [launch for launch in launches if launch.kernel in PASSES]
    assert [launch.kernel for launch in passes] == list(PASSES)
    for launch in passes:
        resident = GPUS[gpu] * (1 if launch.kernel == "shrink_and_sum_kernel" else 2)
        rounds = -(-launch.blocks // resident)
        used = launch.blocks / (rounds * resident)
        assert used > 0.8 or (rounds == 1 and launch.blocks > 0.8 * GPUS[gpu]), launch


def test_one_gpu_has_one_plan():
    first, second = (planned.backward(300, 4096, [(4096, 16)]) for _ in range(2))
    assert first == second
    assert first != planned.backward(300, 4096, [(4096, 16)], multiprocessors=20)
    assert kernel_names(first)
