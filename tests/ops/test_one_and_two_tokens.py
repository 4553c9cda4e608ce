"""One and two tokens, as in decoding, at sizes where a GPU's library takes other kernels than for many tokens.

For one row, some torch releases pass cuBLASLt one pointer as bias and as output. The base product is added to an output
that holds the bias and the adapter's term (the forward), or another layer's gradient (the backward), so that a release
which reads the output twice, or not at all, gives wrong results here. The CPU streams the weight instead.
"""

from __future__ import annotations

import pytest
import torch
from support.layers import (
    DTYPES,
    Layer,
    assert_as_good_as_torch,
    assert_errors_as_plain,
    random_layer,
    random_siblings,
)
from torch import Tensor

from lora_ext import functional, reference

NUM_TOKENS = [1, 2]
SIZES = [(256, 384, 16), (384, 128, 3)]  # in_features, out_features, rank
dtypes_of = pytest.mark.parametrize("dtypes", DTYPES, ids=lambda d: f"{d[0]}-{d[1]}".replace("torch.", ""))


@pytest.mark.parametrize("bias", [False, True])
@dtypes_of
@pytest.mark.parametrize("num_tokens", NUM_TOKENS)
def test_as_good_as_torch(num_tokens, dtypes, bias):
    shapes = [((num_tokens, *size), leading) for size, leading in zip(SIZES, ((), (1, num_tokens)), strict=True)]
    layers = [random_layer(shape, dtypes, bias, leading) for shape, leading in shapes]
    assert_as_good_as_torch(layers, 0.1 if bias else 0.0, torch.tensor(7))


@pytest.mark.parametrize("num_tokens", NUM_TOKENS)
@dtypes_of
def test_siblings(num_tokens, dtypes):
    """grad_x is the sum over three layers: two products are added to a row that holds the others' sum."""

    def results(function, siblings) -> dict[str, Tensor]:
        x = siblings.x.detach().clone().requires_grad_()
        factors = [[t.detach().clone().requires_grad_() for t in (a.lora_A, a.lora_B)] for a in siblings.layers]
        ys = function(x, factors, siblings)
        leaves = [x, *(factor for pair in factors for factor in pair)]
        grads = torch.autograd.grad(ys, leaves, siblings.grad_ys())
        return {str(i): t.detach() for i, t in enumerate([*ys, *grads])}

    def together(x, factors, siblings) -> list[Tensor]:
        As, Bs = zip(*factors, strict=True)
        weights, biases, scalings = zip(*((a.weight, a.bias, a.scaling) for a in siblings.layers), strict=True)
        return functional.lora_linear_siblings(x, list(weights), list(biases), list(As), list(Bs), list(scalings))

    def plain(x, factors, siblings) -> list[Tensor]:
        return [
            reference.lora_linear(x, layer.weight, layer.bias, A, B, layer.scaling)
            for layer, (A, B) in zip(siblings.layers, factors, strict=True)
        ]

    every = []
    for _ in range(2):
        siblings = random_siblings(((num_tokens, 256), [(256, 16), (64, 16), (384, 5)]), dtypes)
        exact = results(plain, siblings.to(torch.float64))
        every.append((results(together, siblings), exact, results(plain, siblings)))
    assert_errors_as_plain(every, *dtypes)


def assert_y_as_plain(y: Tensor, layer: Layer) -> None:
    """Checks that y's error against float64 is at most twice that of plain PyTorch."""
    exact, plain = reference.lora_linear(*layer.to(torch.float64).args()), reference.lora_linear(*layer.args())
    assert_errors_as_plain([({"y": y}, {"y": exact}, {"y": plain})], y.dtype, y.dtype)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("num_tokens", NUM_TOKENS)
def test_rows_of_any_stride(num_tokens, dtype):
    """One row has any row stride, and PyTorch calls it contiguous."""
    layer = random_layer((num_tokens, 256, 384, 16), (dtype, dtype))
    wide = torch.full((2 * num_tokens, 1000), float("nan"), dtype=dtype)
    wide[::2, 8:264] = layer.x
    weight = layer.weight.T.contiguous().T  # column after column
    for x in (wide[::2, 8:264], layer.x.T.contiguous().T, layer.x.as_strided(layer.x.shape, (256, 1))):
        assert_y_as_plain(functional.lora_linear(x, *layer.args()[1:]), layer)
        assert_y_as_plain(functional.lora_linear(x, weight, *layer.args()[2:]), layer)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("num_tokens", NUM_TOKENS)
def test_without_an_update_the_layer_is_the_frozen_one(num_tokens, dtype):
    """A bias or an output that is added twice shows at once."""
    layer = random_layer((num_tokens, 512, 256, 16), (dtype, dtype))
    layer.lora_B.zero_()
    assert_y_as_plain(functional.lora_linear(*layer.args()), layer)
