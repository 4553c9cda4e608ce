"""Tensors that an op changes in place: it refuses the same ones as PyTorch's in-place ops, changing nothing, and counts
changes as they do.
"""

from __future__ import annotations

import contextlib
import re
from collections.abc import Callable, Iterator

import pytest
import torch
from support.merging import same_bits
from support.op_table import (
    OPS,
    all_places,
    delta,
    entry_of,
    good_call,
    good_function_call,
    label,
    op_named,
    tensors_of,
    with_entry,
)
from torch import Tensor

from lora_ext import functional

SHAPE = 6, 20


class OneView(torch.autograd.Function):
    @staticmethod
    def forward(ctx, tensor):
        return tensor[:6]

    @staticmethod
    def backward(ctx, grad):
        return torch.cat([grad, grad])


class TwoViews(torch.autograd.Function):
    @staticmethod
    def forward(ctx, tensor):
        return tensor[:6], tensor[6:]

    @staticmethod
    def backward(ctx, first, second):
        return torch.cat([first, second])


def tall(requires_grad: bool = True) -> Tensor:
    return torch.randn(12, 20, requires_grad=requires_grad)


def under(mode: Callable, make: Callable[[], Tensor]) -> Callable[[], Tensor]:
    def made() -> Tensor:
        tensor = make()
        with mode():
            return tensor[:6]

    return made


def inference_tensor() -> Tensor:
    with torch.inference_mode():
        return torch.randn(SHAPE)


KINDS: dict[str, Callable[[], Tensor]] = {
    "plain": lambda: torch.randn(SHAPE),
    "what a base layer returns": lambda: torch.nn.Linear(5, 20)(torch.randn(6, 5)),
    "a view of it": lambda: torch.nn.Linear(5, 20)(torch.randn(1, 6, 5))[0],
    "the same without a gradient": lambda: torch.nn.Linear(5, 20).requires_grad_(False)(torch.randn(1, 6, 5))[0],
    "leaf": lambda: torch.randn(SHAPE, requires_grad=True),
    "view of a leaf": lambda: tall()[:6],
    "view of a plain tensor": lambda: tall(False)[:6],
    "unbind": lambda: (tall() * 2).view(2, 6, 20).unbind()[0],
    "unbind of a plain tensor": lambda: tall(False).view(2, 6, 20).unbind()[0],
    "split": lambda: (tall() * 2).split(6)[1],
    "view of one of a split": lambda: (tall() * 2).split(6)[1].view(SHAPE),
    "view made without grad": under(torch.no_grad, lambda: tall() * 2),
    "view of a leaf made without grad": under(torch.no_grad, tall),
    "view of a plain tensor made without grad": under(torch.no_grad, lambda: tall(False)),
    "view made in inference mode": under(torch.inference_mode, lambda: tall(False)),
    "custom function's view": lambda: OneView.apply(tall() * 2),
    "custom function's views": lambda: TwoViews.apply(tall() * 2)[0],
    "detached": lambda: torch.randn(SHAPE, requires_grad=True).detach(),
    "inference tensor": inference_tensor,
}
MODES = {"grad": contextlib.nullcontext, "no_grad": torch.no_grad, "inference_mode": torch.inference_mode}


def torch_takes(make: Callable[[], Tensor], mode: str, other_requires_grad: bool) -> bool:
    """Whether PyTorch's op changes such a tensor."""
    tensor, other = make(), torch.randn(SHAPE, requires_grad=other_requires_grad)
    try:
        with MODES[mode]():
            tensor.add_(other)
    except RuntimeError:
        return False
    return True


def version(tensor: Tensor) -> int | None:
    return None if tensor.is_inference() else tensor._version


@pytest.mark.pairs
@pytest.mark.parametrize("requires_grad", [False, True], ids=["frozen", "trained"])
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", ["lora_delta_", "lora_grouped_"])
def test_y_is_taken_and_refused_as_torch_does(name, kind, mode, requires_grad):
    call = OPS[name].small().call
    (call["lora_A"] if "lora_A" in call else call["lora_As"][0]).requires_grad_(requires_grad)
    takes = torch_takes(KINDS[kind], mode, requires_grad)
    for run in (getattr(functional, name), op_named(name)):
        call["y"] = y = KINDS[kind]()
        before, counted, grad_fn = y.detach().clone(), version(y), y.grad_fn
        (expected,) = OPS[name].plain(**call | {"y": before})
        refusal = pytest.raises(RuntimeError, match=rf"^{name}: y is (a|an|one) ")
        with contextlib.nullcontext() if takes else refusal, MODES[mode]():
            run(**call)
        if not takes:
            assert torch.equal(y.detach(), before) and version(y) == counted and y.grad_fn is grad_fn
            continue
        torch.testing.assert_close(y.detach(), expected.detach())
        if run is getattr(functional, name) or mode != "inference_mode":  # where the function counts the op's change
            assert counted is None or version(y) == counted + 1
        if mode == "grad":
            assert y.requires_grad == (requires_grad or KINDS[kind]().requires_grad)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("requires_grad", [False, True], ids=["frozen", "trained"])
def test_compiled(mode, requires_grad):
    call, base = delta().call, torch.nn.Linear(5, 20).requires_grad_(False)
    call["lora_B"].requires_grad_(requires_grad)
    z = torch.randn(1, 6, 5)

    def adapted(z):
        return functional.lora_delta_(**call | {"y": base(z)[0]})

    torch._dynamo.reset()
    with MODES[mode]():
        result = torch.compile(adapted, fullgraph=True, backend="aot_eager")(z)
        torch.testing.assert_close(result, adapted(z))
    assert result.requires_grad == (requires_grad and mode == "grad")


def test_a_change_that_the_op_refuses_is_not_counted():
    call = delta().call
    for A in (torch.randn(4, 23), torch.randn(4, 23, requires_grad=True)):
        with pytest.raises(ValueError, match="lora_delta_: lora_A has in_features=23"):
            functional.lora_delta_(**call | {"lora_A": A})
    assert call["y"]._version == 0


@pytest.mark.parametrize("requires_grad", [False, True])
def test_saved_tensors_are_found_to_have_changed_in_every_mode(requires_grad):
    """Also in inference mode, where PyTorch skips autograd's kernels."""
    for mode in MODES.values():
        call = delta().call
        call["lora_A"].requires_grad_(requires_grad)
        product = call["y"] * torch.randn(SHAPE, requires_grad=True)
        with mode():
            functional.lora_delta_(**call)
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            product.sum().backward()
    for op in MERGES:
        call = merge_call(op, KINDS["plain"])
        product = call["weights"][0] * torch.randn(SHAPE, requires_grad=True)
        op_named(op)(**call)
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            product.sum().backward()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_zero_adapter_leaves_every_bit(dtype):
    call = delta((dtype, torch.float32), size=(33, 64, 48, 8)).call
    before = call["y"].clone()
    call["lora_B"].zero_()
    assert functional.lora_delta_(**call) is call["y"]
    assert torch.equal(call["y"], before)


FACTORS = ("lora_A", "lora_B", "lora_As", "lora_Bs")
ADDED = [
    place for place in all_places() if place[0] in ("lora_delta_", "lora_grouped_") and place[1] in ("x", *FACTORS)
]


@pytest.mark.parametrize("requires_grad", [False, True])
@pytest.mark.parametrize(("op", "name", "i"), ADDED)
def test_an_argument_in_the_memory_of_y_is_refused(op, name, i, requires_grad):
    """Refuses an argument that shares a single element with y, and takes one that lies next to it."""
    call, run = good_function_call(op), getattr(functional, op)
    tensor, y = entry_of(call, name, i), call["y"]
    expected = run(**call | {"y": y.clone()})
    for argument, _, leaf in tensors_of(call):
        leaf.requires_grad_(requires_grad and argument in ("x", *FACTORS))
    for shared in (1, 0):
        memory = torch.cat([y.flatten(), tensor.detach().flatten()[shared:]])
        call = with_entry(call, name, i, memory[-tensor.numel() :].view(tensor.shape))
        call["y"], before = memory[: y.numel()].view(y.shape), memory.clone()
        if shared:
            text = rf"^{op}: y shares memory with {re.escape(label(name, i))}, which would change with it; pass a clone"
            with pytest.raises(ValueError, match=text):
                run(**call)
            assert torch.equal(memory, before)
    assert torch.equal(run(**call), expected)


# --- merging ----------------------------------------------------------------------------------------------------------

MERGES = ("lora_merge_", "lora_unmerge_", "lora_merge_record_")


def merge_call(op: str, make: Callable[[], Tensor]) -> dict:
    """Returns a call of the op on such a tensor and a plain one."""
    call = good_call(op)
    weights = [make(), torch.randn(5, 300)]
    factors = [(torch.randn(2, weight.shape[1]), torch.randn(weight.shape[0], 2)) for weight in weights]
    call |= {"weights": weights, "lora_As": [A for A, _ in factors], "lora_Bs": [B for _, B in factors]}
    if "words" in call:
        call["words"] = [torch.zeros(w.shape[0], -(-w.shape[1] // 256), dtype=torch.int16) for w in weights]
        call["corrections"] = [torch.empty(0, dtype=torch.int16) for _ in weights]
    return call


@pytest.mark.pairs
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("op", MERGES)
def test_merges_take_and_refuse_what_torch_does(op, kind, mode):
    takes = torch_takes(KINDS[kind], mode, False) and not (mode == "grad" and KINDS[kind]().requires_grad)
    call = merge_call(op, KINDS[kind])
    before = [weight.detach().clone() for weight in call["weights"]]
    counted = [version(weight) for weight in call["weights"]]
    text = rf"^{op}: (weight requires grad|weights\[0\] is an inference tensor)"
    with contextlib.nullcontext() if takes else pytest.raises(RuntimeError, match=text), MODES[mode]():
        op_named(op)(**call)
    for weight, old, count in zip(call["weights"], before, counted, strict=True):
        assert same_bits(weight, old) != takes
        assert count is None or version(weight) == count + takes
    if takes or op == "lora_merge_record_":
        return
    weight, factors = call["weights"][0], (call["lora_As"][0], call["lora_Bs"][0], 0.5)
    record = [functional.lora_merge_(before[0].clone(), *factors)]
    with pytest.raises(RuntimeError, match=f"^{op}: weight (requires grad|is an inference tensor)"), MODES[mode]():
        getattr(functional, op)(weight, *(factors if op == "lora_merge_" else record))
    assert same_bits(weight, before[0])


# --- lazy views -------------------------------------------------------------------------------------------------------


def lazy_views(tensor: Tensor) -> Iterator[Tensor]:
    """Yields tensors with the same values, which PyTorch computes on reading."""
    yield torch._neg_view(-tensor)
    if tensor.dtype == torch.float32:
        yield torch.complex(torch.zeros_like(tensor), -tensor).conj().imag


@pytest.mark.parametrize("mode", MODES)
def test_a_lazy_view_cannot_change(mode):
    for op in ("lora_delta_", *MERGES):
        call = good_call(op)
        name = "y" if op == "lora_delta_" else "weights"
        for lazy in lazy_views(call["y"] if op == "lora_delta_" else call["weights"][0]):
            lazy_call = call | {name: lazy if op == "lora_delta_" else [lazy, call["weights"][1]]}
            before = [tensor.clone() for _, _, tensor in tensors_of(lazy_call)]
            with MODES[mode](), pytest.raises(ValueError, match=rf"^{op}: (y|weights\[0\]) is a lazy view.*clone"):
                op_named(op)(**lazy_call)
            assert all(map(torch.equal, before, [tensor for _, _, tensor in tensors_of(lazy_call)]))
    weight = torch._neg_view(torch.randn(5, 7))
    with pytest.raises(ValueError, match=r"^lora_merge_: weight is a lazy view.*weight\.clone"):
        functional.lora_merge_(weight, torch.randn(2, 7), torch.randn(5, 2), 0.5)
