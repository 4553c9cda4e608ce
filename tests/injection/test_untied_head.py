"""One of two tied modules is trained alone: a copy is untied, as in PEFT; rows do not merge into the shared weight."""

from __future__ import annotations

import copy
import warnings
from pathlib import Path

import peft
import pytest
import torch
import transformers
from support.models import answer, llama, refused, shaken
from torch import Tensor, nn

from lora_ext import LoraConfig, inject, load_adapter, merge, save_adapter
from lora_ext.adapters import disable_adapters, merge_and_unload, unload


def from_peft(base: nn.Module, directory: Path, module: str) -> tuple[peft.PeftModel, Tensor]:
    """Saves an adapter that trains ``module`` in full; returns PEFT's model and its logits."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        config = peft.LoraConfig(r=2, target_modules=["q_proj"], modules_to_save=[module], init_lora_weights=False)
        theirs = peft.get_peft_model(copy.deepcopy(base), config)
    shaken(theirs).save_pretrained(directory)
    return theirs, answer(theirs)


@pytest.mark.parametrize("module", ["lm_head", "embed_tokens"])
def test_pefts_file_loads_and_goes_back(module, tmp_path):
    base = llama(tied=True).eval()
    _, expected = from_peft(base, tmp_path / "theirs", module)
    with pytest.warns(UserWarning, match=f"modules_to_save has .*{module}.*shares a parameter with.*as in PEFT"):
        ours = load_adapter(copy.deepcopy(base), tmp_path / "theirs")
    torch.testing.assert_close(answer(ours), expected)
    assert ours.lm_head.weight is not ours.model.embed_tokens.weight
    with disable_adapters(ours):
        torch.testing.assert_close(answer(ours), answer(base))
    save_adapter(ours, tmp_path / "ours")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        read = peft.PeftModel.from_pretrained(copy.deepcopy(base), tmp_path / "ours")
    torch.testing.assert_close(answer(read), expected)


@pytest.mark.filterwarnings("ignore:inject. modules_to_save")
def test_the_merged_model_is_saved_with_both(tmp_path):
    base = llama(tied=True).eval()
    _, expected = from_peft(base, tmp_path / "theirs", "lm_head")
    merged = merge_and_unload(load_adapter(copy.deepcopy(base), tmp_path / "theirs"))
    torch.testing.assert_close(answer(merged), expected)
    merged.save_pretrained(tmp_path / "merged")
    read = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "merged")
    torch.testing.assert_close(answer(read), expected)

    plain = unload(load_adapter(copy.deepcopy(base), tmp_path / "theirs"))
    assert plain.config.tie_word_embeddings and plain.lm_head.weight is plain.model.embed_tokens.weight


@pytest.mark.filterwarnings("ignore:inject. modules_to_save")
def test_the_frozen_head_of_a_trained_one_does_not_keep_its_embedding_from_merging(tmp_path):
    config = LoraConfig(r=2, target_modules=["embed_tokens"], modules_to_save=["lm_head"], init_lora_weights=False)
    model = shaken(inject(llama(tied=True).eval(), config))
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
    model = llama(tied=True)
    config = LoraConfig(r=2, target_modules=["q_proj"], trainable_token_indices=tokens, init_lora_weights=False)
    shaken(inject(model, config))
    expected = answer(model)
    with refused(model, ValueError, "merge_and_unload: the weight of", "is shared with", "untie them"):
        merge_and_unload(model)
    head = model.lm_head.base_layer
    head.weight = nn.Parameter(head.weight.detach().clone(), requires_grad=False)  # the remedy
    torch.testing.assert_close(answer(merge_and_unload(model)), expected)
