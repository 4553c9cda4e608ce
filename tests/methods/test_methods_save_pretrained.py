"""save_pretrained and Trainer write files of a method that loads by load_method, and fail to load as a plain model."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Iterator

import pytest
import safetensors.torch
import torch
from support.models import bert, llama, refused, shaken, token_ids
from support.stock_trainer import Spoil, assert_same, trained, trainer
from torch import nn
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification
from transformers import logging as transformers_logging

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


@pytest.fixture
def says() -> Iterator[None]:
    """Lets Transformers log warnings, which other tests' commands turn off."""
    before = transformers_logging.get_verbosity()
    transformers_logging.set_verbosity_warning()
    yield
    transformers_logging.set_verbosity(before)


@pytest.mark.parametrize(
    ("name", "make"),
    [(name, bert) for name in (*INSERTING, *WITH_ADAPTER)]
    + [("prefix-embed", llama), *(pytest.param(name, llama, marks=pytest.mark.full) for name in MORE_OF_LLAMA)],
)
def test_saved_files_load_by_load_method_and_by_no_from_pretrained(name, make, tmp_path, caplog, says):
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


@pytest.mark.filterwarnings("ignore:.*without what .* trained")
@pytest.mark.parametrize("name", ["adapter-h", "lora+prefix-embed", pytest.param("bitfit", marks=pytest.mark.full)])
def test_the_stock_trainer_resumes_and_loads_the_best_model(name, tmp_path, caplog, says):
    base = bert()
    torch.manual_seed(0)
    start = adapted(base, name)
    whole, resumed, best = (copy.deepcopy(start) for _ in range(3))
    trainer(whole, tmp_path / "run").train()
    with caplog.at_level("WARNING"):
        checkpoint = tmp_path / "run" / "checkpoint-2"
        trainer(resumed, tmp_path / "run").train(resume_from_checkpoint=str(checkpoint))
    assert "missing keys" not in caplog.text and "unexpected keys" not in caplog.text
    assert_same(trained(resumed), trained(whole))
    ends_badly = trainer(best, tmp_path / "best", eval_strategy="steps", eval_steps=1, load_best_model_at_end=True)
    ends_badly.add_callback(Spoil())
    ends_badly.train()
    if name != "bitfit":
        again = load_method(copy.deepcopy(base), ends_badly.state.best_model_checkpoint).eval()
        ids = token_ids()
        assert torch.equal(again(ids).logits, best.eval()(ids).logits)


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
    with refused(model, ValueError, "lora+adapter-p inserted modules", "unmerge(model)", "save_method"):
        model.save_pretrained(tmp_path / "saved")
    assert not list(tmp_path.rglob("*.safetensors"))
    with pytest.warns(UserWarning, match="load_method"):
        unmerge(model).save_pretrained(tmp_path / "saved")
    merge_and_unload(model)
    with refused(model, ValueError, "merged for good", "remove_method"):
        model.save_pretrained(tmp_path / "other")


def test_a_part_with_inserted_modules_is_refused(tmp_path):
    model = adapted(bert(), "adapter-h")
    with refused(model, ValueError, "BertModel.save_pretrained", "a part of the adapted"):
        model.bert.save_pretrained(tmp_path)
    assert not list(tmp_path.iterdir())


def test_without_the_method_the_model_saves_itself_again(tmp_path):
    base = bert().eval()
    for model in (
        remove_method(adapted(base, "adapter-h")),
        remove_method(adapted(base, "lora+adapter-p")),
        remove_method(load_method(copy.deepcopy(base), _saved(base, tmp_path / "method"))),
    ):
        assert "save_pretrained" not in vars(model) and "save_pretrained" not in vars(model.bert)
        assert not model._load_state_dict_post_hooks
        model.save_pretrained(tmp_path / "model")
        assert_same(trained(AutoModelForSequenceClassification.from_pretrained(tmp_path / "model")), trained(model))


def _saved(base: nn.Module, directory):
    save_method(adapted(base, "lora+prefix-layer"), directory)
    return directory


@pytest.mark.parametrize("name", ["bitfit", "full", "head-only"])
def test_methods_that_insert_nothing_save_the_whole_model(name, tmp_path):
    model = shaken(apply_method(bert(), new_method(name))).eval()
    model.save_pretrained(tmp_path)
    ids = token_ids()
    assert torch.equal(AutoModelForSequenceClassification.from_pretrained(tmp_path)(ids).logits, model(ids).logits)
