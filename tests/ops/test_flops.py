"""FlopCounterMode counts every op, and an injected model as PEFT's."""

from __future__ import annotations

import copy

import peft
import pytest
import torch
from support.models import llama
from support.op_table import HAVE_KERNELS, REGISTERED, good_call, linear, op_named
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from torch.utils.flop_counter import FlopCounterMode, flop_registry

from lora_ext import LoraConfig, functional, inject

# lora_shrink and lora_expand, for the ranks, widths and tokens of support.op_table: 6 tokens, 24 -> 20 (and 12).
A, B, BASE = 2 * 6 * 24 * 4, 2 * 6 * 4 * 20, 2 * 6 * 24 * 20
SIBLING_A, SIBLING_B, SIBLING_BASE = 2 * 6 * 24 * 3, 2 * 6 * 3 * 12, 2 * 6 * 24 * 12
COUNTS = {
    "lora_linear": BASE + A + B,
    "lora_linear_backward": BASE + 2 * A + 2 * B,
    "lora_linear_siblings": BASE + A + B + SIBLING_BASE + SIBLING_A + SIBLING_B,
    "lora_linear_siblings_backward": BASE + 2 * A + 2 * B + SIBLING_BASE + 2 * SIBLING_A + 2 * SIBLING_B,
    "lora_delta_": A + B,
    "lora_grouped_": A + B,
    "lora_grouped_linear": BASE + A + B,
    "lora_grouped_backward": 2 * A + 2 * B,
    "lora_shrink": A,
    "lora_shrink_backward": 2 * A,
    "lora_expand": B,
    "lora_expand_backward": 2 * B,
    "lora_dropout_mask": 0,
}


def count(function) -> int:
    with FlopCounterMode(display=False) as counter:
        function()
    return counter.get_total_flops()


@pytest.mark.parametrize("name", REGISTERED)
def test_every_op_has_a_formula(name):
    assert getattr(torch.ops.lora_ext, name) in flop_registry, f"register {name} by lora_ext/_ops/registration.py"


@pytest.mark.parametrize("name", COUNTS)
def test_counts(name):
    call = good_call(name)
    assert count(lambda: op_named(name)(**call)) == COUNTS[name]


@pytest.mark.parametrize("name", [name for name in HAVE_KERNELS if "merge" in name])
def test_merges_count_their_products(name):
    call = good_call(name)
    products = zip(call["lora_As"], call["lora_Bs"], strict=True)
    assert count(lambda: op_named(name)(**call)) == sum(2 * B.shape[0] * B.shape[1] * A.shape[1] for A, B in products)


@pytest.mark.parametrize("wanted", ["x", "lora_A", "lora_B"])
def test_gradients_that_nobody_wants_do_not_count(wanted):
    call = linear().call
    call[wanted].requires_grad_()
    y = functional.lora_linear(**call)
    expected = {"x": BASE + A + B, "lora_A": A + B, "lora_B": B}
    assert count(lambda: y.sum().backward()) == expected[wanted]


def pair(model: nn.Module, **options) -> tuple[nn.Module, nn.Module]:
    options = {"r": 4, "lora_alpha": 6, "lora_dropout": 0.1} | options
    ours = inject(copy.deepcopy(model), LoraConfig(**options))
    return ours, peft.get_peft_model(model, peft.LoraConfig(**options))


@pytest.mark.parametrize("checkpoints", [False, True], ids=["", "checkpoint"])
def test_an_injected_model_counts_as_peft_s(checkpoints):
    ids = torch.randint(50, (2, 9))

    def step(model: nn.Module) -> Tensor:
        logits = checkpoint(lambda ids: model(input_ids=ids).logits, ids, use_reentrant=False)
        (logits if checkpoints else model(input_ids=ids).logits).sum().backward()

    ours, theirs = pair(llama(), target_modules=["q_proj", "v_proj", "down_proj"])
    base = count(lambda: llama()(input_ids=ids))
    counts = [count(lambda m=m: m(input_ids=ids)) for m in (ours, theirs)]
    assert counts[0] == counts[1] > base
    counts = [count(lambda m=m: step(m)) for m in (ours, theirs)]
    assert counts[0] == counts[1] > 2 * base
