"""The product by a frozen weight: F.linear to rounding, by our kernels where nobody can tell."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
import torch.nn.functional as F
from support.models import llama, shaken, token_ids
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from lora_ext import LoraConfig, _load, inject
from lora_ext._ops import grouped
from lora_ext.nn import base_product

pytestmark = pytest.mark.cpu_only("the kernel is the CPU's")


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> list[tuple[int, ...]]:
    """Shapes of x in calls of lora_grouped_linear that reach its kernel; weights of any size count as large."""
    shapes, op = [], grouped.lora_grouped_linear

    def counted(x: Tensor, *arguments: object) -> Tensor:
        y = op(x, *arguments)
        if not y.requires_grad:
            shapes.append(tuple(x.shape))
        return y

    monkeypatch.setattr(grouped, "lora_grouped_linear", counted)
    monkeypatch.setattr(base_product, "LEAST_ELEMENTS", 0)
    return shapes


@pytest.mark.pairs
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
@pytest.mark.parametrize("leading", [(1,), (8,), (2, 4), (9,), (32,), (33,), (0,), (), (64,), (3, 40)])
@pytest.mark.parametrize("has_bias", [True, False])
def test_product(dtype, leading, has_bias, calls):
    shape = (*leading, 65)
    x, weight = torch.randn(shape).to(dtype), torch.randn(37, 65).to(dtype)
    bias = torch.randn(37).to(dtype) if has_bias else None
    y = base_product.product(x, weight, bias)
    exact = F.linear(x.double(), weight.double(), None if bias is None else bias.double())
    theirs = (F.linear(x, weight, bias) - exact).abs().amax() if y.numel() else 0.0
    assert y.dtype == dtype and y.shape == exact.shape
    assert not y.numel() or (y - exact).abs().amax() <= 2 * theirs + 1e-5
    tokens = x.numel() // 65
    many = tokens >= 33 and base_product.multiplies_many_tokens(dtype)
    assert calls == ([shape] if tokens <= base_product.few_tokens(dtype) or many else [])


@pytest.fixture
def fresh_choice() -> Iterator[None]:
    choices = base_product.few_tokens, base_product.multiplies_many_tokens
    for choice in choices:
        choice.cache_clear()
    yield
    for choice in choices:
        choice.cache_clear()


@pytest.mark.parametrize(
    "own, isa, number",
    [("own", "avx512_bf16", 2), ("own", "avx512", 1), ("library", "amx", 0), ("library", "generic", 0)],
)
@pytest.mark.usefixtures("fresh_choice")
def test_which_products_take_the_kernel_on_which_machine(calls, monkeypatch, own, isa, number):
    monkeypatch.setattr(_load, "base_product", lambda: own)
    monkeypatch.setattr(_load, "cpu_isa", lambda: isa)
    for dtype in (torch.float64, torch.float32, torch.bfloat16, torch.float16):
        base_product.product(torch.randn(64, 65).to(dtype), torch.randn(37, 65).to(dtype), None)
    assert len(calls) == number
    assert base_product.few_tokens(torch.bfloat16) == _load.few_tokens("bfloat16")
    assert base_product.few_tokens(torch.float32) == 32
    assert base_product.few_tokens(torch.float16) == base_product.few_tokens(torch.float64) == 0


def test_whoever_could_tell_the_difference_gets_pytorchs(calls, monkeypatch):
    x, weight, bias = torch.randn(4, 65), torch.randn(37, 65), torch.randn(37)
    base_product.product(x, weight.t().contiguous().t(), bias)
    base_product.product(x.requires_grad_(), weight, bias).sum().backward()
    assert x.grad is not None
    base_product.product(x.detach(), weight, bias.requires_grad_())
    with FlopCounterMode(display=False) as counter:
        base_product.product(x.detach(), weight, bias.detach())
    assert counter.get_total_flops() == 2 * 4 * 65 * 37
    with torch.autocast("cpu", torch.bfloat16):
        assert base_product.product(x.detach(), weight, bias.detach()).dtype == torch.bfloat16
    torch.func.vmap(lambda row: base_product.product(row, weight, bias.detach()))(x.detach())
    assert calls == []
    with torch.no_grad():
        base_product.product(x, weight, bias)
        assert calls == [(4, 65)]
        monkeypatch.setattr(base_product, "LEAST_ELEMENTS", 37 * 65 + 1)  # a small weight
        base_product.product(x, weight, bias)
    assert calls == [(4, 65)]


def test_rows_of_a_model(calls):
    model, ids = llama(), token_ids(4)
    for name in ("a", "b"):
        inject(model, LoraConfig(r=2, target_modules=["q_proj", "down_proj"], init_lora_weights=False), name)
    shaken(model).eval()
    names = ["a", "__base__", "b", "a"]
    expected = model(ids[:, :2], adapter_names=names).logits
    assert not calls
    with torch.no_grad():
        y = model(ids[:, :2], adapter_names=names).logits
    assert len(calls) == 2 * model.config.num_hidden_layers
    torch.testing.assert_close(y, expected.detach())
