"""lora_grouped_linear: a linear layer whose rows choose their adapters, in one call on the CPU."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from support.groups import Grouped, random_groups
from support.layers import DTYPES, assert_errors_as_plain
from torch import Tensor

from lora_ext import functional, reference
from lora_ext._ops import grouped_linear
from lora_ext.nn.base_product import has_kernel

on_cpu = pytest.mark.cpu_only("the op has a kernel on the CPU only")


def random_call(num_tokens: int, features=(70, 37), entries=((5, 16), 3, 40), dtypes=(torch.float32,) * 2, **options):
    """Returns a case, a weight and a bias."""
    case = random_groups(num_tokens, features, list(entries), dtypes, **options)
    weight = (torch.randn(features[1], features[0]) / max(features[0], 1) ** 0.5).to(dtypes[0])
    return case, weight, torch.randn(features[1]).to(dtypes[0])


def ours(case: Grouped, weight: Tensor, bias: Tensor | None) -> Tensor:
    return functional.lora_grouped_linear(case.x, weight, bias, case.lora_As, case.lora_Bs, *case.choice())


def plain(case: Grouped, weight: Tensor, bias: Tensor | None) -> Tensor:
    y = F.linear(case.x, weight, bias)
    return (y + reference.lora_grouped(case.x, case.lora_As, case.lora_Bs, *case.choice())).to(y.dtype)


@pytest.fixture
def kernel_calls(monkeypatch) -> list[bool]:
    """Whether the calls reached the kernel."""
    found: list[bool] = []
    call = grouped_linear.lora_grouped_linear

    def counted(*arguments):
        y = call(*arguments)
        found.append(y is not None)
        return y

    monkeypatch.setattr(grouped_linear, "lora_grouped_linear", counted)
    return found


# Few tokens, and many: kernels of their own (csrc/bindings/cpu_grouped_linear.cpp), and groups of few and many rows.
@pytest.mark.pairs
@pytest.mark.parametrize("has_bias", [True, False])
@pytest.mark.parametrize("dtypes", DTYPES, ids=lambda d: f"{d[0]}-{d[1]}".replace("torch.", ""))
@pytest.mark.parametrize("num_tokens", [0, 1, 2, 7, 8, 9, 31, 32, 33, 130, 1100])
def test_as_good_as_torch(num_tokens, dtypes, has_bias):
    case, weight, bias = random_call(num_tokens, dtypes=dtypes, ranks=num_tokens % 2 == 1)
    bias = bias if has_bias else None
    exact = case.to(torch.float64), weight.double(), None if bias is None else bias.double()
    found = [{"y": y} for y in (ours(case, weight, bias), plain(*exact), plain(case, weight, bias))]
    assert_errors_as_plain([tuple(found)], *dtypes)


@on_cpu
@pytest.mark.parametrize("num_tokens", [5, 33])
def test_many_groups_and_wide_layers(num_tokens, kernel_calls):
    case, weight, bias = random_call(num_tokens, (2050, 1030), entries=((200, 64),))
    torch.testing.assert_close(ours(case, weight, bias), plain(case, weight, bias), rtol=1e-4, atol=1e-3)
    assert kernel_calls == [True]


@on_cpu
@pytest.mark.parametrize("features", [(514, 260), (1030, 1030)], ids=str)
@pytest.mark.parametrize("num_tokens", [4, 20, 64, 300])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_same_bits_with_any_number_of_threads(dtype, num_tokens, features):
    """If PyTorch multiplies by the weight (small weights, other machines), where F.linear has the same bits, too."""
    case, weight, bias = random_call(num_tokens, features, dtypes=(dtype, torch.float32))
    found, threads = [], torch.get_num_threads()
    try:
        for number in (1, 2, 3):
            torch.set_num_threads(number)
            found.append((ours(case, weight, bias), F.linear(case.x, weight, bias)))
    finally:
        torch.set_num_threads(threads)
    for y, base in found[1:]:
        if has_kernel(case.x, weight) or torch.equal(base, found[0][1]):
            assert torch.equal(y, found[0][0])


@pytest.mark.parametrize("num_tokens", [6, 40])
def test_tensors_of_any_strides(num_tokens):
    case, weight, bias = random_call(num_tokens, entries=((4, 8), 3), groups=torch.randint(-1, 5, (num_tokens,)))
    expected = ours(case, weight, bias)
    odd = Grouped(**vars(case))
    odd.x = case.x.T.contiguous().T
    odd.lora_As = [case.lora_As[0].mT.contiguous().mT, case.lora_As[1].repeat(2, 2)[:3, :70]]
    odd.lora_Bs = [case.lora_Bs[0].permute(1, 2, 0).contiguous().permute(2, 0, 1), case.lora_Bs[1].repeat(1, 9)[:, :3]]
    odd.group_of_row = case.group_of_row.repeat_interleave(2)[::2]
    columns = bias.repeat_interleave(3)[::3]
    assert not columns.is_contiguous()
    assert torch.equal(ours(odd, weight, columns), expected)
    torch.testing.assert_close(ours(odd, weight.T.contiguous().T, columns), expected, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(ours(odd, weight.repeat(1, 2)[:, :70], columns), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("features", [(0, 20), (24, 0)], ids=str)
def test_no_features(features):
    case, weight, bias = random_call(9, features, entries=(4, 3))
    torch.testing.assert_close(ours(case, weight, bias), plain(case, weight, bias), rtol=0, atol=1e-6)


def test_leading_dimensions():
    case, weight, bias = random_call(0, entries=(4, 3, 2), leading=(4, 3, 2), groups=torch.randint(-1, 3, (4, 3)))
    torch.testing.assert_close(ours(case, weight, bias), plain(case, weight, bias), rtol=1e-5, atol=1e-5)


def test_what_is_not_finite_stays_in_its_row():
    case, weight, bias = random_call(20, groups=torch.arange(20) % 7 - 1)
    expected = ours(case, weight, bias)
    case.x[3, 5] = torch.inf
    y = ours(case, weight, bias)
    others = torch.arange(20) != 3
    assert torch.equal(y[others], expected[others]) and not y[3].isfinite().any()


# --- who calls the kernel ---------------------------------------------------------------------------------------------


@on_cpu
@pytest.mark.parametrize("wanted", ["x", "weight", "bias", "lora_A", "lora_B"])
def test_gradients_are_those_of_the_two(wanted, kernel_calls):
    case, weight, bias = random_call(12, dtypes=(torch.float64,) * 2, groups=torch.arange(12) % 8 - 1)
    named = {"x": case.x, "weight": weight, "bias": bias, "lora_A": case.lora_As[1], "lora_B": case.lora_Bs[1]}
    leaf = named[wanted].requires_grad_()
    for y in (ours(case, weight, bias), torch.ops.lora_ext.lora_grouped_linear(*arguments(case, weight, bias))):
        expected = plain(case, weight, bias)
        torch.testing.assert_close(y, expected)
        grads = [torch.autograd.grad(out, leaf, case.grad_y)[0] for out in (y, expected)]
        torch.testing.assert_close(*grads)
    assert kernel_calls == [False]
    with torch.no_grad():
        torch.testing.assert_close(ours(case, weight, bias), plain(case, weight, bias))
    assert kernel_calls == [False, True]


def arguments(case: Grouped, weight: Tensor, bias: Tensor | None) -> tuple:
    return case.x, weight, bias, case.lora_As, case.lora_Bs, *case.choice()


@on_cpu
def test_scalings_that_require_grad_are_refused():
    case, weight, bias = random_call(12)
    case.scalings.requires_grad_()
    for function in (functional.lora_grouped_linear, torch.ops.lora_ext.lora_grouped_linear):
        with pytest.raises(RuntimeError, match="scalings requires grad, but the op computes no gradient of it; detach"):
            function(*arguments(case, weight, bias))


@on_cpu
def test_autocast_casts_as_a_linear_layer():
    case, weight, bias = random_call(12)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        y, expected = ours(case, weight, bias), F.linear(case.x, weight, bias)
        of_op = torch.ops.lora_ext.lora_grouped_linear(*arguments(case, weight, bias))
    functional.lora_grouped_(expected, case.x.bfloat16(), case.lora_As, case.lora_Bs, *case.choice())
    assert y.dtype == torch.bfloat16 and torch.equal(y, of_op)
    torch.testing.assert_close(y, expected, rtol=2e-2, atol=2e-2)


def test_inference_mode_and_tensors():
    case, weight, bias = random_call(5)
    expected = ours(case, weight, bias)
    with torch.inference_mode():
        assert torch.equal(ours(case, weight, bias), expected)
        case.x = case.x.clone()
    assert case.x.is_inference()
    assert torch.equal(ours(case, weight, bias), expected)


@on_cpu
def test_autocast_with_gradients():
    case, weight, bias = random_call(12)
    leaf = case.lora_Bs[0].requires_grad_()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        y = ours(case, weight, bias)
        expected = F.linear(case.x, weight, bias)
        functional.lora_grouped_(expected, case.x, case.lora_As, case.lora_Bs, *case.choice())
    assert y.dtype == torch.bfloat16 and torch.equal(y, expected)
    assert torch.equal(*(torch.autograd.grad(out, leaf, case.grad_y.bfloat16())[0] for out in (y, expected)))


@pytest.mark.parametrize("level", ["vmap", "jvp"])
def test_transforms(level):
    case, weight, bias = random_call(6, groups=torch.arange(6) % 4)

    def of_x(x: Tensor) -> Tensor:
        return ours(Grouped(**vars(case) | {"x": x}), weight, bias)

    if level == "vmap":
        xs = torch.stack([case.x, 2 * case.x])
        torch.testing.assert_close(torch.func.vmap(of_x)(xs), torch.stack([of_x(x) for x in xs]), rtol=1e-4, atol=1e-4)
        return
    tangent = torch.randn_like(case.x)
    y, along = torch.func.jvp(of_x, (case.x,), (tangent,))
    torch.testing.assert_close(y, of_x(case.x), rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(along, of_x(case.x + tangent) - y, rtol=1e-3, atol=1e-3)


def test_compiled_with_and_without_gradients():
    case, weight, bias = random_call(6)
    compiled = torch.compile(lambda x: functional.lora_grouped_linear(x, *arguments(case, weight, bias)[1:]))
    torch.testing.assert_close(compiled(case.x), ours(case, weight, bias), rtol=1e-5, atol=1e-5)
    x = case.x.clone().requires_grad_()
    (grad,) = torch.autograd.grad(compiled(x), x, case.grad_y)
    case.x = case.x.clone().requires_grad_()
    torch.testing.assert_close(grad, *torch.autograd.grad(plain(case, weight, bias), case.x, case.grad_y))


# --- refusals ---------------------------------------------------------------------------------------------------------

BAD = {
    "no entry": ({"lora_As": []}, "lora_As is empty, want at least one"),
    "in_features": ({"weight": torch.randn(20, 30)}, r"lora_As\[0\] has in_features=24 but weight has 30"),
    "out_features": ({"weight": torch.randn(21, 24)}, r"lora_Bs\[0\] has out_features=20 but weight has 21"),
    "x": ({"x": torch.randn(5, 25)}, "weight has in_features=24 but x has 25"),
    "dtype": ({"x": torch.randn(5, 24, dtype=torch.float64)}, "x is float64|x has dtype float64"),
    "bias": ({"bias": torch.randn(19)}, r"bias has shape \[19\], want \[20\]"),
    "bias's dtype": ({"bias": torch.randn(20).double()}, "bias has dtype float64"),
    "groups": ({"group_of_row": torch.zeros(4, dtype=torch.int64)}, r"group_of_row has shape \[4\]"),
    "a group": ({"group_of_row": torch.tensor([0, 1, 9, 0, -1])}, r"group_of_row\[2\] is 9"),
    "scalings": ({"scalings": torch.ones(3, dtype=torch.float64)}, r"scalings has shape \[3\], want \[2\]"),
}


@on_cpu
@pytest.mark.parametrize("trains", [False, True])
@pytest.mark.parametrize("name", BAD)
def test_refusals_name_the_argument(name, trains):
    change, text = BAD[name]
    case, weight, bias = random_call(5, (24, 20), entries=(4, 3))
    names = ("x", "weight", "bias", "lora_As", "lora_Bs", "group_of_row", "scalings", "ranks")
    call = dict(zip(names, arguments(case, weight, bias), strict=True)) | change
    if trains:
        call["lora_Bs"] = [B.requires_grad_() for B in call["lora_Bs"]]
    with pytest.raises((ValueError, TypeError), match=f"^lora_grouped_(linear)?: ({text})"):
        functional.lora_grouped_linear(**call)
