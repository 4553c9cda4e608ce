"""Modules that hold an attention: inject adapts the attention in them."""

from __future__ import annotations

import copy

import pytest
import torch
from support.attention import E, L, N, S, Wrapper, adapted, assert_same, encoder, inputs, merged_copy
from support.models import refused
from torch import nn

from lora_ext import merge
from lora_ext.adapters import (
    adapter_status,
    delete_adapter,
    lora_modules,
    set_adapter,
)
from lora_ext.nn import LoraLinear, LoraMultiheadAttention


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("targets", [["self_attn"], ["out_proj"], "all-linear"])
def test_encoder_layers_call_the_adapted_attention(targets, training):
    base = encoder().train(training)
    x, padding = torch.randn(N, L, E, dtype=torch.float64), torch.zeros(N, L, dtype=torch.bool)
    model = adapted(copy.deepcopy(base), targets)
    kinds = {path: type(layer) for path, layer in lora_modules(model) if "self_attn" in path}
    wanted = {"layers.0.self_attn": LoraMultiheadAttention, "layers.0.self_attn.base_layer.out_proj": LoraLinear}
    assert {path: kind for path, kind in kinds.items() if path.startswith("layers.0")} == wanted
    held = {status.layer for status in adapter_status(model) if status.layer.startswith("layers.0.self")}
    assert held == wanted.keys() - ({"layers.0.self_attn"} if targets != ["self_attn"] else set())
    with torch.no_grad():
        exact = merged_copy(model)(x)
        assert (exact - base(x)).abs().max() > 1e-2
        torch.testing.assert_close(model(x), exact)
        torch.testing.assert_close(model(x, src_key_padding_mask=padding), exact)
        merge(model.eval())
        torch.testing.assert_close(model(x), exact)


def test_decoder_layers():
    layer = nn.TransformerDecoderLayer(E, 2, 16, dropout=0.0, batch_first=True, dtype=torch.float64)
    model = adapted(layer, ["self_attn", "multihead_attn"])
    x, memory = (torch.randn(N, length, E, dtype=torch.float64) for length in (L, S))
    mask = nn.Transformer.generate_square_subsequent_mask(L, dtype=torch.float64)
    kwargs = {"tgt_mask": mask, "tgt_is_causal": True}
    torch.testing.assert_close(model(x, memory, **kwargs), merged_copy(model)(x, memory, **kwargs))


def test_the_attention_stays_wrapped_until_its_last_adapter_goes():
    model = adapted(Wrapper(), name="a")
    adapted(model, ["out_proj"], name="b")
    delete_adapter(model, "a")
    assert isinstance(model.attention, LoraMultiheadAttention) and not model.attention.adapters
    x = inputs("self", False, True)
    assert_same(model, merged_copy(model), x)
    adapted(model, name="c")
    delete_adapter(model, "b")
    set_adapter(model, [])
    delete_adapter(model, "c")
    assert type(model.attention) is nn.MultiheadAttention and type(model.attention.out_proj) is not LoraLinear


def test_adding_an_adapter_leaves_the_others_trainable():
    model = adapted(Wrapper(), name="a")
    adapted(model, name="b")
    set_adapter(model, ["a", "b"])
    flags = {name: p.requires_grad for name, p in model.named_parameters()}
    assert all(flag == ("adapters" in name) for name, flag in flags.items())


def test_an_out_proj_trained_in_full_is_not_adapted():
    model = adapted(Wrapper(), modules_to_save=["out_proj"])
    assert [path for path, _ in lora_modules(model)] == ["attention"]
    x = inputs("self", False, True)
    with torch.no_grad():
        model.attention.out_proj.adapters.default.bias.add_(1.0)
    assert (model(*x)[0] - merged_copy(model)(*x)[0]).abs().max() > 0.5  # merged_copy has the original out_proj


@pytest.mark.parametrize("separate", [False, True])
@pytest.mark.parametrize("batch_first", [False, True])
def test_hooks_of_an_attention(separate, batch_first):
    sizes = {"kdim": 6, "vdim": 10} if separate else {}
    base = nn.MultiheadAttention(8, 2, batch_first=batch_first, **sizes)
    model, seen = adapted(nn.ModuleDict({"layer": base}), ["layer"]), []
    query, key, value = torch.randn(3, 5, 8), torch.randn(3, 5, sizes.get("kdim", 8)), torch.randn(3, 5, 8)
    value = torch.randn(3, 5, 10) if separate else value
    expected = model.layer(query, key, value)
    grads = torch.autograd.grad(expected[0].sum(), [p for p in model.parameters() if p.requires_grad])
    model.layer.base_layer.register_forward_hook(lambda *args: seen.append(args[0]))
    y = model.layer(query, key, value)
    torch.testing.assert_close(y, expected)
    again = torch.autograd.grad(y[0].sum(), [p for p in model.parameters() if p.requires_grad])
    torch.testing.assert_close(again, grads)
    assert seen == [model.layer.base_layer]
    with refused(model, ValueError, "layer: its hooks may change what it computes"):
        merge(model)


def test_hooks_of_an_attention_leave_no_room_for_dropout():
    model = adapted(nn.ModuleDict({"layer": nn.MultiheadAttention(8, 2)}), ["layer"], lora_dropout=0.5)
    x = torch.randn(3, 5, 8)
    model.layer.base_layer.register_forward_hook(lambda *args: None)
    with pytest.raises(RuntimeError, match=r"has hooks or a replaced forward.*lora_dropout=0"):
        model.layer(x, x, x)
    model.eval().layer(x, x, x)
