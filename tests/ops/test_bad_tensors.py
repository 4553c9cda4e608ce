"""Tensors of all kinds in every argument of all ops: on other devices, fake, without memory, lazy views, inference.

PyTorch calls the fake kernels when any argument is a meta tensor: they would return uninitialised memory.
"""

from __future__ import annotations

import re

import pytest
import torch
from support import op_table
from support.op_table import (
    HAVE_KERNELS,
    HERE,
    REGISTERED,
    all_places,
    entry_of,
    good_call,
    label,
    op_named,
    tensors_of,
    with_entry,
)
from torch import Tensor
from torch._subclasses import FakeTensorMode
from torch.utils import _pytree as pytree

from lora_ext import functional

ALL_PLACES = all_places()
PLACES = [place for place in ALL_PLACES if place[0] != "lora_dropout_mask"]  # it has one tensor only
RECORDED = ("lora_linear", "lora_delta_", "lora_shrink")  # with a gradient of lora_A
ELSEWHERE = "meta" if HERE.type == "cpu" else "cpu"  # device of the other tensors for the compiled op
TWO_DEVICES = r"^{}: \S+ is on \S+ but \S+ is on \S+$"
in_every_place = pytest.mark.parametrize(("op", "name", "i"), PLACES)


def unused(call: dict[str, object]) -> dict[str, object]:
    """Returns a variant of the call that uses as few of its tensors as possible."""
    idle = {"dropout_p": 0.0, "output_mask": tuple(False for _ in call.get("output_mask", ()))}
    return call | {name: value for name, value in idle.items() if name in call}


used_or_not = pytest.mark.parametrize("use", [lambda call: call, unused], ids=["used", "unused"])


def assert_refused(run, op, name, i, call, kind: type[Exception] = ValueError, device: str = "meta") -> None:
    """Requires that ``run`` raises an error with op, argument and device, and changes no tensor."""
    real = [tensor for _, _, tensor in tensors_of(call) if not tensor.is_meta]
    before = [(tensor.clone(), tensor._version) for tensor in real]
    with pytest.raises(kind, match=TWO_DEVICES.format(op)) as error:
        run()
    assert {label(name, i), device} <= set(str(error.value).split())
    for tensor, (bits, version) in zip(real, before, strict=True):
        assert torch.equal(tensor, bits) and tensor._version == version


def test_there_is_a_good_call_of_every_op():
    assert set(REGISTERED) >= {"lora_linear", "lora_delta_", "lora_merge_record_", "lora_dropout_mask"}
    for op in HAVE_KERNELS:
        op_named(op)(**good_call(op))
    tensors = {op: [a.name for a in op_named(op)._schema.arguments if "Tensor" in str(a.type)] for op in REGISTERED}
    of_bases = {("lora_linear_siblings", "bases")}  # of another form of the op
    places = {(op, name) for op, name, _ in ALL_PLACES} | of_bases
    assert places == {(op, n) for op, names in tensors.items() for n in names}
    others = {op for op in REGISTERED if "backward" in op or "merge" in op or "mask" in op}
    assert set(REGISTERED) - set(op_table.OPS) == others


# --- devices ----------------------------------------------------------------------------------------------------------


@pytest.mark.pairs
@pytest.mark.parametrize("requires_grad", [False, True])
@used_or_not
@in_every_place
def test_one_meta_tensor_among_real_ones(op, name, i, use, requires_grad):
    call = use(good_call(op))
    if requires_grad and op in RECORDED:
        call["lora_A"].requires_grad_()
    bad = with_entry(call, name, i, entry_of(call, name, i).detach().to("meta"))
    assert_refused(lambda: op_named(op)(**bad), op, name, i, bad)


@in_every_place
def test_one_real_tensor_among_meta_ones(op, name, i):
    call = good_call(op)
    meta = pytree.tree_map_only(Tensor, lambda tensor: tensor.to("meta"), call)
    bad = with_entry(meta, name, i, entry_of(call, name, i))
    assert_refused(lambda: op_named(op)(**bad), op, name, i, bad)


@used_or_not
@pytest.mark.parametrize(("op", "name", "i"), [place for place in PLACES if place[0] in HAVE_KERNELS])
def test_the_compiled_op_refuses_by_itself(op, name, i, use):
    """PyTorch calls the CUDA kernel if any tensor is on CUDA; here the CPU kernel is called directly."""
    call = use(good_call(op))
    bad = with_entry(call, name, i, entry_of(call, name, i).to(ELSEWHERE))
    keys = torch._C.DispatchKeySet(getattr(torch._C.DispatchKey, HERE.type.upper()))
    run = lambda: op_named(op).redispatch(keys, *bad.values())  # noqa: E731
    assert_refused(run, op, name, i, bad, RuntimeError, ELSEWHERE)


@in_every_place
def test_fake_tensors_of_two_devices(op, name, i):
    call = good_call(op)
    bad = with_entry(call, name, i, entry_of(call, name, i).to("meta"))
    with FakeTensorMode() as mode, pytest.raises(ValueError, match=TWO_DEVICES.format(op)) as error:
        op_named(op)(**pytree.tree_map_only(Tensor, mode.from_tensor, bad))
    assert label(name, i) in str(error.value).split()


@in_every_place
def test_one_fake_tensor_among_real_ones(op, name, i):
    """PyTorch refuses it before anything happens."""
    call = good_call(op)
    before = [tensor.clone() for _, _, tensor in tensors_of(call)]
    fake = FakeTensorMode().from_tensor(entry_of(call, name, i))
    with pytest.raises(Exception, match=rf"lora_ext.{op}|{op}: "):
        op_named(op)(**with_entry(call, name, i, fake))
    assert all(torch.equal(tensor, bits) for (_, _, tensor), bits in zip(tensors_of(call), before, strict=True))


@pytest.mark.cpu_only("cpu:0 is the CPU")
def test_a_device_by_another_name():
    other = {"x": torch.empty(2, 3, 24, device="cpu:0"), "seed": torch.tensor(1, device="cpu:0")}
    op_named("lora_linear")(**good_call("lora_linear") | other)


# --- memory -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("nbytes", [0, 1], ids=["freed", "cut"])
@pytest.mark.parametrize(("op", "name", "i"), [place for place in ALL_PLACES if place[0] in HAVE_KERNELS])
def test_a_tensor_without_all_of_its_memory(op, name, i, nbytes):
    call = good_call(op)
    tensor = entry_of(call, name, i).detach().clone()
    if tensor.numel() == 0:
        pytest.skip("needs no memory")
    tensor.untyped_storage().resize_(nbytes)
    text = rf"^{op}: {re.escape(label(name, i))} is \[[\d, ]*\], but its storage has been freed or made smaller"
    with pytest.raises(RuntimeError, match=text):
        op_named(op)(**with_entry(call, name, i, tensor))


def test_views_to_the_last_byte_are_taken():
    shrink, x, A = torch.ops.lora_ext.lora_shrink, torch.randn(5, 8), torch.randn(2, 3)
    assert torch.equal(shrink(x[3:, 5:], A), shrink(x[3:, 5:].clone(), A))
    expanded = torch.randn(1).expand(4, 3)
    assert torch.allclose(shrink(expanded, A), expanded @ A.T)


# --- lazy views: negated ones, imaginary parts of conjugates. Those that an op changes: test_in_place.py --------------


def run(op: str, call: dict) -> list:
    """Returns the results and the arguments, which may have changed."""
    call = pytree.tree_map_only(Tensor, lambda t: t if t.is_neg() else t.clone(), call)
    return [*pytree.tree_leaves(op_named(op)(**call)), *(tensor for _, _, tensor in tensors_of(call))]


@pytest.mark.parametrize("op", HAVE_KERNELS)
def test_lazy_views_that_are_read(op):
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
def test_lazy_views_with_gradients(name):
    call = good_call("lora_linear")
    plain = {k: v.requires_grad_() if isinstance(v, Tensor) and k != "seed" else v for k, v in call.items()}
    functional.lora_linear(**plain).sum().backward()
    negative = (-plain[name]).detach().requires_grad_()
    functional.lora_linear(**plain | {name: torch._neg_view(negative)}).sum().backward()
    torch.testing.assert_close(negative.grad, -plain[name].grad)


@pytest.mark.parametrize("dtype", [torch.float8_e4m3fn, torch.bool])
def test_lazy_views_of_dtypes_that_cannot_be_negated(dtype):
    call = good_call("lora_linear_siblings")
    bad = with_entry(call, "biases", 1, torch._neg_view(call["biases"][1].to(dtype)))
    with pytest.raises(
        RuntimeError, match=r"^lora_linear_siblings: biases\[1\] is a lazy view that PyTorch cannot comp"
    ):
        op_named("lora_linear_siblings")(**bad)


def test_a_lazy_view_of_a_quantized_tensor_is_refused():
    """PyTorch's own negation of one crashes the process."""
    x = torch._neg_view(torch.quantize_per_tensor(torch.randn(3, 4), 0.1, 0, torch.qint8))
    with pytest.raises(RuntimeError, match=r"^lora_shrink: x is a lazy view of a quantized tensor; pass x\.deq"):
        torch.ops.lora_ext.lora_shrink(x, torch.randn(2, 4))


# --- inference tensors ------------------------------------------------------------------------------------------------


def inference(tensor: Tensor) -> Tensor:
    with torch.inference_mode():
        return tensor.clone()


CASES = [
    ("lora_linear", "x", "lora_A"),
    ("lora_linear", "lora_B", "x"),
    ("lora_linear_siblings", "lora_As", "x"),
    ("lora_delta_siblings", "lora_Bs", "x"),
    ("lora_delta_", "x", "lora_A"),
    ("lora_delta_", "lora_A", "lora_B"),
    ("lora_delta_", "lora_B", "lora_A"),
    ("bottleneck", "down_weight", "up_weight"),
    ("bottleneck", "x", "down_weight"),
    ("lora_shrink", "x", "lora_A"),
    ("lora_expand", "xa", "lora_B"),
]


@pytest.mark.parametrize(("name", "held", "trained"), CASES)
def test_an_inference_tensor_that_a_backward_needs_is_refused_by_name(name, held, trained):
    """Before y changes. PyTorch's own message names none."""
    call = op_table.OPS[name].small().call
    place = next((n, i) for n, i, _ in tensors_of(call) if n == held)
    call = with_entry(call, *place, inference(entry_of(call, *place)))
    call[trained] = call[trained].detach().requires_grad_()
    before = call["y"].clone() if "y" in call else None
    named = re.escape(label(*place))
    text = rf"^{name}: {named} is an inference tensor, which autograd cannot keep for the backward; pass {named}\.clone"
    with pytest.raises(RuntimeError, match=text):
        getattr(functional, name, op_named(name) if name in REGISTERED else None)(**call)
    assert before is None or (torch.equal(call["y"], before) and not call["y"].requires_grad)


def test_all_inference_tensors_are_named():
    call = op_table.bottleneck(residual=False).call
    call |= {"x": inference(call["x"]), "up_weight": inference(call["up_weight"])}
    call["down_weight"].requires_grad_()
    text = r"^bottleneck: x, up_weight are inference tensors, .*pass x\.clone\(\), up_w"
    with pytest.raises(RuntimeError, match=text):
        functional.bottleneck(**call)


def test_an_inference_x_that_no_gradient_needs():
    x, A, B = inference(torch.randn(3, 4)), torch.randn(2, 4), torch.randn(5, 2, requires_grad=True)
    functional.lora_delta_(torch.zeros(3, 5), x, A, B, 0.5).sum().backward()
    torch.testing.assert_close(B.grad, 0.5 * (x @ A.T).sum(0).expand(5, 2).clone())
