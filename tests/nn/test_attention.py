"""LoraMultiheadAttention against nn.MultiheadAttention with merged weights."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from support.attention import E, H, L, N, S, Wrapper, adapted, assert_same, inputs, merged_copy
from support.merging import same_bits
from support.models import refused
from torch import Tensor, nn

from lora_ext import merge, unmerge
from lora_ext.adapters import (
    disable_adapters,
    lora_modules,
    merge_and_unload,
    set_adapter,
    unload,
)


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


@pytest.mark.parametrize("settings", [{}, {"kdim": 7, "vdim": 7}])
@pytest.mark.parametrize("lora_bias", [False, True])
def test_gradients_of_the_factors(settings, lora_bias):
    model = adapted(Wrapper(batch_first=True, **settings), lora_bias=lora_bias)
    tensors = inputs("memory", True, True, kdim=settings.get("kdim", E))
    trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
    assert len(trained) == (2 + lora_bias) * (4 if settings else 2)

    def loss(*values: Tensor) -> Tensor:
        out = torch.func.functional_call(model, dict(zip(trained, values, strict=True)), tensors)
        return out[0].sum(), out[1].square().sum()

    assert torch.autograd.gradcheck(loss, tuple(trained.values()))


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
    assert calls == ["lora_linear_siblings"] * 2 + ["lora_linear"]


def test_frozen_weights_are_not_touched():
    model = adapted(Wrapper(dtype=torch.bfloat16))
    before = {name: (p.clone(), p._version) for name, p in model.attention.base_layer.named_parameters()}
    x = torch.randn(L, N, E, dtype=torch.bfloat16, requires_grad=True)
    model(x, x, x)[0].sum().backward()
    for name, parameter in model.attention.base_layer.named_parameters():
        value, version = before[name]
        assert same_bits(parameter, value) and parameter._version == version
    assert {n for n, p in model.named_parameters() if p.grad is not None} == {
        n for n, p in model.named_parameters() if "adapters" in n
    }


@pytest.mark.parametrize("settings", [{}, {"kdim": 7, "vdim": 5}])
def test_several_adapters(settings):
    model = adapted(Wrapper(**settings), name="a")
    adapted(model, name="b", r=3, lora_bias=True)
    adapted(model, ["out_proj"], name="c")
    tensors = inputs("all" if settings else "self", False, True, *(settings.values() or (E, E)))
    outputs = []
    for names in (["a"], ["b"], ["a", "b", "c"], ["c"], []):
        set_adapter(model, names)
        assert_same(model, merged_copy(model), tensors)
        outputs.append(model(*tensors)[0])
    assert len({tuple(y.flatten().tolist()) for y in outputs}) == 5
    with disable_adapters(model):
        assert torch.equal(model(*tensors)[0], outputs[-1])


@pytest.mark.parametrize("settings", [{}, {"kdim": 7, "vdim": 7}])
def test_compiles(settings):
    model = adapted(Wrapper(dtype=torch.float32, batch_first=True, **settings))
    x, memory = torch.randn(N, L, E), torch.randn(N, S, settings.get("kdim", E))
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    torch.testing.assert_close(compiled(x, memory, memory), model(x, memory, memory))


# --- merging ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("settings", [{}, {"kdim": 7, "vdim": 5}])
def test_merge_and_unmerge(settings):
    model = adapted(Wrapper(batch_first=True, dtype=torch.bfloat16, **settings), lora_bias=True).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_bias" in name:
                parameter.normal_()
    x = [torch.randn(N, L, features, dtype=torch.bfloat16) for features in (E, *(settings.values() or (E, E)))]
    pristine = {name: p.clone() for name, p in model.named_parameters()}
    exact = model.double()(*(t.double() for t in x))[0]
    model.bfloat16()
    merge(model)
    assert not same_bits(
        model.attention.weight,
        pristine["attention.base_layer.in_proj_weight" if not settings else "attention.base_layer.q_proj_weight"],
    )
    assert not same_bits(model.attention.bias, pristine["attention.base_layer.in_proj_bias"])
    torch.testing.assert_close(model(*x)[0].double(), exact, rtol=0.1, atol=0.1)
    with pytest.raises(RuntimeError, match="is merged and would not train"):
        model.train()(*x)
    unmerge(model.eval())
    for name, parameter in model.named_parameters():
        if "base_layer" in name and "adapters" not in name:
            assert same_bits(parameter, pristine[name]), name
    plain = merged_copy(model.double())
    merge_and_unload(model)
    assert type(model.attention) is nn.MultiheadAttention and not any(lora_modules(model))
    for ours, theirs in zip(model.parameters(), plain.parameters(), strict=True):
        torch.testing.assert_close(ours, theirs)


def test_deepcopy_and_unload():
    model = adapted(Wrapper())
    before = copy.deepcopy(model)
    x = inputs("self", False, True)
    torch.testing.assert_close(before(*x), model(*x))
    base = model.attention.base_layer
    unload(model)
    assert model.attention is base and type(base.out_proj).__name__ == "NonDynamicallyQuantizableLinear"
    assert any(lora_modules(before))


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
