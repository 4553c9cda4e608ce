"""Arguments that PyTorch computes on reading (negated views, imaginary parts of conjugates): ops accept them where they
only read, with the right values. Arguments that an op changes: test_in_place.py.
"""

from __future__ import annotations

import pytest
import torch
from support.op_calls import HAVE_KERNELS, good_call, op_named, tensors_of, with_entry
from torch import Tensor
from torch.utils import _pytree as pytree

from lora_ext import functional


def run(op: str, call: dict) -> list:
    """Returns the results and the arguments, which may have changed."""
    call = {name: pytree.tree_map_only(Tensor, lambda t: t if t.is_neg() else t.clone(), v) for name, v in call.items()}
    results = pytree.tree_leaves(op_named(op)(**call))
    return [*results, *(tensor for _, _, tensor in tensors_of(call))]


@pytest.mark.parametrize("op", HAVE_KERNELS)
def test_every_argument_that_is_read(op):
    call = good_call(op)
    changed = [a.name for a in op_named(op)._schema.arguments if a.alias_info and a.alias_info.is_write]
    expected = run(op, call)
    for name, i, tensor in list(tensors_of(call)):
        if name in changed or not tensor.is_floating_point():  # a seed, a mask or a record: integers are not negated
            continue
        lazy = torch._neg_view(-tensor)
        assert lazy.is_neg()
        for result, value in zip(run(op, with_entry(call, name, i, lazy)), expected, strict=True):
            assert result is value is None or torch.equal(result, value), name


@pytest.mark.parametrize("name", ["x", "weight", "bias", "lora_A", "lora_B"])
def test_with_gradients(name):
    call = good_call("lora_linear")
    plain = {k: v.requires_grad_() if isinstance(v, Tensor) and k != "seed" else v for k, v in call.items()}
    functional.lora_linear(**plain).sum().backward()
    negative = (-plain[name]).detach().requires_grad_()
    functional.lora_linear(**plain | {name: torch._neg_view(negative)}).sum().backward()
    torch.testing.assert_close(negative.grad, -plain[name].grad)


@pytest.mark.parametrize("dtype", [torch.float8_e4m3fn, torch.bool])
def test_of_dtypes_that_cannot_be_negated(dtype):
    call = good_call("lora_linear_siblings")
    bad = torch._neg_view(call["biases"][1].to(dtype))
    with pytest.raises(
        RuntimeError, match=r"^lora_linear_siblings: biases\[1\] is a lazy view that PyTorch cannot comp"
    ):
        op_named("lora_linear_siblings")(**with_entry(call, "biases", 1, bad))


def test_a_lazy_view_of_a_quantized_tensor_is_refused():
    """PyTorch's own negation of one crashes the process."""
    x = torch._neg_view(torch.quantize_per_tensor(torch.randn(3, 4), 0.1, 0, torch.qint8))
    with pytest.raises(RuntimeError, match=r"^lora_shrink: x is a lazy view of a quantized tensor; pass x\.deq"):
        torch.ops.lora_ext.lora_shrink(x, torch.randn(2, 4))
