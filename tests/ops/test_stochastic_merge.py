"""Merges that round 16 bits stochastically: every bit is defined and restored, and the mean is the exact sum."""

from __future__ import annotations

import math

import pytest
import torch
from support.merging import hard_weight, same_bits, update_factors, updates
from support.op_table import good_call
from torch import Tensor

from lora_ext import functional, reference
from lora_ext.merging.rounding import Draws, LayerSeed, draws_for
from lora_ext.merging.weights import merge_all_, pack_factors

HALVES = [torch.bfloat16, torch.float16]
SEED = 2**63 + 12345


def expected(weight: Tensor, factors: tuple, seed: int, first_row: int = 0) -> Tensor:
    d = updates(*pack_factors(weight.dtype, [factors]))
    numbers = reference.random_numbers(seed, *weight.shape, first_row)
    return reference.round_stochastically(weight.float() + d, weight.dtype, numbers)


@pytest.mark.parametrize("size", [1e-6, 0.01, 0.3, 30.0])
@pytest.mark.parametrize("shape", [(1, 1, 1), (17, 9, 17), (259, 6, 3)], ids=str)
@pytest.mark.parametrize("dtype", HALVES, ids=str)
def test_is_the_definition_to_the_bit(dtype, shape, size):
    in_features, out_features, rank = shape
    weight = hard_weight(out_features, in_features, dtype)
    factors = update_factors(weight, rank, size)
    result = expected(weight, factors, SEED)
    before = weight.clone()
    record = functional.lora_merge_(weight, *factors, seed=SEED)
    assert same_bits(weight, result)
    functional.lora_unmerge_(weight, record)
    assert same_bits(weight, before)
    functional.lora_merge_(weight, *factors, record=False, seed=SEED - 2**64)  # the same 64 bits
    assert same_bits(weight, result)


@pytest.mark.parametrize("dtype", HALVES, ids=str)
def test_keeps_an_update_that_nearest_rounding_loses(dtype):
    """An update of a twentieth of a unit in the last place: the mean over many seeds is the exact sum."""
    weight = (torch.rand(64, 512) + 1.0).to(dtype)
    unit = torch.finfo(dtype).eps
    A, B = torch.full((1, 512), 0.05 * unit), torch.ones(64, 1)
    before = weight.double()
    nearest = weight.clone()
    functional.lora_merge_(nearest, A, B, 1.0)
    assert (nearest.double() == before).all()
    kept = []
    for seed in range(20):
        merged = weight.clone()
        functional.lora_merge_(merged, A, B, 1.0, seed=seed)
        kept.append((merged.double() - before).mean().item() / (0.05 * unit))
    # An element's variance is 0.05 * 0.95 units; in 2 to the power of 1, no unit is larger.
    deviation = math.sqrt(0.05 * 0.95) / 0.05 / math.sqrt(weight.numel() * len(kept))
    assert abs(sum(kept) / len(kept) - 1.0) < 5 * deviation
    assert len(set(kept)) > 15  # seeds differ


@pytest.mark.parametrize("dtype", HALVES, ids=str)
def test_the_record_is_about_as_small_as_that_of_nearest(dtype):
    """0.025 bytes for each weight; rounded to nearest on the way back it would be 0.5."""
    sizes = {}
    for seed in (None, 1):
        torch.manual_seed(2)
        weight = (torch.randn(512, 1024) * 0.02).to(dtype)
        record = functional.lora_merge_(weight, *update_factors(weight, 8, 0.0006), seed=seed)
        sizes[seed] = record.nbytes - record.lora_A.nbytes - record.lora_B.nbytes
    assert sizes[1] < 1.25 * sizes[None]


def test_parts_of_the_rows_round_as_the_whole():
    weight = hard_weight(37, 300, torch.bfloat16)
    A, B = pack_factors(weight.dtype, [update_factors(weight, 4, 0.1)])
    whole, parts = weight.clone(), weight.clone()
    merge_all_("merge", [whole], [A], [B], draws=[Draws(9)])
    pieces = [slice(0, 5), slice(5, 37)]
    merge_all_(
        "merge", [parts[p] for p in pieces], [A, A], [B[p].contiguous() for p in pieces], draws=[Draws(9), Draws(9, 5)]
    )
    assert same_bits(whole, parts)


def test_weights_of_one_merge_have_numbers_of_their_own():
    """With the same numbers, the rounding errors of two weights would be correlated by one half."""
    errors = []
    for path in ("layers.0.q_proj", "layers.1.q_proj"):
        weight = torch.randn(256, 256, dtype=torch.bfloat16)
        A, B = pack_factors(weight.dtype, [update_factors(weight, 4, 0.1)])
        exact = weight.float() + B @ A
        merge_all_("merge", [weight], [A], [B], draws=[draws_for(LayerSeed(0, path))])
        errors.append(
            ((weight.float() - exact) / torch.ldexp(torch.ones_like(exact), exact.frexp().exponent)).flatten()
        )
    assert abs(torch.corrcoef(torch.stack(errors))[0, 1]) < 0.03
    assert draws_for(LayerSeed(-1, "a")) == draws_for(LayerSeed(2**64 - 1, "a")) != draws_for(LayerSeed(0, "a"))


@pytest.mark.parametrize("dtype", HALVES, ids=str)
def test_refuses_results_that_are_not_finite(dtype):
    weight = torch.full((3, 300), torch.finfo(dtype).max, dtype=dtype)
    weight[0] = 1.0
    before, unit = weight.clone(), torch.finfo(dtype).max * torch.finfo(dtype).eps / 2
    A, B = torch.full((1, 300), unit * 0.75), torch.ones(3, 1)
    with pytest.raises(ValueError, match="elements of weight NaN or infinite: the sum overflows"):
        functional.lora_merge_(weight, A, B, 1.0, seed=3)
    assert same_bits(weight, before)
    A[0, 5] = float("nan")
    with pytest.raises(ValueError, match="the adapter has NaN"):
        functional.lora_merge_(weight, A, B, 1.0, seed=3)
    assert same_bits(weight, before)


@pytest.mark.parametrize(
    "dtype, seed, error, text",
    [
        (torch.float32, 0, TypeError, "weight is torch.float32, where stochastic rounding has nothing to gain"),
        (torch.bfloat16, 2**64, ValueError, "seed is 18446744073709551616, want an integer of 64 bits"),
        (torch.bfloat16, -(2**63) - 1, ValueError, "want an integer of 64 bits"),
        (torch.bfloat16, 1.5, TypeError, "seed"),
    ],
)
def test_refusals(dtype, seed, error, text):
    weight = torch.randn(4, 6).to(dtype)
    before = weight.clone()
    with pytest.raises(error, match=f"^lora_merge_: .*{text}"):
        functional.lora_merge_(weight, torch.randn(2, 6), torch.randn(4, 2), 1.0, seed=seed)
    assert same_bits(weight, before)


def test_ops_refuse_draws_for_wide_weights():
    call = good_call("lora_merge_ with draws", dtype=torch.float32)
    with pytest.raises(RuntimeError, match=r"weights\[0\] has dtype float32, want bfloat16 or float16"):
        torch.ops.lora_ext.lora_merge_(**call)
