"""Parameters that train but that no adapter file holds: the save says so."""

from __future__ import annotations

import warnings

import pytest
import torch
from support.models import llama

from lora_ext import LoraConfig, inject, load_adapter, save_adapter


@pytest.mark.parametrize("wrap", [lambda model: model, torch.compile], ids=["plain", "compiled"])
def test_an_unfrozen_model_is_noticed_through_wrappers(wrap, tmp_path):
    model = inject(llama(), LoraConfig(r=2, target_modules=["q_proj"]))
    model.requires_grad_(True)
    with pytest.warns(
        UserWarning, match=r"save_adapter: 'model\.embed_tokens.*belongs to no adapter.*save_embedding_layers=True"
    ) as caught:
        save_adapter(wrap(model), tmp_path)
    assert caught[0].filename == __file__  # the user's line


def test_what_the_file_holds_is_not_named(tmp_path):
    config = LoraConfig(r=2, target_modules=["q_proj", "lm_head"], modules_to_save=["norm"], bias="all")
    model = inject(llama(), config)
    inject(model, LoraConfig(r=2, target_modules=["v_proj"]), "other")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        save_adapter(model, tmp_path / "a", "default")
        save_adapter(model, tmp_path / "b", "other")
    model = inject(llama(), LoraConfig(r=2, target_modules=["q_proj"]))
    model.get_input_embeddings().requires_grad_(True)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        save_adapter(model, tmp_path / "d", save_embedding_layers=True)
        again = load_adapter(llama(), tmp_path / "d", trainable=True)
        again.get_input_embeddings().requires_grad_(True)  # came with the adapter, and is saved with it
        save_adapter(again, tmp_path / "e")
        again.save_pretrained(tmp_path / "f")
