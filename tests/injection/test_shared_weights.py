"""Modules that share one weight: adapters and trained copies of one of them, or of both, as in PEFT."""

from __future__ import annotations

import copy
import warnings

import peft
import pytest
import torch
import transformers
from support.models import answer, llama, refused, shaken
from torch import nn

from lora_ext import LoraConfig, inject, load_adapter, merge
from lora_ext.adapters import disable_adapters, merge_and_unload, unload


def tied_llama(*targets: str, **settings) -> nn.Module:
    config = LoraConfig(r=2, target_modules=list(targets), init_lora_weights=False, **settings)
    return shaken(inject(llama(tied=True).eval(), config))


def test_both_have_adapters_of_their_own_and_do_not_merge_into_one_weight():
    model = tied_llama("embed_tokens", "lm_head")
    embedding, head = model.model.embed_tokens, model.lm_head
    assert not {id(p) for p in embedding.adapters.parameters()} & {id(p) for p in head.adapters.parameters()}
    with refused(model, ValueError, "the weight of 'model.embed_tokens' is shared with 'lm_head.base_layer', which"):
        merge(model)
    head.base_layer.weight = nn.Parameter(head.weight.detach().clone(), requires_grad=False)  # the remedy
    expected = answer(model)
    torch.testing.assert_close(answer(merge(model)), expected)


def test_copies_of_both_that_are_trained_in_full_stay_tied():
    model = tied_llama("q_proj", modules_to_save=["lm_head", "embed_tokens"])
    copies = model.lm_head.in_use, model.model.embed_tokens.in_use
    weight = copies[0].weight
    assert copies[1].weight is weight is not model.lm_head.base_layer.weight
    expected = answer(model)
    torch.testing.assert_close(answer(merge_and_unload(model)), expected)
    assert model.lm_head.weight is model.model.embed_tokens.weight is weight


def test_the_merged_model_is_saved_with_both(tmp_path):
    base = llama(tied=True).eval()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        config = peft.LoraConfig(r=2, target_modules=["q_proj"], modules_to_save=["lm_head"], init_lora_weights=False)
        theirs = peft.get_peft_model(copy.deepcopy(base), config)
    shaken(theirs).save_pretrained(tmp_path / "theirs")
    expected = answer(theirs)
    with pytest.warns(UserWarning, match="modules_to_save has .*lm_head.*shares a parameter with.*as in PEFT"):
        ours = load_adapter(copy.deepcopy(base), tmp_path / "theirs")
    with disable_adapters(ours):
        torch.testing.assert_close(answer(ours), answer(base))
    plain = unload(copy.deepcopy(ours))
    assert plain.config.tie_word_embeddings and plain.lm_head.weight is plain.model.embed_tokens.weight
    merged = merge_and_unload(ours)
    torch.testing.assert_close(answer(merged), expected)
    merged.save_pretrained(tmp_path / "merged")
    read = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "merged")
    torch.testing.assert_close(answer(read), expected)


@pytest.mark.filterwarnings("ignore:inject. modules_to_save")
def test_the_frozen_head_of_a_trained_one_does_not_keep_its_embedding_from_merging(tmp_path):
    model = tied_llama("embed_tokens", modules_to_save=["lm_head"])
    expected = answer(model)
    with refused(model, ValueError, "merge: the weight of", "is shared with 'lm_head.base_layer'"):
        merge(model)  # the frozen head stays, for use without the adapter
    merged = merge_and_unload(model)
    torch.testing.assert_close(answer(merged), expected)
    merged.save_pretrained(tmp_path / "merged")
    read = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "merged")
    torch.testing.assert_close(answer(read), expected)


@pytest.mark.parametrize("tokens", [{"lm_head": [5]}, {"embed_tokens": [3, 4], "lm_head": [5]}])
def test_trained_rows_of_one_of_two_tied_modules_do_not_merge_into_both(tokens):
    """PEFT's merge writes them into the shared weight, which changes the other module."""
    model = tied_llama("q_proj", trainable_token_indices=tokens)
    expected = answer(model)
    with refused(model, ValueError, "merge_and_unload: the weight of", "is shared with", "untie them"):
        merge_and_unload(model)
    head = model.lm_head.base_layer
    head.weight = nn.Parameter(head.weight.detach().clone(), requires_grad=False)  # the remedy
    torch.testing.assert_close(answer(merge_and_unload(model)), expected)
