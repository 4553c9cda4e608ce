"""The product of few tokens: F.linear to rounding, by lora_linear's kernel where nobody can tell the difference."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from support.models import llama, shaken, token_ids
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from lora_ext import LoraConfig, functional, inject
from lora_ext.nn import few_tokens

pytestmark = pytest.mark.cpu_only("the kernel is the CPU's")


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> list[tuple[int, ...]]:
    """Shapes of x in calls of lora_linear; weights of any size count as large."""
    shapes, op = [], functional.lora_linear

    def counted(x: Tensor, *arguments: object) -> Tensor:
        shapes.append(tuple(x.shape))
        return op(x, *arguments)

    monkeypatch.setattr(functional, "lora_linear", counted)
    monkeypatch.setattr(few_tokens, "LEAST_ELEMENTS", 0)
    return shapes


@pytest.mark.pairs
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
@pytest.mark.parametrize("shape", [(1, 65), (8, 65), (2, 4, 65), (9, 65), (32, 65), (33, 65), (0, 65), (65,)])
@pytest.mark.parametrize("has_bias", [True, False])
def test_product(dtype, shape, has_bias, calls):
    x, weight = torch.randn(shape).to(dtype), torch.randn(37, 65).to(dtype)
    bias = torch.randn(37).to(dtype) if has_bias else None
    y = few_tokens.product(x, weight, bias)
    exact = F.linear(x.double(), weight.double(), None if bias is None else bias.double())
    theirs = (F.linear(x, weight, bias) - exact).abs().amax() if y.numel() else 0.0
    assert y.dtype == dtype and y.shape == exact.shape
    assert not y.numel() or (y - exact).abs().amax() <= 2 * theirs + 1e-5
    most = few_tokens.MOST_TOKENS.get(dtype, 0)
    assert calls == ([shape] if x.numel() <= most * 65 else [])


def test_whoever_could_tell_the_difference_gets_pytorchs(calls):
    x, weight, bias = torch.randn(4, 65), torch.randn(37, 65), torch.randn(37)
    few_tokens.product(x, weight.t().contiguous().t(), bias)
    few_tokens.product(x.requires_grad_(), weight, bias).sum().backward()
    assert x.grad is not None
    few_tokens.product(x.detach(), weight, bias.requires_grad_())
    with FlopCounterMode(display=False) as counter:
        few_tokens.product(x.detach(), weight, bias.detach())
    assert counter.get_total_flops() == 2 * 4 * 65 * 37
    with torch.autocast("cpu", torch.bfloat16):
        assert few_tokens.product(x.detach(), weight, bias.detach()).dtype == torch.bfloat16
    torch.func.vmap(lambda row: few_tokens.product(row, weight, bias.detach()))(x.detach())
    assert calls == []
    with torch.no_grad():
        few_tokens.product(x, weight, bias)
    assert calls == [(4, 65)]


def test_small_weights_keep_pytorchs(calls, monkeypatch):
    monkeypatch.setattr(few_tokens, "LEAST_ELEMENTS", 37 * 65 + 1)
    few_tokens.product(torch.randn(4, 65), torch.randn(37, 65), None)
    assert calls == []


def test_rows_of_a_model(calls):
    model, ids = llama(), token_ids(4)
    for name in ("a", "b"):
        inject(model, LoraConfig(r=2, target_modules=["q_proj", "down_proj"], init_lora_weights=False), name)
    shaken(model).eval()
    names = ["a", "__base__", "b", "a"]
    expected = model(ids[:, :2], adapter_names=names).logits
    assert len(calls) == 1  # the first layer, whose input needs no gradient
    calls.clear()
    with torch.no_grad():
        y = model(ids[:, :2], adapter_names=names).logits
    assert len(calls) == 2 * model.config.num_hidden_layers
    torch.testing.assert_close(y, expected.detach())
