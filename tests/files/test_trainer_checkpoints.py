"""Transformers' stock Trainer on adapted models: checkpoints hold what is trained, and runs are resumed from them."""

from __future__ import annotations

import copy
import functools
import io
import logging
from collections.abc import Callable

import pytest
import torch
from support.models import bert, llama, token_ids
from support.stock_trainer import Spoil, assert_same, trained, trainer
from torch import nn
from transformers import BertConfig, BertForSequenceClassification
from transformers.utils import logging as transformers_logging

from lora_ext import LoraConfig, inject, load_adapter
from lora_ext.methods import apply_method, load_method, method_of, new_method

pytestmark = pytest.mark.cpu_only("the Trainer chooses the device")

Adapt = Callable[[nn.Module], nn.Module]


def by_lora(**options) -> Adapt:
    return lambda base: inject(copy.deepcopy(base), LoraConfig(r=2, **options))


def by_method(name: str, **options) -> Adapt:
    return lambda base: apply_method(copy.deepcopy(base), new_method(name, **options))


TIED = functools.partial(llama, tied=True)
CLASSIFIES = {"target_modules": ["query"], "task_type": "SEQ_CLS"}
CASES: dict[str, tuple[Callable[[], nn.Module], Adapt]] = {
    "head": (bert, by_lora(**CLASSIFIES)),
    "biases": (bert, by_lora(**CLASSIFIES, bias="all")),
    "tied": (TIED, by_lora(target_modules=["q_proj"], modules_to_save=["embed_tokens", "lm_head"])),
    "tied tokens": (TIED, by_lora(target_modules=["q_proj"], trainable_token_indices=[3, 1])),
    "adapter-h": (bert, by_method("adapter-h")),
    "lora+prefix-embed": (bert, by_method("lora+prefix-embed", target_modules=["query"])),
    "bitfit": (bert, by_method("bitfit")),
}
QUICK = ("head",)


@pytest.fixture
def warned():
    """Captures the warnings of Transformers, also if another test has silenced them."""
    library, level, said = logging.getLogger("transformers"), transformers_logging.get_verbosity(), io.StringIO()
    transformers_logging.set_verbosity_warning()
    library.addHandler(handler := logging.StreamHandler(said))
    yield said
    library.removeHandler(handler)
    transformers_logging.set_verbosity(level)


@pytest.mark.filterwarnings("ignore:.*without what .* trained")
@pytest.mark.parametrize("case", [pytest.param(c, marks=[pytest.mark.full] * (c not in QUICK)) for c in CASES])
def test_a_resumed_run_ends_like_an_uninterrupted_one_and_the_best_model_is_loaded(case, tmp_path, warned):
    make, adapt = CASES[case]
    base = make()
    whole = adapt(base)
    resumed, best = copy.deepcopy(whole), copy.deepcopy(whole)
    trainer(whole, tmp_path / "run").train()
    before = {name: p.detach().clone() for name, p in resumed.named_parameters() if not p.requires_grad}
    trainer(resumed, tmp_path / "run").train(resume_from_checkpoint=str(tmp_path / "run" / "checkpoint-2"))
    assert "missing keys" not in warned.getvalue() and "unexpected keys" not in warned.getvalue()
    assert_same(trained(resumed), trained(whole))
    assert_same({name: p for name, p in resumed.named_parameters() if name in before}, before)

    ends_badly = trainer(best, tmp_path / "best", eval_strategy="steps", eval_steps=1, load_best_model_at_end=True)
    ends_badly.add_callback(Spoil())
    ends_badly.train()
    if case != "bitfit":  # whose checkpoint is a whole model
        load, ids = load_method if method_of(best) else load_adapter, token_ids()
        again = load(copy.deepcopy(base), ends_badly.state.best_model_checkpoint)
        assert torch.equal(again.eval()(ids).logits, best.eval()(ids).logits)


def test_what_the_user_trains_besides_and_buffers_are_resumed_with_a_warning(tmp_path):
    base = BertWithNorm(bert().config)

    def made() -> nn.Module:
        torch.manual_seed(0)
        model = by_lora(target_modules=["query"])(base)
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
