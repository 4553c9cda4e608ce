"""torch.ops.lora_ext.lora_merge_: in place, accumulated wide, rounded once."""

import pytest
import torch
from layers import DTYPES, random_layer

from lora_ext import functional, reference


def exact_merge(layer, scaling):
    """round(W + d) with d in float64: what one correct rounding gives."""
    delta = scaling * (layer.lora_B.double() @ layer.lora_A.double())
    return (layer.weight.double() + delta).to(layer.weight.dtype)


@pytest.mark.parametrize("dtypes", DTYPES, ids=lambda d: f"{d[0]}-{d[1]}".replace("torch.", ""))
@pytest.mark.parametrize("shape", [(1, 1, 1), (5, 3, 2), (64, 48, 17), (97, 131, 8), (513, 257, 33)], ids=str)
def test_is_the_correctly_rounded_sum(shape, dtypes):
    layer = random_layer((1, *shape), dtypes)
    exact = exact_merge(layer, 0.75)
    version = layer.weight._version
    merged = functional.lora_merge_(layer.weight, layer.lora_A, layer.lora_B, 0.75)
    assert merged is layer.weight and layer.weight._version > version
    # The float32 sum may fall on the other side of a tie: at most one unit in the last place, and rarely for 16 bits.
    eps = torch.finfo(dtypes[0]).eps
    accumulation = 1e-13 if dtypes[0] == torch.float64 else 1e-5
    assert ((merged.double() - exact.double()).abs() <= eps * exact.double().abs() + accumulation).all()
    if dtypes[0] in (torch.bfloat16, torch.float16):
        assert (merged != exact).float().mean() < 0.01


def test_equals_the_reference():
    layer = random_layer((1, 64, 48, 8), (torch.bfloat16, torch.float32))
    expected = reference.merge(layer.weight, layer.lora_A, layer.lora_B, 0.5)
    merged = functional.lora_merge_(layer.weight, layer.lora_A, layer.lora_B, 0.5)
    assert (merged != expected).float().mean() < 0.01


def test_merged_weight_gives_the_layer_output():
    layer = random_layer((30, 64, 48, 8))
    expected = functional.lora_linear(*layer.args())
    functional.lora_merge_(layer.weight, layer.lora_A, layer.lora_B, layer.scaling)
    torch.testing.assert_close(torch.nn.functional.linear(layer.x, layer.weight, layer.bias), expected)


def test_row_strides_and_untouched_neighbours():
    whole = torch.randn(20, 50)
    before, view = whole.clone(), whole[2:12, 5:30]
    A, B = torch.randn(3, 25), torch.randn(10, 3)
    expected = reference.merge(view, A, B, 0.5)
    functional.lora_merge_(view, A, B, 0.5)
    torch.testing.assert_close(view, expected)
    view.copy_(before[2:12, 5:30])
    assert torch.equal(whole, before)


def test_saved_weight_is_detected_as_changed():
    """Stable-ABI kernels do not tell autograd that they mutate; the op's autograd kernel does."""
    weight, A, B = torch.randn(4, 5), torch.randn(2, 5), torch.randn(4, 2)
    x = torch.randn(3, 5, requires_grad=True)
    y = x @ weight.T
    torch.ops.lora_ext.lora_merge_(weight, A, B, 1.0)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        y.sum().backward()


def test_weight_that_requires_grad_is_refused():
    weight = torch.randn(4, 5, requires_grad=True)
    before = weight.detach().clone()
    with pytest.raises(RuntimeError, match=r"weight requires grad.*requires_grad_\(False\)"):
        functional.lora_merge_(weight, torch.randn(2, 5), torch.randn(4, 2), 1.0)
    assert torch.equal(weight, before)
    with torch.no_grad():
        functional.lora_merge_(weight, torch.randn(2, 5), torch.randn(4, 2), 1.0)
