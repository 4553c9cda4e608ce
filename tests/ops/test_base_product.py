"""Many tokens: our product of x and the frozen weight has the adapter in it (csrc/cpu/gemm/many_tokens.inc).

Which machines use it is a choice (``_load.base_product()``); test_instruction_sets.py runs these tests with it, for
every instruction set, and with PyTorch's product.
"""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from support import layers
from support.layers import with_threads
from support.op_table import OPS, SEED, apart, every_second, grouped_linear, linear, siblings
from torch import Tensor

from lora_ext import _load, functional, reference
from lora_ext.nn.base_product import has_kernel

pytestmark = pytest.mark.cpu_only("is about a CPU kernel")

DTYPES = [pair for pair in layers.DTYPES if pair[0] in (torch.float32, torch.bfloat16)]


@pytest.mark.parametrize("dropout_p", [0.0, 0.3])
@pytest.mark.parametrize("dtypes", DTYPES, ids=str)
def test_a_scaling_of_zero_gives_the_base_layer(dtypes, dropout_p):
    """With and without a mask, which the op must draw in any case; siblings that are scaled keep their updates."""
    call = siblings(dtypes, size=((130, 70), ((40, 5), (1027, 20)))).with_dropout(dropout_p).call
    ys = functional.lora_linear_siblings(**call | {"scalings": [0.0, 2.0]})
    zeros = [torch.zeros_like(lora_A) for lora_A in call["lora_As"]]
    base = functional.lora_linear_siblings(**call | {"lora_As": zeros, "scalings": [1.0, 1.0]})
    assert torch.equal(ys[0], base[0]) and not torch.equal(ys[1], base[1])
    outputs, xa, mask = torch.ops.lora_ext.lora_linear_siblings(**call | {"bases": [], "scalings": [0.0, 0.0]})
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
    sample = siblings((dtype, dtype), size=((1100, 50), ((columns, 7), (31, 3)))).with_dropout(0.2)
    found = with_threads((1, 2, 3, 7, 40), lambda: OPS["lora_linear_siblings"].results(sample))
    for several in found:
        for name, first in found[0].items():
            if name in ("result 0", "result 1", "grad of x"):
                assert torch.equal(several[name], first), name
            else:
                eps = torch.finfo(dtype).eps
                torch.testing.assert_close(
                    several[name], first, rtol=16 * eps, atol=16 * eps * first.abs().max().item()
                )


@pytest.mark.parametrize("features", [(514, 260), (1030, 1030)], ids=str)
@pytest.mark.parametrize("num_tokens", [4, 20, 64, 300])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_outputs_of_mixed_batches_have_the_same_bits_with_any_number_of_threads(dtype, num_tokens, features):
    """Where PyTorch multiplies by the weight (small weights, other machines), this holds only if F.linear's bits do not
    depend on the threads either."""
    call = grouped_linear((dtype, torch.float32), tokens=num_tokens, features=features, entries=((5, 16), 3)).call
    layer = call["x"], call["weight"], call["bias"]
    found = with_threads((1, 2, 3), lambda: (functional.lora_grouped_linear(**call), F.linear(*layer)))
    for y, base in found[1:]:
        assert torch.equal(y, found[0][0]) or not (has_kernel(*layer[:2]) or torch.equal(base, found[0][1]))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_row_does_not_depend_on_the_rows_around_it(dtype):
    skip_unless_own(dtype)
    call = linear((dtype, dtype), size=(1300, 600, 90, 5)).call
    expected = functional.lora_linear(**call)
    for begin, end in ((0, 33), (1, 78), (500, 1200)):
        part = functional.lora_linear(**call | {"x": call["x"][begin:end]})
        assert torch.equal(part, expected[begin:end])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_before_training_the_output_has_the_bits_of_the_base_layer(dtype):
    """Also next to layers that have been trained."""
    call = siblings((dtype, dtype), size=((132, 384), ((40, 5), (200, 20)))).call
    call["lora_Bs"][1].zero_()
    ys = functional.lora_linear_siblings(**call)
    bases = [F.linear(call["x"], *layer) for layer in zip(call["weights"], call["biases"], strict=True)]
    assert torch.equal(ys[1], bases[1]) and not torch.equal(ys[0], bases[0])


@pytest.mark.parametrize("in_features", [64, 70])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_what_is_not_finite_stays_in_its_row(dtype, in_features):
    """As far as it does in nn.Linear: up to a multiple of 32 features, oneDNN 3.12 with AMX multiplies what follows a
    row by zero."""
    call = linear((dtype, dtype), size=(90, in_features, 40, 4)).call
    expected = functional.lora_linear(**call)
    call["x"][13, 5], call["x"][89, -1] = float("inf"), float("nan")
    y = functional.lora_linear(**call)
    broken = torch.zeros(90, dtype=torch.bool)
    broken[[13, 89]] = True
    assert not y[broken].isfinite().any()
    if in_features % 32:
        broken = ~F.linear(call["x"], call["weight"], call["bias"]).isfinite().all(1)
        assert broken[[13, 89]].all()
    assert torch.equal(y[~broken], expected[~broken])


@pytest.mark.parametrize("factor", ["lora_A", "lora_B"])
def test_a_factor_that_is_nan_shows_at_a_scaling_of_zero(factor):
    call = linear(size=(90, 70, 40, 4)).call | {"scaling": 0.0}
    call[factor][0, 0] = float("nan")
    y = functional.lora_linear(**call)
    assert y.isnan().any() and torch.equal(y.isnan(), reference.lora_linear(**call).isnan())


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
    sample = linear((dtype, dtype), size=(80, *sizes, 4))
    call, (grad_y,) = sample.call, sample.grads
    followed = [F.pad(tensor, (0, 0, 0, 1))[:-1] for tensor in (call["x"], grad_y)]  # by zeros: the last row has a tail

    def output_and_gradient(x: Tensor, weight: Tensor, grad_y: Tensor) -> tuple[Tensor, Tensor]:
        leaf = x.requires_grad_()
        y = functional.lora_linear(**call | {"x": leaf, "weight": weight})
        return y, *torch.autograd.grad(y, leaf, grad_y)

    weight = call["weight"]
    expected = output_and_gradient(followed[0], weight, followed[1])
    for other in (apart(weight), weight.T.contiguous().T, every_second(weight)):
        x, grad = apart(call["x"]), apart(grad_y)
        found = output_and_gradient(x, other, grad)
        with torch.no_grad():
            library = F.linear(x, other, call["bias"]), grad @ other
        if sizes == (64, 64):
            assert all(result.isfinite().all() for result in library)
        for value, want, plain in zip(found, expected, library, strict=True):
            assert_close_where_finite(value, want, plain)
