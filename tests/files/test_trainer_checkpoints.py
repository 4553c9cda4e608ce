"""Transformers' stock Trainer on an injected model: checkpoints hold the adapters only, and are resumed from."""

from __future__ import annotations

import copy
import logging

import pytest
import torch
from support.models import bert, llama, token_ids
from support.stock_trainer import assert_same, trained, trainer
from torch import nn
from transformers import BertConfig, BertForSequenceClassification
from transformers.utils import logging as transformers_logging

from lora_ext import LoraConfig, inject, load_adapter

pytestmark = pytest.mark.cpu_only("the Trainer chooses the device")

CASES = {
    "head": (bert, {"target_modules": ["query"], "task_type": "SEQ_CLS"}),
    "biases": (bert, {"target_modules": ["query"], "bias": "all", "task_type": "SEQ_CLS"}),
    "tied": (lambda: llama(tied=True), {"target_modules": ["q_proj"], "modules_to_save": ["embed_tokens", "lm_head"]}),
    "tied tokens": (lambda: llama(tied=True), {"target_modules": ["q_proj"], "trainable_token_indices": [3, 1]}),
}
MORE = ("biases", "tied tokens")


@pytest.fixture
def warned(caplog):
    """Captures the warnings of Transformers, also if another test has silenced them."""
    library, level = logging.getLogger("transformers"), transformers_logging.get_verbosity()
    propagates = library.propagate
    transformers_logging.set_verbosity_warning()
    library.propagate = True
    yield caplog
    library.propagate = propagates
    transformers_logging.set_verbosity(level)


def injected(base: nn.Module, **options) -> nn.Module:
    torch.manual_seed(0)
    return inject(copy.deepcopy(base), LoraConfig(r=2, **options))


@pytest.mark.parametrize("case", ["head", "tied", *(pytest.param(c, marks=pytest.mark.full) for c in MORE)])
def test_a_resumed_run_ends_like_an_uninterrupted_one(case, tmp_path):
    make, options = CASES[case]
    base = make()
    whole = injected(base, **options)
    trainer(whole, tmp_path / "run").train()
    resumed = injected(base, **options)
    before = {name: p.detach().clone() for name, p in resumed.named_parameters() if not p.requires_grad}
    trainer(resumed, tmp_path / "run").train(resume_from_checkpoint=str(tmp_path / "run" / "checkpoint-2"))
    assert_same(trained(resumed), trained(whole))
    after = dict(resumed.named_parameters())
    assert all(torch.equal(value, after[name]) for name, value in before.items())


def test_what_the_user_trains_besides_and_buffers_are_resumed_with_a_warning(tmp_path):
    base = BertWithNorm(bert().config)

    def made() -> nn.Module:
        model = injected(base, target_modules=["query"])
        model.classifier.requires_grad_(True)
        return model

    whole, resumed = made(), made()
    with pytest.warns(UserWarning, match=r"'classifier.weight' requires a gradient but belongs to no adapter"):
        trainer(whole, tmp_path / "run").train()
    with pytest.warns(UserWarning, match="modules_to_save"):
        trainer(resumed, tmp_path / "run").train(resume_from_checkpoint=str(tmp_path / "run" / "checkpoint-2"))
    assert "classifier.weight" in trained(resumed)
    assert_same(trained(resumed), trained(whole))
    assert_same(dict(resumed.named_buffers()), dict(whole.named_buffers()))


class BertWithNorm(BertForSequenceClassification):
    """A model with buffers that change in training."""

    def __init__(self, config: BertConfig) -> None:
        super().__init__(config)
        self.norm = nn.BatchNorm1d(config.hidden_size)
        self.dropout = self.norm  # between the pooler and the classifier


def test_a_checkpoint_has_the_bytes_of_the_adapter(tmp_path, warned):
    sizes = {"hidden_size": 128, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 512}
    base = BertForSequenceClassification(BertConfig(vocab_size=2000, num_labels=3, **sizes))
    model = injected(base, target_modules=["query", "value"], task_type="SEQ_CLS")
    trainer(model, tmp_path / "run", max_steps=1).train()
    checkpoint = tmp_path / "run" / "checkpoint-1"
    adapter = sum(p.nbytes for p in model.parameters() if p.requires_grad)
    for name in ("adapter_model.safetensors", "model.safetensors"):
        assert (checkpoint / name).stat().st_size < adapter + 20_000
    assert sum(p.nbytes for p in base.parameters()) > 20 * adapter
    again = load_adapter(copy.deepcopy(base), checkpoint)
    ids = token_ids()
    assert torch.equal(again.eval()(ids).logits, model.eval()(ids).logits)
    with warned.at_level("WARNING"):
        trainer(injected(base, target_modules=["query", "value"], task_type="SEQ_CLS"), tmp_path / "run").train(
            resume_from_checkpoint=str(checkpoint)
        )
    assert "missing keys" not in warned.text and "unexpected keys" not in warned.text
