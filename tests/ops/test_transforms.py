"""The functions under torch.func, forward mode, gradients of gradients and batched gradients; nested tensors."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from support import op_table
from support.layers import assert_errors_as_plain
from support.op_table import DOUBLE, OPS, Op, Sample, entry_of, good_call, linear, with_entry
from torch import Tensor
from torch.autograd import gradcheck, gradgradcheck
from torch.func import grad, hessian, jacfwd, jacrev, jvp, vmap
from torch.nn import functional as F

from lora_ext import functional, reference


class Case:
    """A function of the tensors of a sample that have gradients, the same in plain PyTorch, and the tensors."""

    def __init__(self, op: Op, sample: Sample) -> None:
        places = op.leaves(sample, with_frozen=True)
        self.arguments = tuple(entry_of(sample.call, *place) for place in places)

        def of_tensors(function):
            def called(*tensors):
                call = sample.call
                for place, tensor in zip(places, tensors, strict=True):
                    call = with_entry(call, *place, tensor)
                return function(**call)

            return called

        self.ours, self.plain = of_tensors(CHANGED.get(op.name, op.run)), of_tensors(op.plain)

    def leaves(self) -> tuple[Tensor, ...]:
        return tuple(argument.clone().requires_grad_() for argument in self.arguments)

    def losses(self) -> tuple[Callable[..., Tensor], Callable[..., Tensor]]:
        return tuple(lambda *a, f=f: sum(y.pow(3).mean() for y in f(*a)) for f in (self.ours, self.plain))


def _added_to_a_batch(y, x, lora_As, lora_Bs, **call):
    y = y * 1 + 0 * sum(t.sum() for t in (x, *lora_As, *lora_Bs))  # vmap changes in place what has its batch
    return [functional.lora_grouped_(y, x, lora_As, lora_Bs, **call)]


CHANGED = {
    "lora_delta_": lambda y, **call: [functional.plus_lora_delta(y * 1, **call)],
    "lora_grouped_": _added_to_a_batch,
}
_LAYERS = ((3, 5), ((4, 2), (3, 3)))
_GROUPED = dict(tokens=5, features=(5, 4), entries=[2, (2, 3)], ranks=[1, 3, 2], groups=torch.tensor([2, -1, 0, 2, 1]))
SMALL: dict[str, tuple[str, Callable[[], Sample]]] = {
    "linear": ("lora_linear", lambda: op_table.linear(DOUBLE, size=(3, 5, 4, 2), bias=True)),
    "delta": ("lora_delta_", lambda: op_table.delta(DOUBLE, size=(3, 5, 4, 2))),
    "siblings": ("lora_linear_siblings", lambda: op_table.siblings(DOUBLE, size=_LAYERS)),
    "delta siblings": ("lora_delta_siblings", lambda: op_table.delta_siblings(DOUBLE, size=_LAYERS)),
    "grouped": ("lora_grouped_", lambda: op_table.grouped(DOUBLE, **_GROUPED)),
    "shrink": ("lora_shrink", lambda: op_table.shrink(DOUBLE, size=(3, 5, 4, 2))),
    "expand": ("lora_expand", lambda: op_table.expand(DOUBLE, size=(3, 5, 4, 2))),
}
MAKES = {name: lambda op=op, make=make: Case(OPS[op], make()) for name, (op, make) in SMALL.items()}
MAKES |= {
    f"{name}, dropout": lambda op=op, make=make: Case(OPS[op], make().with_dropout(0.4))
    for name, (op, make) in SMALL.items()
    if OPS[op].has_dropout
}
MAKES |= {
    f"bottleneck, {activation}": lambda a=activation, r=residual: Case(
        OPS["bottleneck"], op_table.bottleneck(DOUBLE, size=(3, 5, 6, 2), activation=a, residual=r)
    )
    for activation, residual in (("relu", False), ("gelu", True), ("silu", False), ("identity", False))
}


@pytest.fixture(params=MAKES.values(), ids=MAKES.keys())
def case(request) -> Case:
    return request.param()


@pytest.mark.full(but=3)
def test_first_derivatives_of_every_mode(case):
    assert gradcheck(
        case.ours, case.leaves(), check_forward_ad=True, check_batched_grad=True, check_batched_forward_grad=True
    )


@pytest.mark.full
def test_second_derivatives_of_every_mode(case):
    assert gradgradcheck(case.ours, case.leaves(), check_fwd_over_rev=True, check_batched_grad=True)


TRANSFORMS = {
    "grad": lambda f, n: grad(f, n),
    "jacrev": lambda f, n: jacrev(grad(f, n), n),
    "hessian": lambda f, n: hessian(f, n),
    "grad of grad": lambda f, n: grad(lambda *a: sum(g.pow(2).sum() for g in grad(f, n)(*a)), n),
}


@pytest.mark.parametrize("transform", TRANSFORMS)
def test_torch_func_as_in_plain_pytorch(case, transform):
    numbers = tuple(range(len(case.arguments)))
    ours, plain = (TRANSFORMS[transform](loss, numbers)(*case.arguments) for loss in case.losses())
    torch.testing.assert_close(ours, plain)


def test_gradients_of_each_sample(case):
    ours, plain = case.losses()
    numbers = tuple(range(len(case.arguments)))
    samples = tuple(torch.randn(6, *argument.shape).double() for argument in case.arguments)
    for i in numbers:  # one argument differs between the samples, then all
        arguments = case.arguments[:i] + samples[i : i + 1] + case.arguments[i + 1 :]
        in_dims = tuple(0 if j == i else None for j in numbers)
        results = [vmap(grad(f, numbers), in_dims)(*arguments) for f in (ours, plain)]
        torch.testing.assert_close(*results)
    results = [vmap(grad(f, numbers))(*samples) for f in (ours, plain)]
    torch.testing.assert_close(*results)
    one_by_one = [grad(ours, numbers)(*(sample[k] for sample in samples)) for k in range(6)]
    torch.testing.assert_close(results[0], tuple(torch.stack(grads) for grads in zip(*one_by_one, strict=True)))


def test_forward_mode(case):
    tangents = tuple(torch.randn_like(argument) for argument in case.arguments)
    expected = jvp(lambda *a: tuple(case.plain(*a)), case.arguments, tangents)
    torch.testing.assert_close(jvp(lambda *a: tuple(case.ours(*a)), case.arguments, tangents), expected)
    forward = [jacfwd(f)(*case.arguments) for f in case.losses()]
    torch.testing.assert_close(*forward)


def test_outputs_under_transforms_have_the_dtypes_of_the_ops():
    call = linear((torch.bfloat16, torch.float32)).with_dropout(0.3).call
    # Transforms compute with factors that the op may round.
    call |= {name: call[name].bfloat16().float() for name in ("lora_A", "lora_B")}
    expected = torch.ops.lora_ext.lora_linear(**call)
    batched = vmap(lambda x: torch.ops.lora_ext.lora_linear(**call | {"x": x}))(call["x"][None])
    for ours, theirs in zip(batched, expected, strict=True):
        assert ours.dtype == theirs.dtype
        eps = torch.finfo(theirs.dtype).eps if theirs.is_floating_point() else 0.0
        times = 2 if theirs.dtype.itemsize == 2 else 16  # y is rounded twice, and xa is a sum; the mask is the same
        near = times * eps * theirs.abs().max().item()
        torch.testing.assert_close(ours[0].float(), theirs.float(), rtol=0, atol=near)


def test_autocast_under_transforms_casts_as_the_op():
    sample = linear().with_dropout(0.3)
    call, exact = sample.call, sample.double().call

    def grad_A(f, call):
        loss = grad(lambda A: f(**call | {"lora_A": A}).to(A.dtype).square().sum())
        return {"grad_A": loss(call["lora_A"])}

    with torch.autocast(call["x"].device.type, dtype=torch.bfloat16):
        expected = functional.lora_linear(**call)
        (y,) = vmap(lambda x: functional.lora_linear(**call | {"x": x}))(call["x"][None])
        ours, plain = (grad_A(f, call) for f in (functional.lora_linear, reference.lora_linear))
    assert y.dtype == expected.dtype == torch.bfloat16 and ours["grad_A"].dtype == torch.float32
    torch.testing.assert_close(y, expected, rtol=2e-2, atol=2e-2)
    exact = grad_A(reference.lora_linear, exact)
    assert_errors_as_plain([(ours, exact, plain)], torch.bfloat16, torch.float32)


def test_refusals_name_the_argument_under_transforms():
    call = linear().call

    def loss(x, **wrong):
        return functional.lora_linear(**call | {"x": x} | wrong).sum()

    with pytest.raises(ValueError, match=r"^lora_linear: lora_A has in_features=5 but weight has 24"):
        grad(lambda x: loss(x, lora_A=torch.randn(4, 5)))(call["x"])
    with pytest.raises(ValueError, match=r"^lora_linear: scaling is -1.0, want at least 0"):
        vmap(lambda x: loss(x, scaling=-1.0))(call["x"][None])


def test_lora_delta_changes_in_place_what_vmap_lets_it_change():
    call = op_table.delta().call
    y, x = call.pop("y"), call["x"]
    expected = y + reference.lora_delta(**call)
    ys = y.unsqueeze(-1).repeat(1, 1, 3)  # samples that are not contiguous
    vmap(lambda y: functional.lora_delta_(y, **call).sum(), in_dims=-1)(ys)
    torch.testing.assert_close(ys, expected.unsqueeze(-1).repeat(1, 1, 3))
    with pytest.raises(RuntimeError, match="doesn't match the broadcast shape"):  # PyTorch's own words
        vmap(lambda x: functional.lora_delta_(y, **call | {"x": x}))(x[None])


# --- dropout ----------------------------------------------------------------------------------------------------------


def drawn(xs: Tensor, randomness: str) -> Tensor:
    """Returns what vmap makes of samples without a seed."""
    call = linear(size=(3, 50, 4, 2)).call | {"dropout_p": 0.5}
    return vmap(lambda x: functional.lora_linear(**call | {"x": x}), randomness=randomness)(xs)


def test_vmap_refuses_dropout_unless_told_how_to_draw():
    with pytest.raises(RuntimeError, match="called random operation while in randomness error mode"):
        drawn(torch.randn(8, 3, 50), "error")


def test_vmap_draws_one_mask_or_one_for_each_sample():
    xs = torch.randn(3, 50).expand(8, 3, 50)
    y = drawn(xs, "same")
    torch.testing.assert_close(y, y[:1].expand_as(y))
    y = drawn(xs, "different")
    assert all(not torch.allclose(y[i], y[j]) for i in range(8) for j in range(i))


def test_different_masks_are_those_of_the_drawn_seeds():
    call, xs = linear(size=(3, 50, 4, 2)).call | {"dropout_p": 0.5}, torch.randn(5, 3, 50)
    torch.manual_seed(3)
    ys = vmap(lambda x: functional.lora_linear(**call | {"x": x}), randomness="different")(xs)
    torch.manual_seed(3)
    seeds = vmap(lambda x: functional.draw_seed(x.device), randomness="different")(xs)
    for x, y, seed in zip(xs, ys, seeds, strict=True):
        torch.testing.assert_close(y, functional.lora_linear(**call | {"x": x, "seed": seed}))


# --- gradients of gradients -------------------------------------------------------------------------------------------


def test_gradients_of_gradients_of_a_frozen_lora_A_are_refused_by_name():
    call = linear().call
    leaves = [call[name].requires_grad_() for name in ("x", "lora_B")]
    text = r"^lora_linear: gradients of gradients .* need x, which is not kept while lora_A is frozen"
    with pytest.raises(RuntimeError, match=text):
        torch.autograd.grad(functional.lora_linear(**call).square().sum(), leaves, create_graph=True)


@pytest.mark.parametrize("name", ["linear, dropout", "siblings", "bottleneck, gelu"])
@pytest.mark.parametrize("wanted", [(0,), (3,), (4,), (0, 3), (1, 2)], ids=str)
def test_gradients_of_gradients_of_some_arguments(name, wanted):
    case, results = MAKES[name](), []
    for function in (case.ours, case.plain):
        arguments = [a.clone().requires_grad_(i in wanted) for i, a in enumerate(case.arguments)]
        leaves = [arguments[i] for i in wanted]
        loss = sum(y.pow(3).sum() for y in function(*arguments))
        penalty = sum(g.square().sum() for g in torch.autograd.grad(loss, leaves, create_graph=True))
        results.append([penalty, *torch.autograd.grad(penalty, leaves)])
    torch.testing.assert_close(*results)


def test_a_composite_backward_refuses_and_ignores_what_the_op_does():
    call = good_call("lora_linear_backward") | {"dropout_p": 0.0}  # and so the mask is not read
    op = torch.ops.lora_ext.lora_linear_backward
    expected = op(**call)
    grad_y = call["grad_y"].requires_grad_()
    torch.testing.assert_close(op(**call), expected)
    grad_y.untyped_storage().resize_(1)
    with pytest.raises(RuntimeError, match=r"^lora_linear_backward: grad_y is .* its storage has been freed"):
        op(**call)


def test_batched_gradients_of_a_large_bias():
    call = linear(size=(2000, 24, 130, 4)).call  # more elements than bias_gradient sums at once
    bias, grads = call["bias"].requires_grad_(), torch.randn(3, 2000, 130)
    (batched,) = torch.autograd.grad(functional.lora_linear(**call), bias, grads, is_grads_batched=True)
    torch.testing.assert_close(batched, grads.sum(1), rtol=1e-4, atol=1e-3)


# --- nested tensors ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("layout", [torch.jagged, torch.strided], ids=str)
@pytest.mark.parametrize("dropout_p", [0.0, 0.4])
def test_nested_tensors_compute_by_values(layout, dropout_p):
    call = linear(size=(10, 24, 20, 4)).with_dropout(dropout_p).call
    x = torch.nested.nested_tensor(list(call["x"].split([3, 1, 6])), layout=layout, requires_grad=True)
    calls = [call | {"x": of, "lora_A": call["lora_A"].clone()} for of in (x, call["x"].clone())]
    ys, leaves = [], [[one[name].requires_grad_() for name in ("x", "lora_A")] for one in calls]
    for one in calls:
        y, base = functional.lora_linear(**one), F.linear(one["x"], one["weight"], one["bias"])
        ys.append([torch.cat(t.unbind()) if t.is_nested else t for t in (y, y + base)])  # the sum needs one shape
        ys[-1][1].square().sum().backward()
        assert y.is_nested == one["x"].is_nested and (y.layout is layout or not y.is_nested)
    torch.testing.assert_close(*ys)
    (of_x, of_A), expected = ([leaf.grad for leaf in some] for some in leaves)
    torch.testing.assert_close([torch.cat(of_x.unbind()), of_A], expected)


def test_a_bottleneck_of_nested_tensors():
    call = op_table.bottleneck(DOUBLE, residual=False).call
    nested = torch.nested.nested_tensor(list(call["x"].split([2, 4])), layout=torch.jagged)
    y = functional.bottleneck(**call | {"x": nested})
    torch.testing.assert_close(y.values(), reference.bottleneck(**call))
    assert (y + nested).shape == nested.shape


def test_features_of_different_lengths_are_refused():
    x = torch.nested.nested_tensor([torch.randn(3, 24), torch.randn(2, 24)], layout=torch.jagged).transpose(1, 2)
    with pytest.raises(ValueError, match=r"^lora_linear: x is a nested tensor whose last dimension is jagged"):
        functional.lora_linear(**linear().call | {"x": x})
