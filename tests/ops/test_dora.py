"""The arithmetic of DoRA against the updated weight itself (lora_ext.reference), and its gradients."""

import pytest
import torch
from support.layers import of_dtypes
from support.op_table import DOUBLE, SIZES, Sample, linear

from lora_ext import reference
from lora_ext._ops import dora as arithmetic
from lora_ext._ops.checks import accumulation_dtype
from lora_ext._ops.dora import rescale, row_norms, scale_of_rows
from lora_ext.nn.dora import DoraUpdate, output


def norms_of(call: dict) -> torch.Tensor:
    return row_norms(*(call[name] for name in ("weight", "lora_A", "lora_B", "scaling")))


def exact_norms(sample: Sample) -> torch.Tensor:
    exact = sample.double().call
    return (exact["weight"] + exact["scaling"] * exact["lora_B"] @ exact["lora_A"]).norm(dim=1)


@of_dtypes
@pytest.mark.parametrize("shape", SIZES)
def test_norms(shape, dtypes):
    sample = linear(dtypes, size=shape)
    norms = norms_of(sample.call)
    assert norms.dtype is accumulation_dtype(dtypes[0]) and not norms.requires_grad
    tolerance = 1e-12 if dtypes == DOUBLE else 2e-6
    torch.testing.assert_close(norms.double(), exact_norms(sample), rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("transposed", [False, True])
def test_norms_of_many_parts(transposed, monkeypatch):
    monkeypatch.setattr(arithmetic, "_PART_ELEMENTS", 500)
    sample = linear((torch.bfloat16, torch.float32), size=(1, 97, 131, 8))
    if transposed:
        sample.call["weight"] = sample.call["weight"].T.contiguous().T
    torch.testing.assert_close(norms_of(sample.call).double(), exact_norms(sample), rtol=1e-6, atol=1e-6)


def test_an_update_that_takes_the_weight_away():
    """The squares cancel: what rounding leaves is small, and no NaN; nor does a row of zeros give one."""
    A, B = torch.randn(8, 60), torch.randn(50, 8)
    norms = row_norms(-2.0 * (B @ A), A, B, 2.0)
    assert (norms <= 2e-3 * (B @ A).norm(dim=1)).all()
    assert scale_of_rows(torch.ones(2), torch.tensor([0.0, 2.0])).tolist() == [1.0, 0.5]


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("kind", ["none", "bias", "whole"])
@pytest.mark.parametrize("shape", [(6,), (0, 6), (7, 6), (2, 3, 6)])
def test_rescaling(shape, kind, dtype, monkeypatch):
    monkeypatch.setattr(arithmetic, "_PART_ELEMENTS", 12)
    z, acc = torch.randn(shape).to(dtype), accumulation_dtype(dtype)
    factor = torch.randn(6, dtype=acc)
    base = {"none": None, "bias": torch.randn(6).to(dtype), "whole": torch.randn(shape).to(dtype)}[kind]
    for tensor in (z, factor, base):
        if tensor is not None:
            tensor.requires_grad_()
    y = rescale(z, factor, base)
    grad_y = torch.randn(shape).to(dtype)
    inputs = [tensor for tensor in (z, factor, base) if tensor is not None]
    wide = [tensor.detach().double().requires_grad_() for tensor in inputs]
    want = wide[0] * wide[1] + (0.0 if base is None else wide[2])
    assert y.dtype is dtype
    torch.testing.assert_close(y.double(), want, rtol=1.01 * torch.finfo(dtype).eps, atol=1e-6)
    found, wanted = torch.autograd.grad(y, inputs, grad_y), torch.autograd.grad(want, wide, grad_y.double())
    found = tuple(grad.double() for grad in found)
    torch.testing.assert_close(found, wanted, rtol=3 * torch.finfo(dtype).eps, atol=1e-5)


@pytest.mark.parametrize("dropout", [0.0, 0.4])
@pytest.mark.parametrize("bias", [False, True])
def test_against_the_reference(bias, dropout):
    sample, m = linear(DOUBLE, size=(9, 12, 10, 3), bias=bias), torch.rand(10).double().requires_grad_()
    call = sample.call | {name: sample.call[name].requires_grad_() for name in ("x", "lora_A", "lora_B")}
    x, weight, b, A, B, scaling = call.values()
    torch.manual_seed(4)
    y = output(x, weight, b, DoraUpdate(A, B, m, scaling, dropout))
    torch.manual_seed(4)
    want = reference.dora_linear(x, weight, b, A, B, m, scaling, torch.nn.functional.dropout(x, dropout))
    torch.testing.assert_close(y, want)
    found, wanted = (torch.autograd.grad(out, (x, A, B, m), sample.grads) for out in (y, want))
    torch.testing.assert_close(found, wanted)
    base = torch.nn.Linear(12, 10, bias=bias).double()
    base.load_state_dict({"weight": weight} | ({"bias": b} if bias else {}))
    update = DoraUpdate(A, B, m, scaling, 0.0)
    torch.testing.assert_close(output(x, weight, base.bias, update, base), output(x, weight, b, update))


def test_gradients_of_gradients():
    """The norms are constants to every gradient, so they are held here."""
    sample = linear(DOUBLE, size=(5, 6, 4, 2))
    norms, (x, weight, bias, A, B, scaling) = exact_norms(sample), sample.call.values()

    def output(x, A, B, m):
        z = torch.nn.functional.linear(x, weight) + scaling * x @ A.T @ B.T
        return rescale(z, m / norms, bias)

    tensors = tuple(t.requires_grad_() for t in (x, A, B, torch.rand(4).double()))
    assert torch.autograd.gradcheck(output, tensors) and torch.autograd.gradgradcheck(output, tensors)


@pytest.mark.parametrize("kind", ["none", "bias", "whole"])
def test_rescaling_compiled_and_under_vmap(kind):
    z, factor = torch.randn(3, 4, 6), torch.randn(6)
    base = {"none": None, "bias": torch.randn(6), "whole": torch.randn(3, 4, 6)}[kind]
    expected = rescale(z, factor, base)
    compiled = torch.compile(rescale, backend="aot_eager", fullgraph=True)
    torch.testing.assert_close(compiled(z, factor, base), expected)
    dims = (0, None, 0 if kind == "whole" else None)
    torch.testing.assert_close(torch.func.vmap(rescale, dims)(z, factor, base), expected)


def test_only_wanted_gradients_are_kept_or_computed():
    z, factor = torch.randn(3, 5, requires_grad=True), torch.rand(5)
    y = rescale(z, factor, None)
    assert y.grad_fn.saved_tensors[0] is None
    factor.requires_grad_()
    y = rescale(z.detach(), factor, None)
    assert y.grad_fn.saved_tensors[0] is not None
    y.sum().backward()
    torch.testing.assert_close(factor.grad, z.detach().sum(0))
