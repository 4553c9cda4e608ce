"""The names of weights that the papers use, for each architecture."""

from __future__ import annotations

import warnings

import pytest
from support.models import bert, gpt2, llama

from lora_ext import LoraConfig, inject
from lora_ext.methods import new_method
from lora_ext.tasks.finetune.lora_targets import lora_targets

pytestmark = [pytest.mark.cpu_only("the Trainer chooses the device"), pytest.mark.full]


@pytest.mark.parametrize(("family", "text", "modules", "enable_lora"), [
    ("bert", "q,v", ["query", "value"], None),
    ("bert", "q, o", ["query", "attention.output.dense"], None),
    ("llama", "q,k,v,o", ["q_proj", "k_proj", "v_proj", "o_proj"], None),
    ("gpt2", "q,v", ["c_attn"], {"c_attn": (True, False, True)}),
    ("gpt2", "o", ["attn.c_proj"], None),
    ("gpt2", "c_attn,c_fc", ["c_attn", "c_fc"], None),
    ("llama", "all-linear", "all-linear", None),
    ("llama", "all-linear,embeddings", ["all-linear", "model.embed_tokens"], None),
    ("bert", "query, embeddings", ["query", "bert.embeddings.word_embeddings"], None),
    ("llama", r".*\.(q|k)_proj", r".*\.(q|k)_proj", None),
])  # fmt: skip
def test_the_papers_names_of_weights(family, text, modules, enable_lora):
    model = {"bert": bert, "llama": llama, "gpt2": gpt2}[family]()
    targets = lora_targets(model, text)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        count = new_method("lora", r=2, **targets).count(model)
    assert targets == {"target_modules": modules} | ({"enable_lora": enable_lora} if enable_lora else {})
    inject(model, LoraConfig(r=2, **targets))
    # sweep chooses ranks by the count
    assert sum(p.numel() for name, p in model.named_parameters() if "lora_" in name) == count
