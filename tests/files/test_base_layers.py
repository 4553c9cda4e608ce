"""Base layers in adapter files: loaded ones are saved again, and resized embeddings are saved, as PEFT does."""

from __future__ import annotations

import copy
import functools
import json
import warnings
from pathlib import Path

import peft
import pytest
import torch
from safetensors.torch import load_file
from support.models import VOCABULARY, answer, llama
from torch import Tensor
from transformers import LlamaForCausalLM

from lora_ext import LoraConfig, inject, load_adapter, merge, save_adapter
from lora_ext.adapters import rename_adapter, set_adapter
from lora_ext.methods import apply_method, load_method, new_method, save_method

NEW = VOCABULARY + 2
IDS = torch.tensor([[1, VOCABULARY, VOCABULARY + 1, 2]])
OLD = IDS % VOCABULARY
SETTINGS = {"r": 2, "target_modules": ["q_proj", "v_proj"], "init_lora_weights": False}
EMBEDDING, HEAD = "base_model.model.model.embed_tokens.weight", "base_model.model.lm_head.weight"


@pytest.fixture(scope="module", params=[False, True], ids=["untied", "tied"])
def base(request, tmp_path_factory) -> Path:
    torch.manual_seed(0)
    path = tmp_path_factory.mktemp("base")
    llama(request.param).save_pretrained(path)
    return path


@functools.cache
def loaded(base: Path) -> LlamaForCausalLM:
    return LlamaForCausalLM.from_pretrained(base)


def plain(base: Path) -> LlamaForCausalLM:
    return copy.deepcopy(loaded(base))


def resized(base: Path, seed: int) -> LlamaForCausalLM:
    """A model with two new tokens, whose rows are random."""
    model = plain(base)
    torch.manual_seed(seed)
    model.resize_token_embeddings(NEW)
    return model


def keys(directory: Path) -> set[str]:
    return set(load_file(directory / "adapter_model.safetensors"))


def trained_by_peft(base: Path, directory: Path) -> Tensor:
    """Saves an adapter of PEFT with another embedding than the base's, and returns its outputs."""
    model = peft.get_peft_model(plain(base), peft.LoraConfig(**SETTINGS))
    with torch.no_grad():
        model.get_input_embeddings().weight.add_(torch.randn(VOCABULARY, 16))
    model.save_pretrained(directory, save_embedding_layers=True)
    assert {EMBEDDING, HEAD} <= keys(directory)
    return answer(model, OLD)


WAYS = {
    "save_adapter": save_adapter,
    "save_pretrained": lambda model, directory: model.save_pretrained(directory),
    "of a copy": lambda model, directory: save_adapter(copy.deepcopy(model), directory),
}


@pytest.mark.parametrize("way", WAYS)
def test_loaded_base_layers_are_saved_again(way, base, tmp_path):
    expected = trained_by_peft(base, tmp_path / "peft")
    model = load_adapter(plain(base), tmp_path / "peft", trainable=True)
    torch.testing.assert_close(answer(model, OLD), expected)
    WAYS[way](model, tmp_path / "again")
    assert keys(tmp_path / "again") == keys(tmp_path / "peft")
    theirs = peft.PeftModel.from_pretrained(plain(base), tmp_path / "again")
    torch.testing.assert_close(answer(theirs, OLD), expected)


def test_they_belong_to_the_adapter_that_brought_them(base, tmp_path):
    trained_by_peft(base, tmp_path / "peft")
    model = inject(plain(base), LoraConfig(**SETTINGS))
    load_adapter(model, tmp_path / "peft", adapter_name="theirs")
    rename_adapter(model, "theirs", "renamed")

    def is_saved(name: str, **options) -> bool:
        save_adapter(model, tmp_path / name, name, **options)
        return EMBEDDING in keys(tmp_path / name)

    assert not is_saved("default") and is_saved("renamed")
    set_adapter(model, "default")
    load_adapter(model, tmp_path / "renamed", adapter_name="default")  # into the adapter that is there
    assert is_saved("default") and not is_saved("default", save_embedding_layers=False)
    save_adapter(inject(plain(base), LoraConfig(**SETTINGS)), tmp_path / "all", save_embedding_layers=True)
    assert {EMBEDDING, HEAD} <= keys(tmp_path / "all")


CONFIGS = {
    "attention": {},
    "embedding too": {"target_modules": ["q_proj", "embed_tokens"]},
    "tokens": {"trainable_token_indices": [3, VOCABULARY]},
    "embedding in full": {"modules_to_save": ["embed_tokens"]},
}


@pytest.mark.parametrize("name", CONFIGS)
@pytest.mark.filterwarnings("ignore:.*(modules_to_save|tied|target_modules)")
def test_resized_embeddings_are_saved_with_a_warning(name, base, tmp_path):
    settings = SETTINGS | CONFIGS[name]
    model = inject(resized(base, 1), LoraConfig(**settings))
    with pytest.warns(UserWarning, match=rf"resized \({VOCABULARY} -> {NEW}\)"):
        save_adapter(model, tmp_path / "ours")
    again = load_adapter(resized(base, 2), tmp_path / "ours")
    torch.testing.assert_close(answer(again, IDS), answer(model, IDS))
    theirs = peft.PeftModel.from_pretrained(resized(base, 2), tmp_path / "ours")
    torch.testing.assert_close(answer(theirs, IDS), answer(model, IDS))
    if name == "attention":
        peft.get_peft_model(resized(base, 1), peft.LoraConfig(**settings)).save_pretrained(tmp_path / "peft")
        assert keys(tmp_path / "ours") == keys(tmp_path / "peft")
    shapes = rf"{NEW}(, 16)?\] in the file, \[(2, )?{VOCABULARY}(, 16)?\] in the model"
    with pytest.raises((TypeError, ValueError), match=rf"{shapes}|resize_token_embeddings"):
        load_adapter(plain(base), tmp_path / "ours")


def test_save_pretrained_saves_them_and_trainer_resumes_with_them(base, tmp_path):
    """Trainer loads the weights file of a checkpoint into a model that the caller resized again."""
    model = inject(resized(base, 1), LoraConfig(**SETTINGS))
    with pytest.warns(UserWarning, match="resized"):
        model.save_pretrained(tmp_path / "out")
    torch.testing.assert_close(answer(load_adapter(resized(base, 2), tmp_path / "out"), IDS), answer(model, IDS))
    again = inject(resized(base, 2), LoraConfig(**SETTINGS))
    again.load_state_dict(load_file(tmp_path / "out" / "model.safetensors"), strict=False)
    torch.testing.assert_close(answer(again, IDS), answer(model, IDS))


NOT_KNOWN = {  # to be resized: the model, its name, and an option
    "same": (plain, None, "auto"),
    "unknown": (lambda base: resized(base, 1), "some/model-that-is-not-in-the-cache", "auto"),
    "unnamed": (lambda base: llama(), None, "auto"),
    "off": (lambda base: resized(base, 1), None, False),
    "no config": (lambda base: resized(base, 1), "gguf", "auto"),  # a decoder from a GGUF file names its directory
    "bad config": (lambda base: resized(base, 1), "bad", "auto"),
}


@pytest.mark.parametrize("case", NOT_KNOWN)
def test_a_vocabulary_that_was_not_resized_is_not_saved(case, base, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("gguf").mkdir()
    Path("bad").mkdir()
    values = json.loads((base / "config.json").read_text()) | {"vocab_size": "many"}  # Transformers refuses it
    Path("bad", "config.json").write_text(json.dumps(values))
    make, name, option = NOT_KNOWN[case]
    model = inject(make(base), LoraConfig(**SETTINGS))
    model.name_or_path = name or model.name_or_path
    read, asked = type(model.config).get_config_dict, []
    monkeypatch.setattr(
        type(model.config), "get_config_dict", lambda name, **how: asked.append(how) or read(name, **how)
    )
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        save_adapter(model, "out", save_embedding_layers=option)
    assert all(how["local_files_only"] for how in asked)  # it never asks the network
    assert not {EMBEDDING, HEAD} & keys(Path("out"))


@pytest.mark.parametrize("names", [("rows", "lora"), ("lora", "rows")])
def test_another_adapter_around_the_embedding_hides_nothing(names, base, tmp_path):
    configs = {
        "rows": {**SETTINGS, "trainable_token_indices": [1, 2]},
        "lora": {**SETTINGS, "target_modules": ["q_proj", "embed_tokens"]},
    }
    model = resized(base, 0)
    for name in names:
        inject(model, LoraConfig(**configs[name]), name)
    for name in names:
        set_adapter(model, name)
        with pytest.warns(UserWarning, match="was resized"):
            save_adapter(model, tmp_path / name, name)
        again = load_adapter(resized(base, 9), tmp_path / name)
        torch.testing.assert_close(answer(again, IDS), answer(model, IDS))


@pytest.mark.parametrize("name", ["lora+prefix-embed", "lora"])
def test_files_of_methods_hold_them_too(name, base, tmp_path):
    model = apply_method(resized(base, 0), new_method(name, r=2, target_modules=["q_proj"]))
    with pytest.warns(UserWarning, match="was resized"):
        save_method(model, tmp_path / "saved")
    again = load_method(resized(base, 9), tmp_path / "saved")
    torch.testing.assert_close(answer(again, IDS), answer(model, IDS))
    with pytest.warns(UserWarning, match="was resized"):
        save_method(again, tmp_path / "again")
    assert keys(tmp_path / "again") == keys(tmp_path / "saved") >= {EMBEDDING}


@pytest.mark.parametrize("base", [False], ids=["untied"], indirect=True)
def test_a_base_layer_with_a_merged_adapter_is_refused(base, tmp_path):
    model = inject(resized(base, 1), LoraConfig(**SETTINGS | {"target_modules": ["embed_tokens"]}))
    expected = answer(model, IDS)
    merge(model)
    with pytest.warns(UserWarning, match="resized"), pytest.raises(RuntimeError, match=r"embed_tokens.*unmerge"):
        save_adapter(model, tmp_path / "out")
    assert not (tmp_path / "out").exists()
    model.save_pretrained(tmp_path / "out")  # the model itself
    torch.testing.assert_close(answer(plain(tmp_path / "out"), IDS), expected)
