"""Tests the kernels' plans at the sizes of real layers: how many launches, how many blocks."""

from __future__ import annotations

import pytest
import torch

from simt import planned
from simt.planned import kernel_names

pytestmark = [pytest.mark.cpu_only("plans of the CUDA kernels, made on the CPU"), pytest.mark.full]

GPUS = {"A100": 108, "H100 PCIe": 114, "H100": 132, "B200": 148, "L4": 58}
BF16, F16, F32 = torch.bfloat16, torch.float16, torch.float32
PASSES = ("shrink_kernel", "shrink_and_sum_kernel", "token_sum_kernel")  # read x or grad_y


@pytest.mark.parametrize("gpu", GPUS)
@pytest.mark.parametrize("tokens", [2048, 8192])
@pytest.mark.parametrize("dtype", [BF16, F16])
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


@pytest.mark.parametrize("gpu", GPUS)
@pytest.mark.parametrize("sizes", [[(4096, 16), (1024, 16), (1024, 16)], [(14336, 16)] * 2], ids=["q/k/v", "gate/up"])
def test_the_blocks_of_siblings_fit_the_multiprocessors(sizes, gpu):
    """One block of the pass over grad_y runs on a multiprocessor."""
    pass_ = planned.backward(8192, 4096, sizes, multiprocessors=GPUS[gpu])[0]
    rounds = -(-pass_.blocks // GPUS[gpu])
    assert pass_.kernel == "shrink_and_sum_kernel" and pass_.blocks / (rounds * GPUS[gpu]) > 0.75, pass_


def test_one_gpu_has_one_plan():
    first, second = (planned.backward(300, 4096, [(4096, 16)]) for _ in range(2))
    assert first == second
    assert first != planned.backward(300, 4096, [(4096, 16)], multiprocessors=20)
    assert kernel_names(first)


FORWARD = ["shrink", "expand_short"]
BACKWARD = ["shrink_and_sum", "expand_short", "token_sum", "gradient_sums"]


@pytest.mark.parametrize("tokens", [1, 64, 512, 2048, 8192, 32768])
@pytest.mark.parametrize("rank", [4, 8, 16])
def test_launches_of_a_bfloat16_layer(rank, tokens):
    """Two forward and four backward, next to the base products and the draw of a seed."""
    arguments = tokens, 4096, [(4096, rank)]
    assert kernel_names(planned.forward(*arguments)) == FORWARD
    assert kernel_names(planned.backward(*arguments)) == BACKWARD


def test_launches_of_siblings():
    q_k_v = [(4096, 16), (1024, 16), (1024, 16)]
    assert kernel_names(planned.forward(8192, 4096, q_k_v)) == FORWARD
    assert kernel_names(planned.backward(2048, 4096, q_k_v)) == BACKWARD
    names = kernel_names(planned.backward(8192, 4096, q_k_v))
    assert names == ["shrink_and_sum", "rank_sums", *BACKWARD[1:]]


@pytest.mark.parametrize("output_mask", [(True, True, True), (True, False, False), (False, True, False)], ids=str)
def test_launches_where_less_is_wanted(output_mask):
    names = kernel_names(planned.backward(8192, 4096, [(4096, 16)], output_mask=output_mask))
    assert "pack_factors" not in names or not output_mask[2]
    assert ("expand_short" in names, "token_sum" in names) == output_mask[:2]


def test_partial_sums_that_would_be_read_too_often_get_their_own_launch():
    """28 ranges of 512 columns, read by each of 8 tiles of columns."""
    names = kernel_names(planned.backward(8192, 4096, [(14336, 16)]))
    assert names == ["shrink_and_sum", "rank_sums", "expand_short", "token_sum", "gradient_sums"]


@pytest.mark.parametrize("dtypes", [(BF16, BF16), (BF16, F32), (F16, F16), (F16, F32)], ids=str)
def test_wide_factors_are_rounded_and_no_factor_of_a_small_rank_is_packed(dtypes):
    arguments = 2048, 4096, [(4096, 16)], *dtypes
    first = ["round_factors"] * (dtypes[1] == F32)
    assert kernel_names(planned.forward(*arguments)) == first + FORWARD
    assert kernel_names(planned.backward(*arguments)) == first + BACKWARD


def test_launches_of_large_ranks():
    """From rank 33 on, grad_y is read twice; from 65 on, factors are packed."""
    half, large = [(4096, 64)], [(4096, 256)]
    assert kernel_names(planned.forward(2048, 4096, half)) == ["shrink", "rank_sums", "expand_short"]
    assert kernel_names(planned.backward(2048, 4096, half, output_mask=(True, False, True))) == [
        "pack_factors",
        "shrink",
        "token_sum",
        "rank_sums",
        "expand_short",
        "gradient_sums",
    ]
    names = kernel_names(planned.forward(2048, 4096, large))
    assert names == ["pack_factors", "shrink", "shrink", "rank_sums", "expand_long"]
