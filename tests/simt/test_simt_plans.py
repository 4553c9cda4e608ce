"""Tests the plans of the CUDA kernels (``lora_ext._C``) at the sizes of real layers, and that kernels follow them."""

from __future__ import annotations

import functools
import re

import pytest
import torch
from support import op_table

from lora_ext import _load
from simt.driver import FEW_SMS, SMS, check, planned

pytestmark = [pytest.mark.cpu_only("plans of the CUDA kernels, made on the CPU"), pytest.mark.full]

GPUS = {"A100": 108, "H100 PCIe": 114, "H100": 132, "B200": 148, "L4": 58}
BF16, F16, F32 = "bfloat16", "float16", "float32"
PASSES = ("shrink", "shrink_and_sum", "token_sum")  # read x or grad_y
Q_K_V = [(4096, 16), (1024, 16), (1024, 16)]

# The launches of the adapters alone.
plan_forward = functools.partial(_load.plan_forward, factor_dtype=BF16, base_layers=False)
plan_backward = functools.partial(_load.plan_backward, factor_dtype=BF16)


def names(plan) -> list[str]:
    return [launch.kernel for launch in plan.launches]


@pytest.mark.parametrize("gpu", GPUS)
@pytest.mark.parametrize("tokens", [2048, 8192])
@pytest.mark.parametrize("dtype", [BF16, F16])
def test_the_blocks_of_a_pass_fit_the_sms(dtype, tokens, gpu):
    """A pass that does not fill its last wave of blocks leaves SMs idle."""
    sizes, options = (tokens, 4096, [(4096, 16)]), dict(dtype=dtype, factor_dtype=dtype, sms=GPUS[gpu])
    launches = plan_forward(*sizes, **options).launches + plan_backward(*sizes, **options).launches
    passes = [launch for launch in launches if launch.kernel in PASSES]
    assert [launch.kernel for launch in passes] == list(PASSES)
    for launch in passes:
        resident = GPUS[gpu] * (1 if launch.kernel == "shrink_and_sum" else 2)
        waves = -(-launch.blocks // resident)
        used = launch.blocks / (waves * resident)
        assert used > 0.8 or (waves == 1 and launch.blocks > 0.8 * GPUS[gpu]), launch


@pytest.mark.parametrize("gpu", GPUS)
@pytest.mark.parametrize("layers", [Q_K_V, [(14336, 16)] * 2], ids=["q/k/v", "gate/up"])
def test_the_blocks_of_siblings_fit_the_sms(layers, gpu):
    """One block of the pass over grad_y runs on an SM."""
    pass_ = plan_backward(8192, 4096, layers, sms=GPUS[gpu]).launches[0]
    waves = -(-pass_.blocks // GPUS[gpu])
    assert pass_.kernel == "shrink_and_sum" and pass_.blocks / (waves * GPUS[gpu]) > 0.75, pass_


def test_one_gpu_has_one_plan():
    plans = [repr(plan_backward(300, 4096, [(4096, 16)], sms=sms)) for sms in (132, 132, 20)]
    assert plans[0] == plans[1] != plans[2]


FORWARD = ["shrink", "expand_short"]
BACKWARD = ["shrink_and_sum", "expand_short", "token_sum", "gradient_sums"]
ONE, HALF, LARGE = [(4096, 16)], [(4096, 64)], [(4096, 256)]
DTYPES = [(BF16, BF16), (BF16, F32), (F16, F16), (F16, F32)]
# Tokens and layers, options, and the launches of the forward and the backward next to the base products and the draw of
# a seed. None: not looked at.
LAUNCHES = [
    *((tokens, [(4096, r)], {}, FORWARD, BACKWARD) for r in (4, 8, 16) for tokens in (1, 64, 512, 2048, 8192, 32768)),
    # No factor is rounded in a launch of its own.
    *((2048, ONE, {"dtype": dtype, "factor_dtype": factor}, FORWARD, BACKWARD) for dtype, factor in DTYPES),
    (2048, Q_K_V, {}, FORWARD, BACKWARD),
    (8192, Q_K_V, {}, FORWARD, ["shrink_and_sum", "rank_sums", *BACKWARD[1:]]),
    (8192, ONE, {"output_mask": (True, False, False)}, None, ["shrink", "expand_short"]),
    (8192, ONE, {"output_mask": (False, True, False)}, None, ["shrink", "rank_sums", *BACKWARD[2:]]),
    (8192, ONE, {"output_mask": (False, False, True)}, None, BACKWARD[2:]),
    # 28 ranges of 512 columns, read by each of 8 tiles of columns: the sums get their own launch.
    (8192, [(14336, 16)], {}, None, ["shrink_and_sum", "rank_sums", *BACKWARD[1:]]),
    # From rank 33 on, grad_y is read twice.
    (2048, HALF, {}, ["shrink", "rank_sums", "expand_short"], None),
    (2048, HALF, {"output_mask": (True, False, True)}, None, ["shrink", "token_sum", "rank_sums", *BACKWARD[1::2]]),
    (2048, LARGE, {}, ["shrink", "shrink", "rank_sums", "expand_long"], None),
]


@pytest.mark.parametrize(("tokens", "layers", "options", "forward", "backward"), LAUNCHES)
def test_launches(tokens, layers, options, forward, backward):
    if forward is not None:
        assert names(plan_forward(tokens, 4096, layers, **options)) == forward
    if backward is not None:
        assert names(plan_backward(tokens, 4096, layers, **options)) == backward


@pytest.mark.parametrize(("rank", "reads"), [(16, 1), (64, 1), (65, 1), (128, 1), (129, 2), (256, 2)])
def test_x_and_grad_y_are_read_once_for_every_128_ranks(rank, reads):
    layers = [(4096, rank)]
    for plan in (plan_forward(8192, 4096, layers), plan_backward(8192, 4096, layers)):
        for result in {launch.result for launch in plan.launches if launch.kernel in ("shrink", "token_sum")}:
            passes = [launch for launch in plan.launches if launch.result == result and launch.kernel in PASSES]
            chunks, ranges = map(int, re.search(r"(\d+) chunks .* x (\d+) ranges", passes[0].detail).groups())
            assert sum(launch.blocks for launch in passes) == reads * chunks * ranges, (result, passes)


@pytest.mark.parametrize("gpu", ["H100", "B200"])
@pytest.mark.parametrize("tokens", [1, 8, 9, 16, 17, 32])
def test_few_tokens_of_siblings_take_one_wave(tokens, gpu):
    """Two blocks run on an SM for up to 8 tokens, one for more."""
    plan = plan_forward(tokens, 4096, Q_K_V, base_layers=True, sms=GPUS[gpu])
    assert plan.streams_weights
    rows = 48 if tokens > 8 else 32
    assert plan.launches[-1].kernel == "few_tokens" and plan.launches[-1].blocks == sum(-(-n // rows) for n, _ in Q_K_V)
    assert f"{rows} rows of a weight in a block" in plan.launches[-1].detail
    assert plan.launches[-1].blocks <= GPUS[gpu] * (2 if tokens <= 8 else 1)


def test_a_plan_prints_itself():
    text = repr(_load.plan_forward(2048, 4096, Q_K_V, sms=58))
    assert text.startswith(
        "forward of 2048 tokens, 4096 -> 4096 (rank 16), 1024 (rank 16), 1024 (rank 16), bfloat16, factors float32\n"
        "2 launches on 58 SMs, "
    )
    assert re.search(
        r"\n  shrink<64> +xa +\d+ blocks of 256 threads, .*; 16 chunks of 128 tokens x \d+ ranges of", text
    )


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((-1, 8, [(8, 4)]), "a size is negative"),
        ((1, 8, []), "there are 0 layers, want 1 to 8"),
        ((1, 8, [(8, 0)]), "rank at least 1"),
        ((1, 8, [(8, 4)], "float64"), "x has dtype float64, but CUDA kernels take dtypes of 16 bits"),
        ((1, 8, [(8, 4)], "int8"), "there is no dtype int8"),
        ((1, 8, [(8, 4)], "float16", 0), "a GPU has at least one SM"),
    ],
)
def test_impossible_plans_are_refused(arguments, message):
    sizes, options = arguments[:3], dict(zip(("dtype", "sms"), arguments[3:], strict=False))
    with pytest.raises(ValueError, match=message):
        plan_forward(*sizes, **options)


@pytest.mark.parametrize("sms", [SMS, FEW_SMS])
@pytest.mark.parametrize("layers", [[(40, 8)], [(136, 20), (70, 40)], [(72, 100)]], ids=["one", "two", "large"])
@pytest.mark.parametrize("dtypes", [(torch.bfloat16, torch.float32), (torch.float16, torch.float16)], ids=str)
def test_the_kernels_are_launched_as_planned(dtypes, layers, sms):
    tokens, in_features = 150, 840
    make = functools.partial(op_table.delta_siblings, size=((tokens, in_features), layers))
    gpu = check("lora_delta_siblings", make, dtypes, 0.1, sms=sms)
    dtype, factor_dtype = (str(dtype).removeprefix("torch.") for dtype in dtypes)
    for (_, launches), plan in zip(gpu.calls, (plan_forward, plan_backward), strict=True):
        planned_for = plan(tokens, in_features, layers, dtype=dtype, factor_dtype=factor_dtype, sms=sms)
        assert launches == planned(planned_for)
