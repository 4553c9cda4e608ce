"""LoraMultiheadAttention against nn.MultiheadAttention with merged weights."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from support.attention import E, H, L, N, S, Wrapper, adapted, assert_same, inputs, merged_copy
from support.models import refused
from torch import Tensor, nn


@pytest.mark.pairs
@pytest.mark.parametrize("need_weights", [True, False])
@pytest.mark.parametrize("batched", [True, False])
@pytest.mark.parametrize("batch_first", [True, False])
@pytest.mark.parametrize(
    ("kind", "settings"),
    [
        ("self", {}),
        ("self", {"bias": False, "add_zero_attn": True}),
        ("memory", {"add_bias_kv": True}),
        ("memory", {"kdim": 7, "vdim": 7}),
        ("all", {"add_bias_kv": True, "add_zero_attn": True}),
        ("all", {"kdim": 7, "vdim": 5, "bias": False}),
        ("all", {"vdim": 9, "add_bias_kv": True}),
    ],
)
def test_equals_the_attention_with_merged_weights(kind, settings, batch_first, batched, need_weights):
    base = Wrapper(batch_first=batch_first, **settings)
    plain = copy.deepcopy(base)
    model = adapted(base)
    tensors = inputs(kind, batch_first, batched, settings.get("kdim", E), settings.get("vdim", E))
    assert (model(*tensors)[0] - plain(*tensors)[0]).abs().max() > 1e-2
    assert_same(model, merged_copy(model), tensors, need_weights=need_weights)
    if need_weights:
        assert_same(model, merged_copy(model), tensors, average_attn_weights=False)


def _masks(kind: str, batched: bool, length: int) -> dict[str, Any]:
    batch = N if batched else 1
    padding = torch.zeros((N, length) if batched else (length,), dtype=torch.bool)
    padding[..., -1] = True
    square = torch.randn(L, length, dtype=torch.float64)
    return {
        "2d": {"attn_mask": square},
        "2d bool": {"attn_mask": square > 1.0},
        "3d": {"attn_mask": torch.randn(batch * H, L, length, dtype=torch.float64)},
        "3d bool": {"attn_mask": torch.randn(batch * H, L, length) > 1.5},
        "padding": {"key_padding_mask": padding},
        "padding float": {"key_padding_mask": padding.double() * -2.0},
        "both": {"key_padding_mask": padding, "attn_mask": torch.randn(batch * H, L, length) > 1.5},
        "causal": {"attn_mask": torch.ones(L, length, dtype=torch.bool).triu(1), "is_causal": True},
        "causal padding": {
            "attn_mask": torch.ones(L, length, dtype=torch.bool).triu(1),
            "is_causal": True,
            "key_padding_mask": padding,
        },
    }[kind]


@pytest.mark.pairs
@pytest.mark.parametrize("need_weights", [True, False])
@pytest.mark.parametrize("batched", [True, False])
@pytest.mark.parametrize("settings", [{}, {"add_bias_kv": True, "add_zero_attn": True}])
@pytest.mark.parametrize(
    "kind", ["2d", "2d bool", "3d", "3d bool", "padding", "padding float", "both", "causal", "causal padding"]
)
def test_masks(kind, settings, batched, need_weights):
    model = adapted(Wrapper(batch_first=True, **settings))
    masks = _masks(kind, batched, L)
    assert_same(model, merged_copy(model), inputs("self", True, batched), need_weights=need_weights, **masks)
    if not kind.startswith("causal"):
        masks = _masks(kind, batched, S)
        assert_same(model, merged_copy(model), inputs("all", True, batched), need_weights=need_weights, **masks)


@pytest.mark.parametrize("need_weights", [True, False])
def test_attention_dropout_draws_the_same_mask(need_weights):
    model = adapted(Wrapper(dropout=0.5, batch_first=True)).train()
    x = inputs("self", True, True)
    assert_same(model, merged_copy(model), x, need_weights=need_weights)
    assert not torch.equal(model(*x)[0], model(*x)[0])


@pytest.mark.parametrize("settings", [{}, {"kdim": 7, "vdim": 5}])
def test_lora_dropout(settings):
    model = adapted(Wrapper(batch_first=True, **settings), lora_dropout=0.5).train()
    tensors = inputs("all" if settings else "self", True, True, *(settings.values() or (E, E)))
    exact = model.eval()(*tensors)[0]
    model.train()
    ys = torch.stack([model(*tensors)[0].detach() for _ in range(600)])
    assert ys.std(0).min() > 0
    # The softmax is not linear, so the mean is near, not equal.
    assert (ys.mean(0) - exact).abs().max() < 0.5 * (ys - exact).abs().max()


def test_separate_passes_read_shared_inputs_once(monkeypatch):
    from lora_ext import functional

    calls = []
    for name in ("lora_linear", "lora_linear_siblings"):
        op = getattr(functional, name)
        monkeypatch.setattr(functional, name, lambda *a, _op=op, _name=name: (calls.append(_name), _op(*a))[1])
    adapted(Wrapper())(*inputs("self", False, True))
    assert calls == ["lora_linear"] * 2  # query, key and value; out_proj
    calls.clear()
    adapted(Wrapper(kdim=7, vdim=7))(*inputs("memory", False, True, 7, 7))
    assert calls == ["lora_linear", "lora_linear_siblings", "lora_linear"]  # query; key and value; out_proj


# --- merging ----------------------------------------------------------------------------------------------------------


# --- bad input --------------------------------------------------------------------------------------------------------


class OwnForward(nn.MultiheadAttention):
    def forward(self, x: Tensor) -> Tensor:
        return x


def test_attention_that_cannot_be_adapted():
    for model, targets, fragment in (
        (nn.ModuleDict({"a": OwnForward(E, H)}), ["a"], "a (OwnForward): its forward is not nn.MultiheadAttention's"),
        (nn.ModuleDict({"a": OwnForward(E, H)}), ["out_proj"], "never calls it, and its forward is not"),
        (
            nn.MultiheadAttention(E, H),
            ["out_proj"],
            "out_proj (NonDynamicallyQuantizableLinear): nn.MultiheadAttention"
            " reads its weight and never calls it, and it is the model itself",
        ),
        (nn.ModuleDict({"a": nn.MultiheadAttention(E, H).to(torch.complex64)}), ["a"], "in_proj_weight is"),
    ):
        with refused(model, TypeError, fragment):
            adapted(model, targets)


@pytest.mark.parametrize(
    ("changes", "error", "text"),
    [
        ({"attn_mask": torch.zeros(L, S)}, ValueError, r"attn_mask has shape \[5, 4\], want \[5, 5\] or \[6, 5, 5\]"),
        ({"key_padding_mask": torch.zeros(L, N)}, ValueError, r"key_padding_mask has shape \[5, 2\], want \[2, 5\]"),
        ({"attn_mask": torch.zeros(L, L, dtype=torch.int64)}, TypeError, "attn_mask is torch.int64, want torch.bool"),
        ({"is_causal": True}, ValueError, "is_causal is a hint about attn_mask"),
        ({"key": torch.zeros(L, E)}, ValueError, r"key has shape \[5, 12\], want 2 or 3 dimensions, as many as query"),
        ({"value": torch.zeros(1, L, E)}, ValueError, "want one batch size, and one length of key and value"),
        ({"key": torch.zeros(1, L, E), "value": torch.zeros(1, L, E)}, ValueError, "want one batch size"),
        ({"query": torch.zeros(N, L, 7)}, ValueError, "in_features=12 but x has 7"),
        ({"query": torch.nested.nested_tensor([torch.zeros(2, E)])}, ValueError, "query is a nested tensor"),
    ],
)
def test_bad_inputs(changes, error, text):
    model = adapted(Wrapper(batch_first=True, dtype=torch.float32))
    x = torch.zeros(N, L, E)
    with pytest.raises(error, match=text):
        model(**{"query": x, "key": x, "value": x} | changes)
