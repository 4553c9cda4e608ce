"""Layers that share x: outputs that nobody uses, views of one weight, overflows. test_values.py has the arithmetic."""

from __future__ import annotations

import pytest
import torch
from support.layers import of_dtypes
from support.op_table import FLOAT, OPS, Sample, assert_bits, delta_siblings, one_by_one, siblings

from lora_ext import functional

THREE = ((40, 33), ((50, 5), (20, 3), (31, 8)))


def of_layers(sample: Sample, used: tuple[int, ...]) -> Sample:
    """Returns the sample of some of its layers."""
    call = {name: [v[i] for i in used] if isinstance(v, list) else v for name, v in sample.call.items()}
    return Sample(call, [sample.grads[i] for i in used])


def test_q_k_v_may_be_rows_of_one_weight():
    """Packed projections stack the layers' weights and biases: views of one tensor."""
    op, sizes = OPS["lora_linear_siblings"], [48, 16, 16]
    sample = siblings(size=((40, 64), ((48, 8), (16, 8), (16, 8)))).with_dropout(0.3)
    sample.call["biases"] = list(torch.randn(80).split(sizes))
    expected = op.results(sample)
    sample.call["weights"] = list(torch.cat(sample.call["weights"]).split(sizes))
    assert_bits(op.results(sample), expected)


@pytest.mark.parametrize("used", [(0,), (1,), (2,), (0, 2), (1, 2)], ids=str)
@pytest.mark.parametrize("dtypes", [FLOAT, (torch.bfloat16, torch.bfloat16)], ids=str)
@pytest.mark.parametrize(
    ("name", "make"), [("lora_linear_siblings", siblings), ("lora_delta_siblings", delta_siblings)]
)
def test_unused_outputs(name, make, used, dtypes):
    """A loss of some outputs gives gradients for their layers, and None for the others' factors."""
    op, sample = OPS[name], make(dtypes, size=THREE).with_dropout(0.3)
    part = of_layers(sample, used)
    expected = op.results(part)
    x, *lists = (sample.call[n] for n in ("x", "lora_As", "lora_Bs"))
    leaves = [tensor.requires_grad_() for tensor in (x, *lists[0], *lists[1])]
    ys = op.run(**sample.call)
    grad_x, *grads = torch.autograd.grad([ys[i] for i in used], leaves, part.grads, allow_unused=True)
    assert torch.equal(grad_x, expected["grad of x"])
    for what, of_list in (("lora_As", grads[:3]), ("lora_Bs", grads[3:])):
        assert [i for i, grad in enumerate(of_list) if grad is not None] == list(used)
        for place, i in enumerate(used):
            assert torch.equal(of_list[i], expected[f"grad of {what}[{place}]"])


def test_no_output_used():
    call = siblings().call
    x = call["x"].requires_grad_()
    ys = functional.lora_linear_siblings(**call)
    assert torch.autograd.grad(x.sum() + 0 * ys[0].detach().sum(), x)[0].eq(1).all()


@pytest.mark.pairs
@pytest.mark.parametrize("num_tokens", [3, 70])
@pytest.mark.parametrize("scaling", [0.0, 1.0])
@of_dtypes
def test_an_overflow_stays_in_its_layer_and_is_nan_at_scaling_zero(dtypes, scaling, num_tokens):
    """As in the layers one by one and in plain PyTorch: zero times infinity."""
    call = delta_siblings(dtypes, size=((num_tokens, 97), ((131, 8), (64, 3), (5, 17)))).call
    largest = torch.finfo(dtypes[1]).max
    call["lora_As"][1] = torch.full_like(call["lora_As"][1], largest)
    call["x"][1], call["scalings"][1] = 8.0, scaling
    ys, expected = functional.lora_delta_siblings(**call), one_by_one(**call)
    for y, want in zip(ys, expected, strict=True):
        torch.testing.assert_close(y, want, rtol=0, atol=0, equal_nan=True)
    sums = torch.float64 if dtypes[0] == torch.float64 else torch.float32
    if scaling == 0.0 and 97 * 8.0 * largest > torch.finfo(sums).max:
        assert ys[1][1].isnan().all()
    assert ys[0].isfinite().all() and ys[2].isfinite().all()
