"""Many tokens: our product of x and the frozen weight has the adapter in it (csrc/cpu/gemm/many_tokens.inc).

Which machines use it is a choice (``_load.base_product()``); test_instruction_sets.py runs these tests with it, for
every instruction set, and with PyTorch's product.
"""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from support import layers, op_table
from support.layers import random_layer, random_siblings, with_threads
from support.op_table import OPS, results
from torch import Tensor

from lora_ext import _load, functional, reference

pytestmark = pytest.mark.cpu_only("is about a CPU kernel")

SEED = torch.tensor(0x1234_5678_9ABC_DEF0 >> 1)
DTYPES = [pair for pair in layers.DTYPES if pair[0] in (torch.float32, torch.bfloat16)]


@pytest.mark.parametrize("dropout_p", [0.0, 0.3])
@pytest.mark.parametrize("dtypes", DTYPES, ids=str)
def test_a_scaling_of_zero_gives_the_base_layer(dtypes, dropout_p):
    """With and without a mask, which the op must draw in any case; siblings that are scaled keep their updates."""
    siblings = random_siblings(((130, 70), [(40, 5), (1027, 20)]), dtypes)
    x, weights, biases, lora_As, lora_Bs, _ = siblings.args()
    op = torch.ops.lora_ext.lora_linear_siblings
    ys = functional.lora_linear_siblings(x, weights, biases, lora_As, lora_Bs, [0.0, 2.0], dropout_p, SEED)
    zeros = [torch.zeros_like(lora_A) for lora_A in lora_As]
    base = functional.lora_linear_siblings(x, weights, biases, zeros, lora_Bs, [1.0, 1.0], dropout_p, SEED)
    assert torch.equal(ys[0], base[0]) and not torch.equal(ys[1], base[1])
    outputs, xa, mask = op(x, weights, biases, [], lora_As, lora_Bs, [0.0, 0.0], dropout_p, SEED)
    assert torch.equal(outputs[0], base[0]) and torch.equal(outputs[1], base[1])
    assert xa.shape == (130, 25) and not xa.any()
    expected = torch.ops.lora_ext.lora_dropout_mask(SEED, 130, 70, dropout_p)
    assert torch.equal(mask, expected) if dropout_p else mask.numel() == 0


def skip_unless_own(dtype: torch.dtype) -> None:
    """Skips a test of what PyTorch's product does not promise, where it is used."""
    if _load.base_product() != "own" or (dtype == torch.bfloat16 and _load.cpu_isa() != "avx512_bf16"):
        pytest.skip(f"the base product of {dtype} is PyTorch's, on {_load.cpu_isa()}")


@pytest.mark.parametrize("columns", [20, 64, 700])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_outputs_have_the_same_bits_with_any_number_of_threads(dtype, columns):
    """So do the gradients of x; those of the factors are sums over the threads' tokens."""
    skip_unless_own(dtype)
    op = OPS["lora_linear_siblings"]
    sample = op_table.siblings((dtype, dtype), size=((1100, 50), ((columns, 7), (31, 3)))).with_dropout(0.2)
    found = with_threads((1, 2, 3, 7, 40), lambda: results(op.run, sample, op.leaves(sample)))
    for several in found:
        for name, first in found[0].items():
            if name in ("result 0", "result 1", "grad of x"):
                assert torch.equal(several[name], first), name
            else:
                eps = torch.finfo(dtype).eps
                torch.testing.assert_close(
                    several[name], first, rtol=16 * eps, atol=16 * eps * first.abs().max().item()
                )


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_row_does_not_depend_on_the_rows_around_it(dtype):
    skip_unless_own(dtype)
    layer = random_layer((1300, 600, 90, 5), (dtype, dtype))
    expected = functional.lora_linear(*layer.args())
    for begin, end in ((0, 33), (1, 78), (500, 1200)):
        part = functional.lora_linear(layer.x[begin:end], *layer.args()[1:])
        assert torch.equal(part, expected[begin:end])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_before_training_the_output_has_the_bits_of_the_base_layer(dtype):
    """Also next to layers that have been trained."""
    siblings = random_siblings(((132, 384), [(40, 5), (200, 20)]), (dtype, dtype))
    siblings.layers[1].lora_B.zero_()
    ys = functional.lora_linear_siblings(*siblings.args())
    _, weight, bias, *_ = siblings.layers[1].args()
    assert torch.equal(ys[1], F.linear(siblings.x, weight, bias))
    assert not torch.equal(ys[0], F.linear(siblings.x, *siblings.layers[0].args()[1:3]))


@pytest.mark.parametrize("in_features", [64, 70])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_what_is_not_finite_stays_in_its_row(dtype, in_features):
    """As far as it does in nn.Linear: up to a multiple of 32 features, oneDNN 3.12 with AMX multiplies what follows a
    row by zero."""
    layer = random_layer((90, in_features, 40, 4), (dtype, dtype))
    expected = functional.lora_linear(*layer.args())
    layer.x[13, 5], layer.x[89, -1] = float("inf"), float("nan")
    y = functional.lora_linear(*layer.args())
    broken = torch.zeros(90, dtype=torch.bool)
    broken[[13, 89]] = True
    assert not y[broken].isfinite().any()
    if in_features % 32:
        broken = ~F.linear(layer.x, layer.weight, layer.bias).isfinite().all(1)
        assert broken[[13, 89]].all()
    assert torch.equal(y[~broken], expected[~broken])


@pytest.mark.parametrize("factor", ["lora_A", "lora_B"])
def test_a_factor_that_is_nan_shows_at_a_scaling_of_zero(factor):
    layer = random_layer((90, 70, 40, 4))
    getattr(layer, factor)[0, 0] = float("nan")
    layer.scaling = 0.0
    y = functional.lora_linear(*layer.args())
    assert y.isnan().any() and torch.equal(y.isnan(), reference.lora_linear(*layer.args()).isnan())


def assert_close_where_finite(value: Tensor, want: Tensor, library: Tensor) -> None:
    """Checks ``value`` where nn.Linear's ``library`` is finite, from the same views: see the test above."""
    read = library.isfinite()
    tolerance = 4 * torch.finfo(value.dtype).eps
    torch.testing.assert_close(value[read], want[read], rtol=tolerance, atol=tolerance * want.abs().max().item())


@pytest.mark.parametrize("sizes", [(64, 64), (41, 24)], ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_tensors_of_any_strides(dtype, sizes):
    """Rows apart, a transposed weight (Conv1D), a weight without unit stride, a grad_y from a larger tensor.

    What lies between the rows is not read, or if nn.Linear reads it: in no other element than there.
    """
    in_features, out_features = sizes
    layer = random_layer((80, in_features, out_features, 4), (dtype, dtype))
    leaf = F.pad(layer.x, (0, 0, 0, 1))[:-1].requires_grad_()  # zeros follow, for the tail of the last row
    expected = functional.lora_linear(leaf, *layer.args()[1:])
    (expected_grad,) = torch.autograd.grad(expected, leaf, F.pad(layer.grad_y, (0, 0, 0, 1))[:-1])

    def apart(matrix: torch.Tensor) -> torch.Tensor:
        wide = torch.full((matrix.shape[0], 2 * matrix.shape[1] + 5), float("nan"), dtype=dtype)
        wide[:, 3 : 3 + matrix.shape[1]] = matrix
        return wide[:, 3 : 3 + matrix.shape[1]]

    every_second = torch.full((out_features, 2 * in_features), float("nan"), dtype=dtype)
    every_second[:, ::2] = layer.weight
    for weight in (apart(layer.weight), layer.weight.T.contiguous().T, every_second[:, ::2]):
        x, grad_y = apart(layer.x).requires_grad_(), apart(layer.grad_y)
        y = functional.lora_linear(x, weight, *layer.args()[2:])
        (grad,) = torch.autograd.grad(y, x, grad_y)
        with torch.no_grad():
            library, library_grad = F.linear(x, weight, layer.bias), grad_y @ weight
        if sizes == (64, 64):
            assert library.isfinite().all() and library_grad.isfinite().all()
        assert_close_where_finite(y, expected, library)
        assert_close_where_finite(grad, expected_grad, library_grad)
