"""Compares the reference implementation with published values and PyTorch's layers."""

import pytest
import torch
from torch import nn

from lora_ext import reference


@pytest.mark.parametrize(
    "counter, key, words",
    [  # Random123's known-answer file, philox4x32 with 7 rounds
        ((0, 0, 0, 0), (0, 0), (0x5F6FB709, 0x0D893F64, 0x4F121F81, 0x4F730A48)),
        ((0xFFFFFFFF,) * 4, (0xFFFFFFFF,) * 2, (0x5207DDC2, 0x45165E59, 0x4D8EE751, 0x8C52F662)),
        (
            (0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344),
            (0xA4093822, 0x299F31D0),
            (0x4DFCCABA, 0x190A87F0, 0xC47362BA, 0xB6B5242A),
        ),
    ],
)
def test_philox_gives_the_published_words(counter, key, words):
    result = reference.philox4x32(tuple(torch.tensor(c) for c in counter), key[0] | key[1] << 32)
    assert tuple(int(word) for word in result) == words


def test_dropout_keep_is_a_fair_coin_in_every_column_and_row():
    keep = reference.dropout_keep(seed=7, num_tokens=2000, in_features=100, dropout_p=0.1).double()
    # Five standard deviations of a mean of n Bernoulli(0.9) variables.
    assert (keep.mean(0) - 0.9).abs().max() < 5 * 0.3 / 2000**0.5
    assert (keep.mean(1) - 0.9).abs().max() < 5 * 0.3 / 100**0.5
    assert not torch.equal(keep, reference.dropout_keep(8, 2000, 100, 0.1).double())


def _pairs(keep: torch.Tensor, rows: int, columns: int) -> torch.Tensor:
    """How often two elements, so many rows and columns apart, are both kept."""
    height, width = keep.shape
    return (keep[: height - rows, : width - columns] & keep[rows:, columns:]).double().mean()


@pytest.mark.parametrize("dropout_p", [0.05, 0.5])
def test_neighbours_in_a_mask_are_independent(dropout_p):
    """Neighbouring rows, columns, halves, words and blocks, and masks of neighbouring seeds."""
    kept = 1 - dropout_p
    keep = reference.dropout_keep(7, 1000, 512, dropout_p)
    # Pairs that overlap depend on each other: the variance is at most three times that of independent ones.
    limit = 5 * (3 * kept**2 * (1 - kept**2) / keep.numel()) ** 0.5
    for rows, columns in [(0, 1), (0, 2), (0, 7), (0, 8), (0, 64), (1, 0), (1, 1), (1, 8), (2, 0), (256, 0)]:
        assert abs(_pairs(keep, rows, columns) - kept**2) < limit * 1.2, (rows, columns)
    for seed in (6, 8, 7 + 2**32):
        other = reference.dropout_keep(seed, 1000, 512, dropout_p)
        assert abs((keep & other).double().mean() - kept**2) < limit, seed


def test_without_dropout_it_is_two_linear_layers():
    base, down, up = nn.Linear(6, 5), nn.Linear(6, 2, bias=False), nn.Linear(2, 5, bias=False)
    x = torch.randn(3, 4, 6)
    y = reference.lora_linear(x, base.weight, base.bias, down.weight, up.weight, scaling=0.5)
    torch.testing.assert_close(y, base(x) + 0.5 * up(down(x)))
