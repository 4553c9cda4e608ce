"""Tests the kernel for few tokens: base layers and adapters in one read of the weights."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from support.layers import Siblings, assert_errors_as_plain, random_siblings, with_rounded_factors
from torch import Tensor

from lora_ext import reference
from simt import ops
from simt.driver import few_blocks, kernels

pytestmark = [pytest.mark.cpu_only("emulates the CUDA kernels on the CPU"), pytest.mark.full]

BF16, F16, F32 = torch.bfloat16, torch.float16, torch.float32
SEED = 0x1234_5678


def run_reference(siblings: Siblings, dropout_p: float) -> dict[str, Tensor]:
    x, weights, biases, As, Bs, scalings = siblings.args()
    ys = reference.lora_linear_siblings(x, weights, biases, As, Bs, scalings, dropout_p, torch.tensor(SEED))
    return {f"y[{i}]": y for i, y in enumerate(ys)}


def run_kernel(siblings: Siblings, dropout_p: float, **options) -> dict[str, Tensor]:
    operands = [ops.Sibling(layer.lora_A, layer.lora_B, layer.scaling, layer.bias) for layer in siblings.layers]
    weights = [layer.weight for layer in siblings.layers]
    forward = ops.lora_forward(siblings.x, operands, dropout_p, SEED, weights=weights, **options)
    alone = ops.lora_forward(siblings.x, operands, dropout_p, SEED, **options)
    torch.testing.assert_close(forward.xa, alone.xa)  # what the backward reads
    assert (forward.mask is None) == (alone.mask is None)
    return {f"y[{i}]": y for i, y in enumerate(forward.ys)}


@pytest.mark.pairs
@pytest.mark.parametrize("sizes", [[(40, 8)], [(33, 5), (16, 64), (130, 1)]], ids=["one", "three"])
@pytest.mark.parametrize(
    ("tokens", "in_features", "dropout_p"),
    [(1, 64, 0.0), (3, 72, 0.3), (8, 520, 0.0), (9, 8, 0.0), (16, 840, 0.3), (17, 136, 0.0), (32, 64, 0.0)],
)
@pytest.mark.parametrize("dtypes", [(BF16, BF16), (F16, F16), (BF16, F32)], ids=str)
def test_few_tokens(dtypes, tokens, in_features, dropout_p, sizes):
    siblings = random_siblings(((tokens, in_features), sizes), dtypes)
    ours = run_kernel(siblings, dropout_p)
    read = with_rounded_factors(siblings)
    exact, plain = run_reference(read.to(torch.float64), dropout_p), run_reference(read, dropout_p)
    assert_errors_as_plain([(ours, exact, plain)], dtypes[0], dtypes[0])
    if dtypes[0] != dtypes[1]:
        rounded_before = run_kernel(read, dropout_p)
        assert all(torch.equal(ours[name], y) for name, y in rounded_before.items())


@pytest.mark.parametrize("dtypes", [(BF16, BF16), (F16, F16)], ids=str)
@pytest.mark.parametrize("sizes", [[(96, 8)], [(30, 5), (50, 64)]], ids=["one", "two"])
@pytest.mark.parametrize("tokens", [3, 9, 20])
def test_larger_blocks_that_save_a_wave(tokens, sizes, dtypes):
    siblings = random_siblings(((tokens, 600), sizes), dtypes)
    weights = [layer.weight for layer in siblings.layers]
    operands = [ops.Sibling(layer.lora_A, layer.lora_B, layer.scaling, layer.bias) for layer in siblings.layers]
    ops.lora_forward(siblings.x, operands, 0.0, SEED, weights=weights, library=few_blocks())
    rows = 32 if tokens <= 8 else 48
    assert few_blocks().launches()[-1].blocks == sum(-(-out_features // rows) for out_features, _ in sizes)
    ours = run_kernel(siblings, 0.0, library=few_blocks())
    exact, plain = run_reference(siblings.to(torch.float64), 0.0), run_reference(siblings, 0.0)
    assert_errors_as_plain([(ours, exact, plain)], dtypes[0], dtypes[0])


@pytest.mark.parametrize("tokens", [1, 20])
def test_weights_and_x_with_gaps_between_rows(tokens):
    siblings = random_siblings(((tokens, 72), [(40, 8)]), (BF16, BF16))
    (layer,) = siblings.layers
    wide, wide_x = torch.randn(40, 88).to(BF16), torch.randn(tokens, 80).to(BF16)
    layer = replace(layer, weight=wide[:, 8:80], x=wide_x[:, :72])
    siblings = Siblings(layer.x, [layer])
    ours = run_kernel(siblings, 0.0)
    assert_errors_as_plain(
        [(ours, run_reference(siblings.to(torch.float64), 0.0), run_reference(siblings, 0.0))], BF16, BF16
    )


@pytest.mark.parametrize("library", [kernels, few_blocks])
def test_same_bits_in_every_order_of_threads(library):
    siblings = random_siblings(((5, 600), [(40, 8), (70, 3)]), (BF16, BF16))
    first = run_kernel(siblings, 0.1, library=library())
    for schedule in (1, 2):
        again = run_kernel(siblings, 0.1, library=library(), schedule=schedule)
        assert all(torch.equal(first[name], y) for name, y in again.items())


@pytest.mark.parametrize(
    "shape",
    [(33, 64, 40, 8), (4, 60, 40, 8), (4, 64, 40, 65), (4, 64, 0, 8)],
    ids=["tokens", "columns", "rank", "rows"],
)
def test_other_shapes_go_to_the_library(shape):
    tokens, in_features, out_features, rank = shape
    siblings = random_siblings(((tokens, in_features), [(out_features, rank)]), (BF16, BF16))
    with pytest.raises(AssertionError, match="does not take this"):
        run_kernel(siblings, 0.0)
