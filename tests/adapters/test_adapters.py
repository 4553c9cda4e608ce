"""Merging, unloading and disabling the adapters of a model, and their errors."""

from __future__ import annotations

import pytest
import torch
from support.models import Net, llama, refused, token_ids
from torch import nn

from lora_ext import LoraConfig, inject, merge, unmerge
from lora_ext.adapters import lora_modules, merge_and_unload, trainable_parameter_counts

ALIVE = {"r": 2, "lora_alpha": 8, "init_lora_weights": False}


def net(dtype: torch.dtype = torch.float32, **settings) -> Net:
    return inject(Net().eval().to(dtype), LoraConfig(**{"target_modules": ["up", "down"]} | ALIVE | settings))


def weights(model: nn.Module) -> list[torch.Tensor]:
    return [layer.weight.clone() for _, layer in lora_modules(model)]


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_merge_and_unmerge_keep_the_output(dtype):
    model = net(dtype)
    x = torch.randn(5, 6, dtype=dtype)
    expected, before = model(x), weights(model)
    assert merge(model) is model
    torch.testing.assert_close(model(x), expected)
    for (_, layer), weight in zip(lora_modules(model), before, strict=True):
        assert layer.is_merged
        torch.testing.assert_close(layer.weight, weight + layer.delta_weight())
    assert unmerge(model) is model
    assert all(map(torch.equal, weights(model), before))
    torch.testing.assert_close(model(x), expected, rtol=0, atol=0)


@pytest.mark.parametrize("merged", [False, True])
def test_merge_and_unload_gives_the_plain_model(merged):
    model = net(modules_to_save=["head"])
    x = torch.randn(5, 6)
    expected = model(x)
    if merged:
        merge(model)
    assert merge_and_unload(model) is model
    torch.testing.assert_close(model(x), expected)
    plain = Net()
    assert [(path, type(module)) for path, module in model.named_modules()] == [
        (path, type(module)) for path, module in plain.named_modules()
    ]
    assert model.state_dict().keys() == plain.state_dict().keys()
    assert sorted(vars(model)) == sorted(vars(plain))
    assert {path for path, p in model.named_parameters() if p.requires_grad} == {"head.weight", "head.bias"}
    inject(model, LoraConfig(target_modules=["up"]))  # and again


@pytest.mark.cpu_only("a default device switches the encoder's fast path off")
def test_unloading_switches_the_encoder_fast_path_on_again():
    layer = nn.TransformerEncoderLayer(8, 2, 12, dropout=0.0, batch_first=True)
    model = nn.TransformerEncoder(layer, 2).eval()
    inject(model, LoraConfig(target_modules=["linear1"], **ALIVE))
    x, mask = torch.randn(2, 5, 8), torch.tensor([[False] * 5, [False] * 3 + [True] * 2])
    with torch.no_grad():
        expected = model(x, src_key_padding_mask=mask)
        assert (expected[mask] != 0).all()
        actual = merge_and_unload(model)(x, src_key_padding_mask=mask)
    assert (actual[mask] == 0).all()  # only the fast path zeroes padded positions
    torch.testing.assert_close(actual[~mask], expected[~mask])


def test_a_part_of_a_model_can_be_injected_and_the_whole_unloaded():
    model = Net()
    inject(model.blocks, LoraConfig(target_modules=["up"]))
    merge_and_unload(model)
    assert not list(lora_modules(model))
    inject(model.blocks, LoraConfig(target_modules=["up"]))


def test_counts():
    model = net(modules_to_save=["head"])
    adapter = 2 * (2 * (6 + 10) + 2 * (10 + 6))
    head = 6 * 3 + 3
    assert trainable_parameter_counts(model) == (
        adapter + head,
        sum(p.numel() for p in Net().parameters()) + adapter + head,
    )
    tied = llama(tied=True)
    assert trainable_parameter_counts(tied)[1] == tied.num_parameters()


# --- bad input --------------------------------------------------------------------------------------------------------


def test_partly_merged():
    model = net()
    model.blocks[1].up.merge()
    with refused(model, RuntimeError, "merge: adapters are already merged into 'blocks.1.up'"):
        merge(model)
    unmerge(model)
    assert not any(layer.is_merged for _, layer in lora_modules(model))


def test_a_tied_weight_is_not_merged():
    model = inject(llama(tied=True).eval(), LoraConfig(target_modules=["q_proj", "lm_head"], **ALIVE))
    text = "the weight of 'lm_head' is shared with 'model.embed_tokens', which would change too"
    with refused(model, ValueError, text):
        merge(model)
    ids = token_ids()
    expected = model(input_ids=ids).logits
    model.lm_head.base_layer.weight = nn.Parameter(model.lm_head.weight.detach().clone())  # the remedy in the message
    torch.testing.assert_close(merge(model)(input_ids=ids).logits, expected)


def test_a_failure_midway_unmerges_what_was_merged():
    model = net()
    before = weights(model)
    # The op refuses this shape; merge() does not check it.
    model.blocks[1].down.adapters["default"].lora_A = nn.Parameter(torch.zeros(2, 11))
    with pytest.raises(ValueError, match="lora_A has in_features=11 but weight has 10"):
        merge(model)
    assert not any(layer.is_merged for _, layer in lora_modules(model))
    torch.testing.assert_close(weights(model), before)
