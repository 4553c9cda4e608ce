"""lora_grouped_: what it refuses, changes in place, and how it gets along with PyTorch's machinery."""

from __future__ import annotations

import contextlib
import threading

import pytest
import torch
from support.groups import Grouped, random_groups
from torch import Tensor, nn
from torch._dynamo.testing import CompileCounterWithBackend
from torch.utils.checkpoint import checkpoint

from lora_ext import functional

SEED = torch.tensor(77)


def good_call() -> dict[str, object]:
    case = random_groups(6, (24, 20), [(3, 4), 2], ranks=True, groups=torch.tensor([3, 0, -1, 2, 0, 1]))
    names = ("y", "x", "lora_As", "lora_Bs", "group_of_row", "scalings", "ranks")
    return dict(zip(names, case.args(), strict=True))


A, B, A1, B1 = torch.randn(3, 4, 24), torch.randn(3, 20, 4), torch.randn(2, 24), torch.randn(20, 2)
GROUPS, SCALINGS = torch.tensor([3, 0, -1, 2, 0, 1]), torch.ones(4, dtype=torch.float64)
BAD = {
    "no entries": ({"lora_As": [], "lora_Bs": []}, ValueError, "lora_As is empty, want at least one"),
    "entries": ({"lora_Bs": [B]}, ValueError, "lora_Bs has 1 entries but lora_As has 2"),
    "A dimensions": ({"lora_As": [A, A1[0]]}, ValueError, r"lora_As\[1\] has shape \[24\], want 2 or 3 dimensions"),
    "B dimensions": (
        {"lora_Bs": [B, B1[None]]},
        ValueError,
        r"lora_Bs\[1\] has shape \[1, 20, 2\] but lora_As\[1\] has \[2, 24\]: want a stack of each, or a matrix",
    ),
    "slots": ({"lora_Bs": [B[:2], B1]}, ValueError, r"lora_Bs\[0\] has 2 slots but lora_As\[0\] has 3"),
    "rank": ({"lora_Bs": [B[..., :3], B1]}, ValueError, r"lora_Bs\[0\] has rank 3 but lora_As\[0\] has 4"),
    "in_features": (
        {"lora_As": [A, A1[:, 1:]]},
        ValueError,
        r"lora_As\[1\] has in_features=23 but lora_As\[0\] has 24",
    ),
    "out_features": (
        {"lora_Bs": [B, B1[1:]]},
        ValueError,
        r"lora_Bs\[1\] has out_features=19 but lora_Bs\[0\] has 20",
    ),
    "A dtype": (
        {"lora_As": [A, A1.double()]},
        TypeError,
        r"lora_As\[1\] has dtype float64 but lora_As\[0\] has float32",
    ),
    "B dtype": ({"lora_Bs": [B.half(), B1]}, TypeError, r"lora_Bs\[0\] has dtype float16 but lora_As\[0\] has float32"),
    "factor dtype": ({"lora_As": [A.int(), A1]}, TypeError, r"lora_As\[0\] has dtype int32, want one of float64"),
    "y": ({"y": torch.randn(6, 19)}, ValueError, r"lora_Bs\[0\] has out_features=20 but y has 19"),
    "y strides": ({"y": torch.randn(20, 6).T}, ValueError, "y has strides .*, want a contiguous tensor"),
    "x": ({"x": torch.randn(6, 23)}, ValueError, r"lora_As\[0\] has in_features=24 but x has 23"),
    "x tokens": ({"x": torch.randn(5, 24)}, ValueError, r"x has shape \[5, 24\] but y has \[6, 20\]: want the same"),
    "x dtype": ({"x": torch.randn(6, 24).double()}, TypeError, "x has dtype float64 but y has float32"),
    "group dtype": ({"group_of_row": GROUPS.int()}, TypeError, "group_of_row has dtype int32, want int64"),
    "group shape": (
        {"group_of_row": GROUPS[:5]},
        ValueError,
        r"group_of_row has shape \[5\] but y has \[6, 20\]: want its first dimensions",
    ),
    "group too large": ({"group_of_row": GROUPS + 1}, ValueError, r"group_of_row\[0\] is 4, want -1 \(none\) to 3"),
    "group too small": ({"group_of_row": GROUPS - 1}, ValueError, r"group_of_row\[2\] is -2, want -1 \(none\) to 3"),
    "one group": ({"group_of_row": torch.tensor(9)}, ValueError, r"group_of_row is 9, want -1 \(none\) to 3"),
    "scalings": (
        {"scalings": SCALINGS[:3]},
        ValueError,
        r"scalings has shape \[3\], want \[4\]: a number for each group",
    ),
    "scalings list": (
        {"scalings": [1.0]},
        ValueError,
        r"scalings has shape \[1\], want \[4\]: a number for each group",
    ),
    "scalings dtype": ({"scalings": SCALINGS.float()}, TypeError, "scalings has dtype float32, want float64"),
    "a scaling": (
        {"scalings": SCALINGS / torch.tensor([1, 1, 0, 1])},
        ValueError,
        r"scalings\[2\] is inf, want a finite",
    ),
    "ranks": ({"ranks": torch.ones(5).long()}, ValueError, r"ranks has shape \[5\], want \[4\]"),
    "ranks dtype": ({"ranks": torch.ones(4)}, TypeError, "ranks has dtype float32, want int64"),
    "a rank": (
        {"ranks": torch.tensor([4, 4, 4, 3])},
        ValueError,
        r"ranks\[3\] is 3, want 0 to 2, the rank of lora_As\[1\]",
    ),
    "a negative rank": ({"ranks": torch.tensor([-1, 4, 4, 2])}, ValueError, r"ranks\[0\] is -1, want 0 to 4"),
    "dropout": ({"dropout_p": 1.0}, ValueError, "dropout_p is 1.0, want 0 <= dropout_p < 1"),
    "seed": ({"dropout_p": 0.5, "seed": torch.tensor([1, 2])}, ValueError, r"seed is int64 \[2\]"),
}


VALUES = ("group too large", "group too small", "one group", "a scaling", "a rank", "a negative rank")
reads_values = pytest.mark.cpu_only("CUDA kernels cannot refuse: the rows become NaN (test_cuda_grouped.py)")


@pytest.mark.parametrize("requires_grad", [False, True])
@pytest.mark.parametrize("case", [pytest.param(case, marks=[reads_values] * (case in VALUES)) for case in BAD])
def test_refuses_and_changes_nothing(case, requires_grad):
    change, exception, text = BAD[case]
    arguments = good_call() | change
    if requires_grad:
        arguments["x"].requires_grad_()
    before = arguments["y"].clone()
    with pytest.raises(exception, match=f"^lora_grouped_: {text}"):
        functional.lora_grouped_(**arguments)
    if case != "scalings list":
        with pytest.raises((RuntimeError, exception), match="lora_grouped_: "):
            torch.ops.lora_ext.lora_grouped_(**arguments)
    assert torch.equal(arguments["y"], before)


@reads_values
def test_the_position_of_a_bad_group_has_every_dimension():
    call = good_call() | {"y": torch.randn(2, 3, 20), "x": torch.randn(2, 3, 24)}
    with pytest.raises(ValueError, match=r"group_of_row\[1, 2\] is 5, want"):
        functional.lora_grouped_(**call | {"group_of_row": torch.tensor([[0, 1, 2], [3, -1, 5]])})


def test_what_no_row_chooses_may_be_anything():
    """A slot of a pool may hold garbage while it is filled."""
    call = good_call() | {"group_of_row": torch.tensor([3, 0, -1, 0, 0, 3])}
    expected = functional.lora_grouped_(**call | {"y": call["y"].clone()})
    call["scalings"][1], call["ranks"][2] = torch.nan, 99
    call["lora_As"][0][1:] = torch.nan
    assert torch.equal(functional.lora_grouped_(**call), expected)


def test_scalings_that_require_a_gradient_are_refused():
    call = good_call()
    call["scalings"].requires_grad_()
    with pytest.raises(RuntimeError, match="lora_grouped_: scalings requires grad, but the op computes no gradient"):
        functional.lora_grouped_(**call)


@pytest.mark.parametrize("requires_grad", [False, True])
def test_a_y_that_shares_memory_is_refused(requires_grad):
    call = good_call()
    square = torch.randn(6, 20)
    A, B = [torch.randn(4, 20, requires_grad=requires_grad)], [torch.randn(20, 4)]
    for y, x, Bs, name in ((square, square, B, "x"), (B[0].T[:1], torch.randn(1, 20), B, r"lora_Bs\[0\]")):
        choice = torch.zeros(len(y), dtype=torch.int64), call["scalings"][:1]
        with pytest.raises(ValueError, match=f"lora_grouped_: y shares memory with {name}|y has strides"):
            functional.lora_grouped_(y, x, A, Bs, *choice)


def make(requires_grad: bool) -> tuple[Grouped, list[Tensor]]:
    case = random_groups(12, (24, 20), [(3, 4), 2], leading=(4, 3), groups=torch.tensor([3, 0, -1, 2]))
    leaves = [t.requires_grad_(requires_grad) for t in (case.x, *case.lora_As, *case.lora_Bs)]
    return case, leaves


def added(case: Grouped, y: Tensor, x: Tensor, A: Tensor, A1: Tensor, B: Tensor, B1: Tensor) -> Tensor:
    return functional.lora_grouped_(y * 1, x, [A, A1], [B, B1], *case.choice(), 0.3, SEED)


@pytest.mark.parametrize("reentrant", [False, True])
def test_gradient_checkpointing(reentrant):
    case, leaves = make(True)
    expected = torch.autograd.grad(added(case, case.y, *leaves), leaves, case.grad_y)
    y = checkpoint(lambda *tensors: added(case, case.y, *tensors), *leaves, use_reentrant=reentrant)
    y.backward(case.grad_y)
    assert all(torch.equal(leaf.grad, grad) for leaf, grad in zip(leaves, expected, strict=True))


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode, contextlib.nullcontext])
def test_frozen_in_every_mode(mode):
    case, leaves = make(False)
    expected = added(case, case.y, *leaves)
    with mode():
        y = case.y.clone()
        result = functional.lora_grouped_(y, leaves[0], leaves[1:3], leaves[3:], *case.choice(), 0.3, SEED)
        assert result is y and torch.equal(y, expected)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_autocast_casts_x_to_what_the_base_layer_returned(dtype):
    case, leaves = make(True)
    base = nn.Linear(24, 20)
    with torch.autocast(case.x.device.type, dtype=dtype):
        y = functional.lora_grouped_(base(leaves[0]), leaves[0], leaves[1:3], leaves[3:], *case.choice())
    assert y.dtype == dtype
    expected = functional.lora_grouped_(base(leaves[0]), leaves[0], leaves[1:3], leaves[3:], *case.choice())
    torch.testing.assert_close(y.float(), expected, rtol=3e-2, atol=3e-2)
    y.float().sum().backward()
    assert all(leaf.grad.dtype == torch.float32 for leaf in leaves)


@pytest.mark.full
@pytest.mark.parametrize("backend", ["aot_eager", "inductor"])
@pytest.mark.parametrize("requires_grad", [False, True])
def test_compile_with_any_number_of_rows(backend, requires_grad):
    """One graph for batches of any size and any choice: no break, no other graph."""
    case, leaves = make(requires_grad)
    base = nn.Linear(24, 20).requires_grad_(False)
    counter = CompileCounterWithBackend(backend)

    def layer(x, group_of_row, *factors):
        return functional.lora_grouped_(base(x), x, factors[:2], factors[2:], group_of_row, *case.choice()[1:])

    torch._dynamo.reset()
    compiled = torch.compile(layer, fullgraph=True, dynamic=True, backend=counter)
    graphs = set()
    for batch in (5, 8, 13):
        x, groups = torch.randn(batch, 3, 24, requires_grad=requires_grad), torch.randint(-1, 4, (batch,))
        y, expected = (function(x, groups, *leaves[1:]) for function in (compiled, layer))
        torch.testing.assert_close(y, expected)
        if requires_grad:
            grads = [torch.autograd.grad(value.square().sum(), (x, *leaves[1:])) for value in (y, expected)]
            torch.testing.assert_close(*grads)
        graphs.add(counter.frame_count)
    assert len(graphs) == 1


def test_a_pool_of_slots_changes_without_another_graph():
    case = random_groups(6, (24, 20), [(3, 4)], ranks=True, groups=torch.randint(-1, 3, (6,)))
    counter = CompileCounterWithBackend("aot_eager")
    torch._dynamo.reset()
    compiled = torch.compile(lambda y, x, *rest: functional.lora_grouped_(y * 1, x, *rest), backend=counter)
    for _ in range(3):
        case.lora_As[0].normal_(), case.lora_Bs[0].normal_(), case.scalings.uniform_()
        case.ranks.copy_(torch.randint(5, (3,))), case.group_of_row.copy_(torch.randint(-1, 3, (6,)))
        expected = functional.lora_grouped_(*case.args())
        torch.testing.assert_close(compiled(*case.args()), expected)
    assert counter.frame_count == 1


def test_several_threads():
    case, leaves = make(True)
    expected = torch.autograd.grad(added(case, case.y, *leaves), leaves, case.grad_y)
    wrong = []

    def run():
        for _ in range(20):
            grads = torch.autograd.grad(added(case, case.y, *leaves), leaves, case.grad_y)
            wrong.extend(grad for grad, value in zip(grads, expected, strict=True) if not torch.equal(grad, value))

    threads = [threading.Thread(target=run) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong
