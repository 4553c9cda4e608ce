"""Tests that a 16-bit sum is rounded to the nearest number, and to the even one halfway between two."""

from __future__ import annotations

import pytest
import torch
from support.layers import rounds_factors
from torch import Tensor

from lora_ext import functional

NANS = torch.tensor([-1, 2**31 - 1, 0x7F800001], dtype=torch.int32).view(torch.float32)  # as numbers: 0, infinity


def merged(numbers: Tensor, update: Tensor) -> Tensor:
    weight = numbers.clone()[None]
    functional.lora_merge_(weight, update[None], torch.ones(1, 1), 1.0)
    return weight[0]


def added(numbers: Tensor, update: Tensor) -> Tensor:
    one = torch.ones(1, 1, dtype=numbers.dtype)
    return functional.lora_delta_(numbers.clone()[None], one, one.float(), update[:, None], 1.0)[0]


def biased(numbers: Tensor, update: Tensor) -> Tensor:
    """Adds the update as the product by a frozen weight, with the numbers as its bias."""
    one, weight = torch.ones(1, 1, dtype=numbers.dtype), update[:, None].to(numbers.dtype)
    return functional.lora_linear(one, weight, numbers, 0 * one, 0 * weight, 1.0)[0]


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("add", [merged, added, biased])
def test_every_number_rounds_to_the_nearest(add, dtype):
    bits = torch.arange(-(2**15), 2**15, dtype=torch.int16)
    bits = bits[bits.view(dtype).isfinite()]
    if add is merged:  # which refuses what becomes infinite
        bits = bits[(bits + 1).view(dtype).isfinite()]
    elif rounds_factors(bits.device, dtype):  # by instructions that flush subnormal numbers, too
        bits = bits[bits.view(dtype).abs() > 4 * torch.finfo(dtype).tiny / torch.finfo(dtype).eps]
    numbers, exact = bits.view(dtype), bits.view(dtype).float()
    larger, smaller = ((bits + step).view(dtype) for step in (1, -1))  # away from zero, and towards it
    middle = exact + torch.where(larger.isinf(), exact - smaller.float(), larger.float() - exact) / 2
    sums = {
        "even": (middle, torch.where(bits % 2 == 0, numbers, larger)),
        "smaller": (torch.nextafter(middle, torch.zeros(1)), numbers),
        "larger": (torch.nextafter(middle, 2 * middle), larger),
    }
    rounds = add is biased or (add is added and rounds_factors(bits.device, dtype))
    for name, (wanted, expected) in sums.items():
        update = wanted - exact
        is_same = add(numbers, update).view(torch.int16) == expected.view(torch.int16)
        assert is_same[update == (update.to(dtype) if rounds else update)].all(), name


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_what_is_not_finite_stays_so(dtype):
    bits = torch.arange(-(2**15), 2**15, dtype=torch.int16)
    numbers = bits[~bits.view(dtype).isfinite()].view(dtype)
    torch.testing.assert_close(added(numbers, torch.zeros(len(numbers))), numbers, equal_nan=True)
    assert added(torch.ones(3, dtype=dtype), NANS).isnan().all()
