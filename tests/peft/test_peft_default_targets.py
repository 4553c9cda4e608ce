"""inject with a PEFT config that names no modules: PEFT's table does by the model's type, as in get_peft_model."""

from __future__ import annotations

import copy
import json
from typing import Any

import peft
import pytest
from safetensors import safe_open
from support.mixtures import mixture
from support.models import Net, bert, gpt2, llama, refused, roberta
from torch import nn
from transformers import T5Config, T5ForConditionalGeneration

from lora_ext import inject, save_adapter


def t5() -> nn.Module:
    return T5ForConditionalGeneration(T5Config(vocab_size=50, d_model=16, d_kv=8, d_ff=24, num_layers=1, num_heads=2))


CASES = {
    "bert": (bert, {"task_type": "SEQ_CLS"}),
    "roberta": (roberta, {"exclude_modules": ["value"]}),
    "llama": (llama, {"task_type": "CAUSAL_LM", "rank_pattern": {"v_proj": 3}, "layers_to_transform": [1]}),
    "gpt2": (gpt2, {"fan_in_fan_out": True}),
    "t5": (t5, {"trainable_token_indices": [3]}),
}


@pytest.mark.parametrize("case", CASES)
def test_the_modules_are_peft_s(case, tmp_path):
    make, options = CASES[case]
    base, config = make(), peft.LoraConfig(r=2, **options)
    ours = inject(copy.deepcopy(base), config)
    assert config.target_modules is None  # the caller's config is not changed
    save_adapter(ours, tmp_path / "ours")
    peft.get_peft_model(base, config).save_pretrained(tmp_path / "theirs")
    ours, theirs = (saved(tmp_path / name) for name in ("ours", "theirs"))
    assert ours == theirs


def saved(directory) -> dict[str, Any]:
    """The shapes in an adapter's file, and what its config says about modules."""
    with safe_open(directory / "adapter_model.safetensors", "pt") as file:
        shapes = {key: tuple(file.get_slice(key).get_shape()) for key in file.keys()}  # noqa: SIM118
    config = json.loads((directory / "adapter_config.json").read_text())
    return shapes | {"target_modules": sorted(config["target_modules"] or []), "r": config["r"]}


@pytest.mark.parametrize("make", [Net, lambda: mixture("gpt_oss", "eager")])
def test_a_type_that_peft_does_not_know_is_refused(make):
    with refused(model := make(), ValueError, "target_modules is None", "name the layers"):
        inject(model, peft.LoraConfig())


def test_next_to_parameters_modules_are_named():
    """PEFT adapts q_proj and v_proj of Llama, and with Transformers 5 no module of Mixtral."""
    with refused(model := mixture("mixtral", "eager"), ValueError, "target_modules=[] to adapt none"):
        inject(model, peft.LoraConfig(target_parameters=["experts.down_proj"]))


def test_next_to_parameters_a_type_that_peft_does_not_know_needs_no_modules(tmp_path):
    base, config = mixture("gpt_oss", "eager"), peft.LoraConfig(r=2, target_parameters=["experts.down_proj"])
    save_adapter(inject(copy.deepcopy(base), config), tmp_path / "ours")
    peft.get_peft_model(base, config).save_pretrained(tmp_path / "theirs")
    assert saved(tmp_path / "ours") == saved(tmp_path / "theirs")
