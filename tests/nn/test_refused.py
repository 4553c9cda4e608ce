"""Modules that inject cannot adapt: the error names the module and the reason, and nothing has changed."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import pytest
import torch
from support.attention import E, H
from support.models import refused
from support.small_nets import ConvNet, TextNet
from torch import Tensor, nn
from transformers import Llama4TextConfig
from transformers.models.llama4.modeling_llama4 import Llama4Router

from lora_ext import LoraConfig, inject


class Positions(nn.Embedding):
    def forward(self, ids: Tensor) -> Tensor:
        return super().forward(ids + 2)


class OwnForward(nn.MultiheadAttention):
    def forward(self, x: Tensor) -> Tensor:
        return x


class Experts(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.up = nn.Parameter(torch.randn(3, 10, 6))
        self.shift = nn.Parameter(torch.randn(6))
        self.count = nn.Parameter(torch.ones(2, 2, dtype=torch.int8), requires_grad=False)
        self.attention = nn.MultiheadAttention(4, 2)


class Case(NamedTuple):
    make: Callable[[], nn.Module]
    fragments: tuple[str, ...]
    error: type[Exception]
    options: dict[str, Any]


def case(make: Callable[[], nn.Module], *fragments: str, error: type[Exception] = TypeError, **options: Any) -> Case:
    return Case(make, fragments, error, {"r": 2, "target_modules": ["a"]} | options)


def one(kind: Callable[..., nn.Module], *sizes: int, **settings: Any) -> Callable[[], nn.Module]:
    """A model with a layer ``a``."""
    return lambda: nn.ModuleDict({"a": kind(*sizes, **settings), "other": nn.Linear(3, 3)})


def rows(layer: nn.Module, *fragments: str, tokens: tuple[int, ...] = (7, 0, 31), **more: Any) -> Case:
    def make() -> nn.Module:
        model = TextNet()
        model.tokens = layer
        return model

    options = {"target_modules": ["head"], "trainable_token_indices": {"tokens": tokens}}
    return case(make, "inject: ", "trainable_token_indices", *fragments, **options | more)


def dora(make: Callable[[], nn.Module], text: str = "", **options: Any) -> Case:
    return case(make, text, "use_dora supports only an nn.Linear or Conv1D", use_dora=True, **options)


def packed(make: Callable[[], nn.Module], text: str, *parts: bool, **more: Any) -> Case:
    return case(make, text, enable_lora={"a": parts or (True, False)}, **more)


OUT_PROJ = "nn.MultiheadAttention reads its weight and never calls it"
BY_WEIGHTS = "name its weights in target_parameters"
ATTENTION = (nn.MultiheadAttention, E, H)
LLAMA4 = Llama4TextConfig(hidden_size=6, num_local_experts=4, num_experts_per_tok=1)
CASES = {
    "parametrized": case(
        lambda: nn.ModuleDict({"a": nn.utils.parametrizations.weight_norm(nn.Conv2d(6, 8, 3))}),
        "a (ParametrizedConv2d): its weight is computed by a parametrization; remove that first",
    ),
    "transposed": case(
        one(nn.ConvTranspose2d, 6, 8, 3),
        "a (ConvTranspose2d): no LoRA layer adapts ConvTranspose2d",
        "nn.Conv1d, nn.Conv2d or nn.Conv3d",
    ),
    "rank of groups": case(
        lambda: ConvNet("1d grouped"),
        "the rank 3 of 'conv' is not a multiple of its groups=2; choose another rank (rank_pattern)",
        error=ValueError,
        target_modules=["head", "conv"],
        rank_pattern={"conv": 3},
    ),
    "max_norm": case(one(nn.Embedding, 9, 8, max_norm=1.0), "a (Embedding): it has max_norm, which changes the frozen"),
    "positions": case(one(Positions, 12, 8), "a (Positions): its forward is not nn.Embedding's"),
    "biased embedding": case(one(nn.Embedding, 9, 8), "adapter has no bias; set lora_bias=False", lora_bias=True),
    "bag": case(one(nn.EmbeddingBag, 9, 8), "a (EmbeddingBag): no LoRA layer adapts EmbeddingBag", "an nn.Embedding"),
    "no tokens": rows(nn.Embedding(50, 8), "tokens: trainable_token_indices names none of its tokens", tokens=()),
    "rows, max_norm": rows(nn.Embedding(50, 8, max_norm=1.0), "tokens (Embedding)", "train its rows: it has max_norm"),
    "rows, frequencies": rows(nn.Embedding(50, 8, scale_grad_by_freq=True), "it has scale_grad_by_freq"),
    "rows of a bag": rows(nn.EmbeddingBag(50, 8), "tokens (EmbeddingBag)", "rows: want an nn.Embedding or nn.Linear"),
    "unknown rows": rows(nn.Embedding(31, 8), "the tokens [31], but it has 31", "resize the embedding first"),
    "attention": case(one(OwnForward, E, H), "a (OwnForward): its forward is not nn.MultiheadAttention's"),
    "its out_proj": case(one(OwnForward, E, H), "never calls it, and its forward is not", target_modules=["out_proj"]),
    "vdim": case(one(*ATTENTION, vdim=5), BY_WEIGHTS),
    "add_bias_kv": case(one(*ATTENTION, add_bias_kv=True), BY_WEIGHTS),
    "add_zero_attn": case(one(*ATTENTION, add_zero_attn=True), BY_WEIGHTS),
    "complex": case(one(*ATTENTION, dtype=torch.complex64), "in_proj_weight is torch.complex64"),
    "an attention alone": case(
        lambda: nn.MultiheadAttention(E, H), f"{OUT_PROJ}, and it is the model itself", target_modules=["out_proj"]
    ),
    "parameters": case(
        one(Experts),
        "a.shift: its shift has 1 dimensions, want 2, or 3 with the experts first",
        "a.count: its count is torch.int8",
        "a.attention.out_proj.weight: nn.MultiheadAttention reads it and never calls its module; name",
        target_parameters=["a.shift", "a.up", "a.count", "out_proj.weight"],
        target_modules=[],
    ),
    "no such parameter": case(
        one(Experts), "a.upp", "close matches: 'a.up'", error=ValueError, target_parameters=["a.upp"], target_modules=[]
    ),
    "router": case(one(Llama4Router, LLAMA4), "(Llama4Router): its forward returns a tuple", "in target_parameters"),
    "dora, embedding": dora(one(nn.Embedding, 5, 6)),
    "dora, convolution": dora(one(nn.Conv2d, 2, 3, 3)),
    "dora, attention": dora(one(*ATTENTION)),
    "dora, out_proj": dora(one(*ATTENTION), OUT_PROJ, target_modules=["out_proj"]),
    "packed embedding": packed(
        one(nn.Embedding, 5, 6), "a (Embedding): enable_lora names it, but supports only an nn."
    ),
    "parts": packed(
        one(nn.Linear, 9, 12), "has 5 parts, want a divisor of out_features=12", *[True] * 5, error=ValueError
    ),
    "packed, biased": packed(
        one(nn.Linear, 9, 12), "but enable_lora adapts parts only; remove one of them", error=ValueError, lora_bias=True
    ),
}


@pytest.mark.parametrize("name", CASES)
def test_modules_that_cannot_be_adapted(name):
    make, fragments, error, options = CASES[name]
    model = make()
    with refused(model, error, *fragments):
        inject(model, LoraConfig(**options))


PARTS = {"enable_lora": {"a": (True, False, True)}}
PARAMETER = {"target_modules": [], "target_parameters": ["a.weight"]}


@pytest.mark.parametrize(
    ("first", "second", "text"),
    [
        (PARTS, {"enable_lora": {"a": (True, False)}}, "in a LoraPackedLinear, which the new one cannot join"),
        (PARTS, {}, "in a LoraPackedLinear, which"),
        ({}, PARTS, "in a LoraLinear, which"),
        ({"use_dora": True}, {}, "in a DoraLinear, which"),
        ({}, {"use_dora": True}, "in a LoraLinear, which"),
        (PARAMETER, {}, "in a LoraParameter, which"),
        ({}, PARAMETER, "in a LoraLinear, which"),
    ],
)
def test_adapters_of_one_layer_are_of_one_kind(first, second, text):
    model = inject(one(nn.Linear, 9, 12)(), LoraConfig(**{"target_modules": ["a"]} | first))
    with refused(model, ValueError, f"'a' has adapters (['default']) {text}"):
        inject(model, LoraConfig(**{"target_modules": ["a"]} | second), "b")
