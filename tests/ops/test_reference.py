"""Compares the reference implementation with published values and PyTorch's layers."""

import pytest
import torch
from torch import nn

from lora_ext import reference


@pytest.mark.parametrize(
    "counter, key, words",
    [  # Random123's known-answer file, philox4x32 with 10 rounds
        ((0, 0, 0, 0), (0, 0), (0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8)),
        ((0xFFFFFFFF,) * 4, (0xFFFFFFFF,) * 2, (0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD)),
        (
            (0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344),
            (0xA4093822, 0x299F31D0),
            (0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1),
        ),
    ],
)
def test_philox_gives_the_published_words(counter, key, words):
    result = reference.philox4x32_10(tuple(torch.tensor(c) for c in counter), key[0] | key[1] << 32)
    assert tuple(int(word) for word in result) == words


def test_dropout_keep_is_a_fair_coin_in_every_column_and_row():
    keep = reference.dropout_keep(seed=7, num_tokens=2000, in_features=100, dropout_p=0.1).double()
    # Five standard deviations of a mean of n Bernoulli(0.9) variables.
    assert (keep.mean(0) - 0.9).abs().max() < 5 * 0.3 / 2000**0.5
    assert (keep.mean(1) - 0.9).abs().max() < 5 * 0.3 / 100**0.5
    assert not torch.equal(keep, reference.dropout_keep(8, 2000, 100, 0.1).double())


def test_without_dropout_it_is_two_linear_layers():
    base, down, up = nn.Linear(6, 5), nn.Linear(6, 2, bias=False), nn.Linear(2, 5, bias=False)
    x = torch.randn(3, 4, 6)
    y = reference.lora_linear(x, base.weight, base.bias, down.weight, up.weight, scaling=0.5)
    torch.testing.assert_close(y, base(x) + 0.5 * up(down(x)))


def test_merge_equals_the_layer():
    base, A, B = nn.Linear(6, 5), torch.randn(2, 6), torch.randn(5, 2)
    x = torch.randn(4, 6)
    merged = reference.merge(base.weight, A, B, 0.5)
    torch.testing.assert_close(x @ merged.T + base.bias, reference.lora_linear(x, base.weight, base.bias, A, B, 0.5))
