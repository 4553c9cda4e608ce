"""save_pretrained and Trainer write files of a method that loads by load_method, and fail to load as a plain model."""

from __future__ import annotations

import copy
import warnings

import pytest
import safetensors.torch
import torch
from support.models import bert, llama, refused, shaken, token_ids
from support.stock_trainer import assert_same, trained, trainer
from torch import nn
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification

from lora_ext import LoraConfig, inject, merge, unmerge
from lora_ext.adapters import merge_and_unload
from lora_ext.methods import apply_method, load_method, new_method, remove_method, save_method

pytestmark = pytest.mark.cpu_only("files are about the CPU, and the Trainer chooses the device")

INSERTING = ("adapter-h", "prefix-layer", "prefix-embed")
WITH_ADAPTER = ("lora+adapter-p", "lora+prefix-embed")
MORE_OF_LLAMA = ("adapter-h", "prefix-layer", *WITH_ADAPTER)
AUTO = {"BertForSequenceClassification": AutoModelForSequenceClassification, "LlamaForCausalLM": AutoModelForCausalLM}


def adapted(base: nn.Module, name: str) -> nn.Module:
    targets = {"target_modules": ["query" if hasattr(base, "bert") else "q_proj"]} if "lora" in name else {}
    return apply_method(copy.deepcopy(base), new_method(name, **targets))


def on_disk(base: nn.Module, directory) -> nn.Module:
    base.save_pretrained(directory)
    return AUTO[type(base).__name__].from_pretrained(directory).eval()


@pytest.mark.parametrize(
    ("name", "make"),
    [(name, bert) for name in (*INSERTING, *WITH_ADAPTER)]
    + [("prefix-embed", llama), *(pytest.param(name, llama, marks=pytest.mark.full) for name in MORE_OF_LLAMA)],
)
def test_saved_files_load_by_load_method_and_by_no_from_pretrained(name, make, tmp_path):
    base = on_disk(make(), tmp_path / "base")
    model = shaken(adapted(base, name), by=0.3).eval()
    saved, ids = tmp_path / "saved", token_ids()
    if "lora" in name:
        with pytest.warns(UserWarning, match="without what .* trained; load all of it .* by .*load_method"):
            model.save_pretrained(saved)
    else:
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            model.save_pretrained(saved)
        with pytest.raises((OSError, ValueError)):
            AUTO[type(base).__name__].from_pretrained(saved)
    state = safetensors.torch.load_file(saved / "model.safetensors")
    with pytest.raises(RuntimeError, match="lora_ext.methods.load_method"):
        copy.deepcopy(base).load_state_dict(state)
    again = load_method(base, saved).eval()
    assert torch.equal(again(ids).logits, model(ids).logits)


def test_a_checkpoint_of_another_method_is_reported(tmp_path):
    base = bert()
    trainer(adapted(base, "adapter-h"), tmp_path / "run", max_steps=1).train()
    state = safetensors.torch.load_file(tmp_path / "run" / "checkpoint-1" / "model.safetensors")
    for other in (
        adapted(base, "prefix-layer"),
        adapted(base, "adapter-l"),
        inject(copy.deepcopy(base), LoraConfig(target_modules=["query"])),
    ):
        missing, unexpected = other.load_state_dict(state, strict=False)
        assert missing and unexpected and not any("embeddings" in key for key in missing)


def test_merged_adapters_next_to_inserted_modules_are_not_saved_as_a_model(tmp_path):
    model = merge(shaken(adapted(bert(), "lora+adapter-p")))
    with refused(model, ValueError, "lora+adapter-p inserted", "unmerge(model)", "save_method"):
        model.save_pretrained(tmp_path / "saved")
    with refused(unmerge(model), ValueError, "BertModel.save_pretrained", "a part of the adapted"):
        model.bert.save_pretrained(tmp_path / "part")
    assert not list(tmp_path.iterdir())
    with pytest.warns(UserWarning, match="load_method"):
        model.save_pretrained(tmp_path / "saved")
    merge_and_unload(model)
    with refused(model, ValueError, "merged for good", "remove_method"):
        model.save_pretrained(tmp_path / "other")


def test_without_the_method_the_model_saves_itself_again(tmp_path):
    base = bert().eval()
    save_method(adapted(base, "lora+prefix-layer"), tmp_path / "method")
    loaded = load_method(copy.deepcopy(base), tmp_path / "method")
    for model in map(remove_method, (adapted(base, "adapter-h"), adapted(base, "lora+adapter-p"), loaded)):
        assert "save_pretrained" not in vars(model) and "save_pretrained" not in vars(model.bert)
        assert not model._load_state_dict_post_hooks
        model.save_pretrained(tmp_path / "model")
        assert_same(trained(AutoModelForSequenceClassification.from_pretrained(tmp_path / "model")), trained(model))


def test_what_stays_of_a_method_generates_and_refuses_names():
    model, ids = adapted(llama(), "lora+prefix-layer").eval(), token_ids(2)
    options = {"max_new_tokens": 3, "pad_token_id": 0, "attention_mask": torch.ones_like(ids)}
    expected = model.generate(ids, **options)
    merge_and_unload(model)
    assert torch.equal(model.generate(ids, **options), expected)
    with refused(model, ValueError, "LlamaForCausalLM.generate: LlamaForCausalLM is not injected"):
        model.generate(ids, adapter_names=["default"] * 2, **options)
    remove_method(model)
    assert not {"generate", "save_pretrained", "peft_config"} & {*vars(model)}


@pytest.mark.parametrize("name", ["bitfit", "full", "head-only"])
def test_methods_that_insert_nothing_save_the_whole_model(name, tmp_path):
    model = shaken(apply_method(bert(), new_method(name))).eval()
    model.save_pretrained(tmp_path)
    ids = token_ids()
    assert torch.equal(AutoModelForSequenceClassification.from_pretrained(tmp_path)(ids).logits, model(ids).logits)
