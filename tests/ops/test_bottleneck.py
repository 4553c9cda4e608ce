"""functional.bottleneck: a bottleneck adapter that uses the kernels of LoRA's two products."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, fields, replace

import pytest
import torch
from support.layers import DTYPES, SHAPES, assert_errors_as_plain, number_of_layers, saved_bytes
from torch import Tensor, nn

from lora_ext import functional, reference
from lora_ext._ops.bottleneck import ACTIVATIONS
from lora_ext._ops.registration import bias_gradient

HERE = torch.get_default_device()


@dataclass
class Case:
    """The tensors of a bottleneck, and a gradient for its output."""

    x: Tensor
    down_weight: Tensor
    down_bias: Tensor | None
    up_weight: Tensor
    up_bias: Tensor | None
    residual: Tensor | None
    grad_y: Tensor

    def to(self, dtype: torch.dtype) -> Case:
        given = {field.name: getattr(self, field.name) for field in fields(self)}
        return replace(self, **{name: tensor.to(dtype) for name, tensor in given.items() if tensor is not None})


def random_case(shape, dtypes=(torch.float32, torch.float32), leading=(), bias=True, own_residual=False) -> Case:
    num_tokens, in_features, out_features, size = shape
    dtype, weight_dtype = dtypes
    tokens = leading or (num_tokens,)
    if own_residual:
        out_features = in_features
    return Case(
        x=torch.randn(*tokens, in_features).to(dtype),
        down_weight=(torch.randn(size, in_features) / in_features**0.5).to(weight_dtype),
        down_bias=torch.randn(size).to(weight_dtype) if bias else None,
        up_weight=torch.randn(out_features, size).to(weight_dtype),
        up_bias=torch.randn(out_features).to(weight_dtype) if bias else None,
        residual=None if own_residual else torch.randn(*tokens, out_features).to(dtype),
        grad_y=torch.randn(*tokens, out_features).to(dtype),
    )


def results(function: Callable, case: Case, activation: str = "relu") -> dict[str, Tensor]:
    names = ("x", "down_weight", "down_bias", "up_weight", "up_bias", "residual")
    leaves = {name: getattr(case, name) for name in names}
    leaves = {name: None if t is None else t.detach().clone().requires_grad_() for name, t in leaves.items()}
    y = function(**leaves, activation=activation)
    given = {name: leaf for name, leaf in leaves.items() if leaf is not None}
    grads = torch.autograd.grad(y, list(given.values()), case.grad_y)
    return {"y": y.detach(), **{f"grad_{name}": grad for name, grad in zip(given, grads, strict=True)}}


def away_from_the_kink(case: Case) -> Case:
    """Zeroes tokens with a hidden feature near 0, where rounding could flip relu's gradient."""
    hidden = case.x.double() @ case.down_weight.double().T
    bias = 0.0 if case.down_bias is None else case.down_bias.double()
    near = (hidden + bias).abs().amin(-1) < 0.02
    case.x[near] = 0.0
    return case


def assert_as_good_as_torch(shape, dtypes, activation="relu", **options) -> None:
    num_tokens, _, _, size = shape
    compared = []
    for _ in range(number_of_layers(num_tokens * size)):
        case = random_case(shape, dtypes, **options)
        if activation == "relu":
            away_from_the_kink(case)
        compared.append(
            (
                results(functional.bottleneck, case, activation),
                results(reference.bottleneck, case.to(torch.float64), activation),
                results(reference.bottleneck, case, activation),
            )
        )
    assert_errors_as_plain(compared, *dtypes)


@pytest.mark.pairs
@pytest.mark.full
@pytest.mark.parametrize("own_residual", [False, True])
@pytest.mark.parametrize("dtypes", DTYPES, ids=lambda d: f"{d[0]}-{d[1]}".replace("torch.", ""))
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_values_and_gradients(shape, dtypes, own_residual):
    assert_as_good_as_torch(shape, dtypes, activation="gelu", own_residual=own_residual)


@pytest.mark.parametrize("dtypes", [(torch.bfloat16, torch.float32), (torch.float16, torch.bfloat16)], ids=str)
def test_bias_gradients_of_many_tokens_in_another_dtype(dtypes):
    """The sum is computed in pieces of different sizes, and rounded only at the end."""
    grad_y = (torch.randn(3000, 97) + 0.3).to(dtypes[0])
    exact, ours = grad_y.double().sum(0), bias_gradient(grad_y, dtypes[1])
    assert ours.dtype == dtypes[1]
    rounding = 1e-6 if dtypes[1] == torch.float32 else 2**-8
    assert ((ours.double() - exact).abs() <= rounding * exact.abs() + 1e-4).all()


def test_bias_gradients_in_a_narrower_dtype():
    grad_y = torch.randn(30000, 8) + 0.3
    assert torch.equal(bias_gradient(grad_y, torch.bfloat16), grad_y.sum(0).bfloat16())


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("activation", sorted(ACTIVATIONS))
def test_every_activation(activation, bias):
    for dtypes in DTYPES[:3]:
        assert_as_good_as_torch((70, 97, 131, 8), dtypes, activation, bias=bias)


@pytest.mark.parametrize("leading", [(2, 3), (2, 1, 4), (2, 0, 3)], ids=str)
def test_leading_dimensions(leading):
    case = random_case((6, 24, 20, 4), leading=leading)
    expected = results(reference.bottleneck, case)
    for name, value in results(functional.bottleneck, case).items():
        torch.testing.assert_close(value, expected[name])


def test_one_token_without_a_token_dimension():
    case = random_case((1, 24, 20, 4))
    case = replace(case, x=case.x[0], residual=case.residual[0], grad_y=case.grad_y[0])
    expected = results(reference.bottleneck, case)
    for name, value in results(functional.bottleneck, case).items():
        torch.testing.assert_close(value, expected[name])


@pytest.mark.parametrize("own_residual", [False, True])
def test_any_strides(own_residual):
    case = random_case((6, 24, 20, 4), own_residual=own_residual)
    expected = results(functional.bottleneck, case)
    turned = {
        field.name: tensor.T.contiguous().T if tensor.dim() == 2 else tensor.repeat_interleave(2)[::2]
        for field in fields(case)
        if (tensor := getattr(case, field.name)) is not None
    }
    for name, value in results(functional.bottleneck, replace(case, **turned)).items():
        assert torch.equal(value, expected[name]), name


@pytest.mark.parametrize("own_residual", [False, True])
@pytest.mark.parametrize("wanted", range(1, 64))
def test_only_what_is_wanted_is_computed_and_kept(wanted, own_residual):
    case = random_case((6, 24, 20, 4), (torch.float64, torch.float64), own_residual=own_residual)
    leaves = [case.x, case.down_weight, case.down_bias, case.up_weight, case.up_bias, case.residual]
    for i, leaf in enumerate(leaves):
        if leaf is not None:
            leaf.requires_grad_(bool(wanted >> i & 1))
    used = [leaf for leaf in leaves if leaf is not None and leaf.requires_grad]
    if not used:
        return
    arguments = (*leaves[:5], "silu", leaves[5])
    outputs = []
    saved = [shape for shape, _ in saved_bytes(lambda: outputs.append(functional.bottleneck(*arguments)))]
    expected = reference.bottleneck(*arguments)
    torch.testing.assert_close(outputs[0], expected)
    grads = [torch.autograd.grad(y, used, case.grad_y) for y in (outputs[0], expected)]
    torch.testing.assert_close(*grads)
    needs_x = case.x.requires_grad or case.down_weight.requires_grad
    assert (tuple(case.x.shape) in saved) == needs_x
    assert own_residual or tuple(case.grad_y.shape) not in saved  # the residual is not kept


def test_the_residual_may_be_wider_than_x():
    """As under autocast: 16-bit x with a float32 residual, which keeps its bits."""
    case = random_case((33, 64, 64, 8), (torch.bfloat16, torch.float32))
    residual = torch.randn(33, 64)
    arguments = (case.x, case.down_weight, None, torch.zeros_like(case.up_weight), None, "relu", residual)
    assert torch.equal(functional.bottleneck(*arguments), residual)


# --- under PyTorch's machinery ----------------------------------------------------------------------------------------


class Adapted(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.down, self.up = nn.Linear(24, 4), nn.Linear(4, 24)

    def forward(self, x: Tensor) -> Tensor:
        weights = self.down.weight, self.down.bias, self.up.weight, self.up.bias
        return functional.bottleneck(x, *weights, "gelu")

    def plain(self, x: Tensor) -> Tensor:
        return x + self.up(nn.functional.gelu(self.down(x)))


@pytest.mark.full
@pytest.mark.parametrize("backend", ["aot_eager", pytest.param("inductor", marks=pytest.mark.full)])
def test_compile_fullgraph_dynamic(backend):
    module = nn.Sequential(Adapted(), nn.Tanh(), Adapted())
    compiled = torch.compile(module, fullgraph=True, dynamic=True, backend=backend)
    for batch in (3, 5):
        x = torch.randn(batch, 7, 24, requires_grad=True)
        results = []
        for run in (module, compiled):
            y = run(x)
            results.append([y, *torch.autograd.grad(y.square().sum(), [x, *module.parameters()])])
        torch.testing.assert_close(*results)


def test_autocast():
    module = Adapted()
    x = torch.randn(6, 24, requires_grad=True)
    with torch.autocast(HERE.type, dtype=torch.bfloat16):
        y = module(x)
    y.square().sum().backward()
    torch.testing.assert_close(y, module.plain(x))  # narrow products run in float32: they are memory-bound
    assert y.dtype == x.grad.dtype == module.down.weight.grad.dtype == torch.float32


def test_export():
    module = Adapted().eval()
    x = torch.randn(5, 24)
    program = torch.export.export(module, (x,), dynamic_shapes=({0: torch.export.Dim("tokens", min=2)},))
    assert any("lora_ext.lora_shrink" in str(node.target) for node in program.graph.nodes)
    other = torch.randn(9, 24)
    exported = program.module()
    y, expected = exported(other), module.plain(other)
    torch.testing.assert_close(y, expected)
    grads = [torch.autograd.grad(r.sum(), m.down.weight)[0] for r, m in ((y, exported), (expected, module))]
    torch.testing.assert_close(*grads)


def test_meta_tensors():
    assert Adapted().to("meta")(torch.empty(3, 5, 24, device="meta")).shape == (3, 5, 24)


def test_the_gradients_of_the_ops_alone():
    case = random_case((5, 6, 7, 3), (torch.float64, torch.float64))
    ops = torch.ops.lora_ext
    expand = case.residual, torch.randn(5, 3, dtype=torch.float64), case.up_weight, case.up_bias
    for op, leaves in ((ops.lora_shrink, (case.x, case.down_weight)), (ops.lora_expand, expand)):
        leaves = tuple(leaf.requires_grad_() for leaf in leaves)
        assert torch.autograd.gradcheck(op, leaves, check_forward_ad=True, check_batched_grad=True)
        assert torch.autograd.gradgradcheck(op, leaves, check_fwd_over_rev=True)


# --- bad arguments ----------------------------------------------------------------------------------------------------

BAD = {
    "in_features": ({"x": torch.randn(3, 9)}, ValueError, "down_weight has in_features=24 but x has 9"),
    "no dimension": ({"x": torch.tensor(1.0)}, ValueError, "x has no dimension"),
    "down 1-D": ({"down_weight": torch.randn(24)}, ValueError, r"down_weight has shape \[24\], want 2 dimensions"),
    "sizes": ({"up_weight": torch.randn(20, 3)}, ValueError, "up_weight has size 3 but down_weight has 4"),
    "out": ({"up_weight": torch.randn(9, 4)}, ValueError, "up_weight has out_features=9 but residual has 20"),
    "own residual": ({"residual": None}, ValueError, "up_weight has out_features=20 but x has 24"),
    "tokens": ({"residual": torch.randn(4, 20)}, ValueError, r"residual has shape \[4, 20\] but x has \[3, 24\]"),
    "down_bias": ({"down_bias": torch.randn(5)}, ValueError, r"down_bias has shape \[5\], want \[4\]"),
    "up_bias": ({"up_bias": torch.randn(1)}, ValueError, r"up_bias has shape \[1\], want \[20\]"),
    "integers": ({"x": torch.ones(3, 24, dtype=torch.int64)}, TypeError, "x has dtype int64, want one of"),
    "residual dtype": ({"residual": torch.randn(3, 20).double()}, TypeError, "residual has dtype float64 but x has fl"),
    "size 0": (
        {"down_weight": torch.randn(0, 24), "up_weight": torch.randn(20, 0), "down_bias": None},
        ValueError,
        "down_weight has size 0, want at least 1",
    ),
    **{
        f"device of {name}": (
            {name: torch.randn(*sizes, device="meta")},
            ValueError,
            f"{name} is on meta but x is on {HERE}",
        )
        for name, sizes in {
            "down_weight": (4, 24),
            "down_bias": (4,),  # PyTorch's += accepts it and does nothing
            "up_weight": (20, 4),
            "up_bias": (20,),
            "residual": (3, 20),
        }.items()
    },
    "activation": ({"activation": "tanh"}, ValueError, "activation is 'tanh', want one of relu, gelu, silu, identity"),
}


@pytest.mark.parametrize("case", BAD)
@pytest.mark.parametrize("requires_grad", [False, True])
def test_refuses(case, requires_grad):
    change, exception, text = BAD[case]
    good = random_case((3, 24, 20, 4))
    names = ("x", "down_weight", "down_bias", "up_weight", "up_bias", "residual")
    arguments = {name: getattr(good, name) for name in names}
    if requires_grad:
        arguments["x"].requires_grad_()
    with pytest.raises(exception, match=f"^bottleneck: {text}"):
        functional.bottleneck(**(arguments | change))


BAD_OPS = {
    "features": ("lora_shrink", (torch.randn(3, 9), torch.randn(4, 24)), "lora_A has in_features=24 but x has 9"),
    "rank 0": ("lora_shrink", (torch.randn(3, 24), torch.randn(0, 24)), "lora_A has rank 0"),
    "xa rank": ("lora_expand", (torch.randn(3, 8), torch.randn(3, 5), torch.randn(8, 4)), "lora_B has rank=4 but xa"),
    "xa tokens": ("lora_expand", (torch.randn(3, 8), torch.randn(2, 4), torch.randn(8, 4)), "xa has 2 tokens but base"),
    "xa dtype": (
        "lora_expand",
        (torch.randn(3, 8).bfloat16(), torch.randn(3, 4).bfloat16(), torch.randn(8, 4)),
        "xa has dtype bfloat16, want the accumulation dtype float32",
    ),
    "base shape": (
        "lora_shrink_backward",
        (torch.randn(3, 4), torch.randn(3, 8), torch.randn(4, 8), torch.randn(3, 9), (True, True)),
        r"base has shape \[3, 9\] but x has \[3, 8\]",
    ),
    "xa": (
        "lora_expand_backward",
        (torch.randn(3, 8), None, torch.randn(8, 4), (True, True)),
        "grad_lora_B is wanted but xa is None",
    ),
    "mask": (
        "lora_shrink_backward",
        (torch.randn(3, 4), torch.randn(3, 8), torch.randn(4, 8), None, (True, True, True)),
        "output_mask has 3 entries, want 2",
    ),
}


@pytest.mark.parametrize("case", BAD_OPS)
def test_ops_refuse(case):
    op, arguments, text = BAD_OPS[case]
    with pytest.raises(RuntimeError, match=text):
        getattr(torch.ops.lora_ext, op)(*arguments)
