"""The defaults of finetune that depend on the method and on the layers that are named."""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import pytest
from support import tiny_classifier
from support.models import bert, roberta
from torch import nn
from transformers import CanineConfig, CanineForSequenceClassification, CanineTokenizer

from lora_ext.cli import training
from lora_ext.methods import apply_method
from lora_ext.tasks import TaskError
from lora_ext.tasks.causal_lm.settings import CausalSettings
from lora_ext.tasks.finetune.defaults import USUAL, WITH_EMBEDDINGS
from lora_ext.tasks.finetune.run import finetune
from lora_ext.tasks.finetune.settings import Settings, command_line
from lora_ext.tasks.finetune.task_model import method_for

pytestmark = pytest.mark.cpu_only("settings")

DEPENDENT = (*USUAL, "learning_rate")


def dependent(settings: Settings) -> dict[str, Any]:
    return {name: getattr(settings, name) for name in DEPENDENT}


def test_lora_in_a_classifier_adapts_the_embeddings_too():
    assert dependent(Settings()) == WITH_EMBEDDINGS | {"lora_alpha": 0.8}
    assert Settings(r=10).lora_alpha == 2.0  # alpha over rank stays
    assert Settings(r=10, lora_alpha=7.0).lora_alpha == 7.0
    given = {"ema_decay": 0.0, "schedule": "linear", "learning_rate": 5e-4, "modules_to_save": "classifier"}
    assert dependent(Settings(**given)) == WITH_EMBEDDINGS | {"lora_alpha": 0.8} | given


@pytest.mark.parametrize("settings", [
    Settings(target_modules="all-linear"),
    Settings(quantize="nf4"),
    Settings(method="lora+prefix-layer", learning_rate=1e-3),
    CausalSettings(learning_rate=1e-3),
    Settings(method="adapter-h"),
    Settings(method="full", learning_rate=1e-3),
])  # fmt: skip
def test_the_usual_defaults_where_layers_are_named_or_nothing_else_was_tried(settings: Settings):
    assert dependent(settings) == USUAL | {"learning_rate": 1e-3}


@pytest.mark.full
def test_a_model_that_tells_no_embeddings(tmp_path: Path):
    sizes = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 16}
    config = CanineConfig(max_position_embeddings=64, num_hash_buckets=32, local_transformer_stride=16, **sizes)
    CanineForSequenceClassification(config).save_pretrained(tmp_path / "model")
    CanineTokenizer(model_max_length=64).save_pretrained(tmp_path / "model")
    rows = [(f"{label}{i}", label) for i in range(9) for label in "xy"]
    data = tiny_classifier.save_reviews(tmp_path / "data.csv", rows)
    settings = Settings(model=str(tmp_path / "model"), data=str(data), max_length=16, epochs=1)
    said: list[str] = []
    finetune(settings, tmp_path / "out", measure=False, say=said.append)
    assert any(line.endswith("tells no input embeddings: LoRA adapts all-linear alone") for line in said)
    saved = json.loads((tmp_path / "out" / "adapter" / "adapter_config.json").read_text())
    assert saved["r"] == 4 and any(name.endswith("attention.self.query") for name in saved["target_modules"])
    for options in ({"modules_to_save": None}, {"trim_vocabulary": True}):  # None: the layers were named
        with pytest.raises(TaskError, match="CanineForSequenceClassification tells no input embeddings"):
            finetune(replace(settings, **options), tmp_path / "other", say=said.append)


def test_settings_with_defaults_stay_as_they_are():
    for settings in (Settings(), Settings(target_modules="q,v"), Settings(method="bitfit"), CausalSettings()):
        assert type(settings)(**asdict(settings)) == settings  # as a resumed run reads them


@pytest.mark.parametrize("settings", [
    Settings(),
    Settings(r=8, lora_alpha=16.0),
    Settings(target_modules="q,v", r=4),
    Settings(target_modules="all-linear,embeddings"),
    Settings(target_modules="all-linear,embeddings", modules_to_save="auto", r=4),
    Settings(quantize="nf4", lora_alpha=0.8),
    Settings(method="full", schedule="constant"),
])  # fmt: skip
def test_the_command_of_a_run_starts_it_again(settings: Settings):
    parser = argparse.ArgumentParser()
    training.add_options(parser)
    parser.add_argument("--out")
    again = training.options_of(parser.parse_args(command_line("finetune", asdict(settings), Path("out"))[2:]))
    assert Settings(**again) == settings


def test_a_schedule_of_trainers_replaces_the_default_one():
    assert Settings(set="lr_scheduler_type=cosine").schedule == "linear"
    assert Settings(set="lr_scheduler_type=cosine").ema_decay == WITH_EMBEDDINGS["ema_decay"]


def test_another_method_gets_its_defaults_and_what_was_given():
    full = Settings(epochs=3.0, r=6, ema_decay=0.9).with_method("full")
    assert full == Settings(method="full", epochs=3.0, ema_decay=0.9)
    with pytest.raises(TaskError, match="--r goes with lora, not with --method full"):
        Settings(method="full", r=6)


def test_auto_trains_the_pooler_if_the_model_has_one():
    def trained(make: Callable[[], nn.Module], settings: Settings) -> list[str]:
        model = make()
        apply_method(model, method_for(model, settings, "model"))
        return [name for name, p in model.named_parameters() if p.requires_grad and "pooler" in name]

    assert len(trained(bert, Settings())) == 2  # weight and bias
    factors = trained(bert, Settings(target_modules="all-linear"))
    assert len(factors) == 2 and all("lora_" in name for name in factors)
    assert trained(roberta, Settings()) == []
