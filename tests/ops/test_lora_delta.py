"""lora_delta_: an adapter added in place to the output of any base layer."""

from __future__ import annotations

import copy

import pytest
import torch
from support.layers import DTYPES, SHAPES, Layer, assert_errors_as_plain, random_layer, random_layers, saved_bytes
from torch import Tensor, nn

from lora_ext import functional, reference

SEED = torch.tensor(0x1234_5678_9ABC_DEF0 >> 1)


def ours(layer: Layer, y: Tensor, x: Tensor, A: Tensor, B: Tensor, dropout_p: float) -> Tensor:
    return functional.lora_delta_(y.clone(), x, A, B, layer.scaling, dropout_p, SEED)


def plain(layer: Layer, y: Tensor, x: Tensor, A: Tensor, B: Tensor, dropout_p: float) -> Tensor:
    return (y + reference.lora_delta(x, A, B, layer.scaling, dropout_p, SEED)).to(y.dtype)


def results(function, layer: Layer, base: Tensor, dropout_p: float = 0.0) -> dict[str, Tensor]:
    leaves = [t.detach().clone().requires_grad_() for t in (base, layer.x, layer.lora_A, layer.lora_B)]
    y = function(layer, *leaves, dropout_p)
    grads = torch.autograd.grad(y, leaves, layer.grad_y)
    return dict(zip(("y", "grad_y", "grad_x", "grad_A", "grad_B"), (y.detach(), *grads), strict=True))


def assert_as_good_as_torch(layers: list[Layer], dropout_p: float = 0.0) -> None:
    compared = []
    for layer in layers:
        base = torch.randn_like(layer.grad_y)
        compared.append(
            (
                results(ours, layer, base, dropout_p),
                results(plain, layer.to(torch.float64), base.double(), dropout_p),
                results(plain, layer, base, dropout_p),
            )
        )
    assert_errors_as_plain(compared, layers[0].x.dtype, layers[0].lora_A.dtype)


@pytest.mark.pairs
@pytest.mark.full
@pytest.mark.parametrize("dropout_p", [0.0, 0.3])
@pytest.mark.parametrize("dtypes", DTYPES, ids=lambda d: f"{d[0]}-{d[1]}".replace("torch.", ""))
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_values_and_gradients(shape, dtypes, dropout_p):
    assert_as_good_as_torch(random_layers(shape, dtypes), dropout_p)


@pytest.mark.parametrize("leading", [(), (2, 3), (2, 1, 4), (2, 0, 3)], ids=str)
def test_leading_dimensions(leading):
    layer = random_layer((6, 24, 20, 4), leading=leading)
    if leading == ():
        layer.x, layer.grad_y = layer.x[0], layer.grad_y[0]
    base = torch.randn_like(layer.grad_y)
    for name, value in results(ours, layer, base, 0.3).items():
        torch.testing.assert_close(value, results(plain, layer, base, 0.3)[name])


def test_x_and_grad_y_of_any_strides():
    layer = random_layer((6, 24, 20, 4))
    base = torch.randn_like(layer.grad_y)
    expected = results(ours, layer, base, 0.3)
    layer.x = layer.x.T.contiguous().T
    layer.grad_y = layer.grad_y.repeat(1, 2)[:, :20]
    for name, value in results(ours, layer, base, 0.3).items():
        assert torch.equal(value, expected[name]), name


@pytest.mark.parametrize("dropout_p", [0.0, 0.3])
@pytest.mark.parametrize("wanted", range(1, 16))
def test_only_what_is_wanted_is_computed_and_kept(wanted, dropout_p):
    layer = random_layer((6, 24, 20, 4), (torch.float64, torch.float64))
    base = torch.randn_like(layer.grad_y)
    leaves = [base, layer.x, layer.lora_A, layer.lora_B]
    for i, leaf in enumerate(leaves):
        leaf.requires_grad_(bool(wanted >> i & 1))
    used = [leaf for leaf in leaves if leaf.requires_grad]
    outputs = []
    saved = saved_bytes(lambda: outputs.append(ours(layer, *leaves, dropout_p)))
    expected = plain(layer, *leaves, dropout_p)
    torch.testing.assert_close(outputs[0], expected)
    grads = [torch.autograd.grad(y, used, layer.grad_y) for y in (outputs[0], expected)]
    torch.testing.assert_close(*grads)
    shapes = [shape for shape, _ in saved]
    assert (tuple(layer.x.shape) in shapes) == layer.lora_A.requires_grad
    assert tuple(layer.grad_y.shape) not in shapes  # y is not kept


def test_is_the_adapter_of_lora_linear():
    """The same seed gives the same mask; with a zero base weight both are the adapter only."""
    layer = random_layer((33, 64, 48, 8), bias=False)
    layer.weight.zero_()
    whole = functional.lora_linear(*layer.args(), 0.3, SEED)
    y = functional.lora_delta_(torch.zeros_like(whole), layer.x, layer.lora_A, layer.lora_B, layer.scaling, 0.3, SEED)
    assert torch.equal(y, whole)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_zero_adapter_leaves_every_bit(dtype):
    layer = random_layer((33, 64, 48, 8), (dtype, torch.float32))
    y = torch.randn(33, 48).to(dtype)
    before = y.clone()
    assert functional.lora_delta_(y, layer.x, layer.lora_A, torch.zeros_like(layer.lora_B), 2.0) is y
    assert torch.equal(y, before)


def test_a_negative_scaling_takes_out_again():
    layer = random_layer((33, 64, 48, 8), (torch.float64, torch.float64))
    y = torch.randn(33, 48, dtype=torch.float64)
    before = y.clone()
    for scaling in (0.5, -0.5):
        functional.lora_delta_(y, layer.x, layer.lora_A, layer.lora_B, scaling)
    torch.testing.assert_close(y, before)


def test_dropout_draws_from_the_default_generator():
    layer = random_layer((6, 24, 20, 4))
    ys = []
    for seed in (1, 1, 2):
        torch.manual_seed(seed)
        y = torch.zeros_like(layer.grad_y)
        ys.append(functional.lora_delta_(y, layer.x, layer.lora_A, layer.lora_B, 1.0, 0.5))
    assert torch.equal(ys[0], ys[1]) and not torch.equal(ys[0], ys[2])


# --- with base layers -------------------------------------------------------------------------------------------------


class Adapted(nn.Module):
    def __init__(self, base: nn.Module, in_features: int, out_features: int, dropout_p: float = 0.0) -> None:
        super().__init__()
        self.base, self.dropout_p = base, dropout_p
        self.lora_A = nn.Parameter(torch.randn(4, in_features))
        self.lora_B = nn.Parameter(torch.randn(out_features, 4))

    def forward(self, x: Tensor) -> Tensor:
        seed = SEED.to(x.device) if self.dropout_p else None
        return functional.lora_delta_(self.base(x), x, self.lora_A, self.lora_B, 0.5, self.dropout_p, seed)

    def plain(self, x: Tensor) -> Tensor:
        y = self.base(x)
        return (y + reference.lora_delta(x, self.lora_A, self.lora_B, 0.5, self.dropout_p, SEED)).to(y.dtype)


@pytest.mark.parametrize("frozen", [True, False])
@pytest.mark.parametrize(
    "base",
    [
        nn.Linear(24, 20),
        nn.Linear(24, 20, bias=False),
        nn.utils.parametrizations.weight_norm(nn.Linear(24, 20)),
        nn.Sequential(nn.Linear(24, 12), nn.GELU(), nn.Linear(12, 20)),
    ],
    ids=["linear", "no bias", "weight norm", "bottleneck"],
)
def test_base_layers(base, frozen):
    module = Adapted(copy.deepcopy(base).requires_grad_(not frozen), 24, 20, dropout_p=0.3).double()
    x = torch.randn(2, 3, 24, dtype=torch.float64, requires_grad=True)  # nn.Linear returns a view of three dimensions
    leaves = [x, *(p for p in module.parameters() if p.requires_grad)]
    y, expected = module(x), module.plain(x)
    torch.testing.assert_close(y, expected)
    grads = [torch.autograd.grad(value.square().sum(), leaves) for value in (y, expected)]
    torch.testing.assert_close(*grads)


@pytest.mark.parametrize("kind", ["Linear8bitLt", "Linear4bit"])
def test_beside_a_quantised_base(kind):
    bitsandbytes = pytest.importorskip("bitsandbytes", reason="a GPU machine may not have it; make test does")
    options = dict(has_fp16_weights=False) if kind == "Linear8bitLt" else dict(compute_dtype=torch.float32)
    base = getattr(bitsandbytes.nn, kind)(64, 48, **options)
    base.load_state_dict(nn.Linear(64, 48).state_dict())
    base = base.to(torch.get_default_device()).requires_grad_(False)  # this quantises
    assert base.weight.dtype != torch.float32
    module = Adapted(base, 64, 48)
    x, grad_y = torch.randn(5, 64, requires_grad=True), torch.randn(5, 48) / 48**0.5
    y, expected = module(x), module.plain(x)
    torch.testing.assert_close(y, expected)
    leaves = [x, module.lora_A, module.lora_B]
    grads = [torch.autograd.grad(value, leaves, grad_y) for value in (y, expected)]
    torch.testing.assert_close(*grads)


def test_a_base_whose_backward_needs_its_output_is_caught():
    y = torch.randn(6, 20, requires_grad=True).exp()
    layer = random_layer((6, 24, 20, 4))
    functional.lora_delta_(y, layer.x, layer.lora_A, layer.lora_B, 1.0)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        y.sum().backward()


@pytest.mark.parametrize("requires_grad", [False, True])
def test_a_base_that_returns_its_input_is_refused(requires_grad):
    x = torch.randn(2, 6, 20)
    before = x.clone()
    A, B = torch.randn(4, 20, requires_grad=requires_grad), torch.randn(20, 4)
    for y in (x, x.view(12, 20).view(2, 6, 20)):
        with pytest.raises(
            ValueError, match="lora_delta_: y shares memory with x, which would change with it; pass a clone"
        ):
            functional.lora_delta_(y, x, A, B, 1.0)
    assert torch.equal(x, before)
    functional.lora_delta_(x[1], x[0], A.detach(), B, 1.0)  # neighbours
    torch.testing.assert_close(x[1], before[1] + reference.lora_delta(before[0], A.detach(), B, 1.0))


def test_a_leaf_that_requires_grad_is_refused():
    layer = random_layer((6, 24, 20, 4))
    with pytest.raises(RuntimeError, match="leaf Variable that requires grad"):
        functional.lora_delta_(layer.grad_y.requires_grad_(), layer.x, layer.lora_A, layer.lora_B, 1.0)


# --- PyTorch's machinery ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("backend", ["aot_eager", pytest.param("inductor", marks=pytest.mark.full)])
@pytest.mark.parametrize("train", [False, True])
def test_compile(backend, train):
    module = Adapted(nn.Linear(24, 20).requires_grad_(False), 24, 20, dropout_p=0.3)
    torch._dynamo.reset()
    compiled = torch.compile(module, fullgraph=True, dynamic=True, backend=backend)
    for batch in (3, 5):
        x = torch.randn(batch, 24, requires_grad=train)
        with torch.set_grad_enabled(train):
            expected, y = module(x), compiled(x)
        torch.testing.assert_close(y, expected)
        if train:
            leaves = [x, module.lora_A, module.lora_B]
            grads = [torch.autograd.grad(value.square().sum(), leaves) for value in (y, expected)]
            torch.testing.assert_close(*grads)


def test_autocast_takes_the_base_layers_dtype():
    module = Adapted(nn.Linear(24, 20).requires_grad_(False), 24, 20)
    x = torch.randn(6, 24, requires_grad=True)
    with torch.autocast(x.device.type, dtype=torch.bfloat16):
        y = module(x)
        expected = module.base(x) + reference.lora_delta(x.bfloat16(), module.lora_A, module.lora_B, 0.5)
    assert y.dtype == torch.bfloat16
    torch.testing.assert_close(y.float(), expected.float(), rtol=2e-2, atol=5e-2)
    y.float().square().sum().backward()
    assert x.grad.dtype == module.lora_A.grad.dtype == torch.float32


def test_inference_mode():
    layer = random_layer((6, 24, 20, 4))
    expected = plain(layer, layer.grad_y, layer.x, layer.lora_A, layer.lora_B, 0.0)
    with torch.inference_mode():
        y = layer.grad_y.clone()
        torch.testing.assert_close(
            functional.lora_delta_(y, layer.x, layer.lora_A, layer.lora_B, layer.scaling), expected
        )


# --- bad input --------------------------------------------------------------------------------------------------------

BAD = {
    "A": ({"lora_A": torch.randn(4, 5)}, ValueError, "lora_A has in_features=5 but x has 24"),
    "B": ({"lora_B": torch.randn(7, 4)}, ValueError, "lora_B has out_features=7 but y has 20"),
    "ranks": ({"lora_B": torch.randn(20, 3)}, ValueError, "lora_B has rank 3 but lora_A has 4"),
    "factor dtypes": ({"lora_B": torch.randn(20, 4).half()}, TypeError, "lora_B has dtype float16 but lora_A has"),
    "A dimensions": ({"lora_A": torch.randn(24)}, ValueError, r"lora_A has shape \[24\], want 2 dimensions"),
    "tokens": ({"x": torch.randn(5, 24)}, ValueError, r"x has shape \[5, 24\] but y has \[6, 20\]"),
    "dimensions": ({"x": torch.randn(2, 3, 24)}, ValueError, r"x has shape \[2, 3, 24\] but y has \[6, 20\]"),
    "x dtype": ({"x": torch.randn(6, 24).half()}, TypeError, "x has dtype float16 but y has float32"),
    "y dtype": ({"y": torch.ones(6, 20, dtype=torch.int32)}, TypeError, "y has dtype int32, want one of"),
    "strides": ({"y": torch.randn(20, 6).T}, ValueError, r"y has strides \[1, 6\], want a contiguous tensor"),
    "scaling": ({"scaling": float("nan")}, ValueError, "scaling is nan, want a finite number"),
    "dropout": ({"dropout_p": 1.0}, ValueError, "dropout_p is 1.0, want 0 <= dropout_p < 1"),
    "seed": ({"dropout_p": 0.5, "seed": torch.tensor([1, 2])}, ValueError, r"seed is int64 \[2\]"),
}


@pytest.mark.parametrize("requires_grad", [False, True])
@pytest.mark.parametrize("case", BAD)
def test_refuses_and_changes_nothing(case, requires_grad):
    change, exception, text = BAD[case]
    layer = random_layer((6, 24, 20, 4))
    good = {"y": layer.grad_y, "x": layer.x, "lora_A": layer.lora_A, "lora_B": layer.lora_B, "scaling": 0.5}
    arguments = good | change
    if requires_grad:
        arguments["lora_A"].requires_grad_()
    before = arguments["y"].clone()
    with pytest.raises(exception, match=f"^lora_delta_: {text}"):
        functional.lora_delta_(**arguments)
    with pytest.raises(RuntimeError, match="lora_delta_: "):
        torch.ops.lora_ext.lora_delta_(**arguments)
    assert torch.equal(arguments["y"], before)


@pytest.mark.parametrize("name", ["x", "lora_A", "lora_B"])
def test_an_inference_tensor_that_the_backward_needs_is_refused_before_y_changes(name):
    tensors = {"y": torch.randn(3, 5), "x": torch.randn(3, 4), "lora_A": torch.randn(2, 4), "lora_B": torch.randn(5, 2)}
    with torch.inference_mode():
        tensors[name] = tensors[name].clone()
    for factor in ("lora_A", "lora_B"):
        if factor != name:
            tensors[factor].requires_grad_()
    y = tensors["y"].clone()
    with pytest.raises(RuntimeError, match=f"lora_delta_: {name} is an inference tensor, which autograd cannot keep"):
        functional.lora_delta_(*tensors.values(), 0.5)
    assert torch.equal(tensors["y"], y) and not tensors["y"].requires_grad


def test_an_inference_x_that_no_gradient_needs():
    with torch.inference_mode():
        x = torch.randn(3, 4)
    A, B, y = torch.randn(2, 4), torch.randn(5, 2, requires_grad=True), torch.zeros(3, 5)
    functional.lora_delta_(y, x, A, B, 0.5).sum().backward()
    torch.testing.assert_close(B.grad, 0.5 * (x @ A.T).sum(0).expand(5, 2).clone())
