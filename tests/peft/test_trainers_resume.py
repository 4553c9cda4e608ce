"""Trainers resume with the same bits, and end with the adapter of the best checkpoint, however the model is adapted."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from support import versions
from support.stock_trainer import Spoil, assert_same, trained
from support.trainers import TARGETS, dpo, logged, plain, sft, tiny_chat
from support.ways import WAYS, adapted, save_random_adapter
from torch import nn

# TRL and torchao, which it imports, warn a lot. TRL puts models on the GPU by itself.
pytestmark = [pytest.mark.full, pytest.mark.filterwarnings("ignore"), pytest.mark.cpu_only("TRL chooses the device")]

TRAINERS = {"Trainer": plain, "SFT": sft, "DPO": dpo}
CASES = [(kind, way) for kind in TRAINERS for way in WAYS if (kind, way) != ("DPO", "inject")]  # TRL refuses it
EVERY_STEP = {"save_strategy": "steps", "save_steps": 1}


@pytest.fixture(scope="module")
def start(tmp_path_factory) -> tuple[nn.Module, Path]:
    torch.manual_seed(0)
    base, directory = tiny_chat.model(), tmp_path_factory.mktemp("adapter")
    return base, save_random_adapter(base, directory, target_modules=TARGETS, r=4, lora_dropout=0.1)


@pytest.mark.parametrize(("kind", "way"), CASES)
def test_a_resumed_run_ends_like_an_uninterrupted_one(kind, way, start, tmp_path):
    if (kind, way) == ("DPO", "accelerate") and versions.before("transformers", "5.23"):
        pytest.skip("Trainer resumes a PeftModel of two adapters without that in the checkpoint's own directory")
    make, way = TRAINERS[kind], WAYS[way]
    whole = make(adapted(way, *start), tmp_path, **EVERY_STEP)
    whole.train()
    resumed = make(adapted(way, *start), tmp_path, **EVERY_STEP)
    before = trained(resumed.model)
    resumed.train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
    assert_same(trained(resumed.model), trained(whole.model))
    assert logged(resumed, "loss") == logged(whole, "loss")
    assert any(not torch.equal(value, before[name]) for name, value in trained(resumed.model).items())


@pytest.mark.parametrize(("kind", "way"), CASES)
def test_the_best_adapter_is_loaded_at_the_end(kind, way, start, tmp_path):
    make, way = TRAINERS[kind], WAYS[way]
    options = {"eval_strategy": "steps", "eval_steps": 1, "load_best_model_at_end": True, **EVERY_STEP}
    trainer = make(adapted(way, *start), tmp_path, **options)
    trainer.add_callback(Spoil())
    trainer.train()
    best = Path(trainer.state.best_model_checkpoint)
    assert best.name in ("checkpoint-1", "checkpoint-2")
    trainer.model.save_pretrained(tmp_path / "end")
    assert_same(
        load_file(tmp_path / "end" / "adapter_model.safetensors"), load_file(best / "adapter_model.safetensors")
    )
    assert trainer.evaluate()["eval_loss"] == pytest.approx(min(logged(trainer, "eval_loss")), rel=1e-6)
    assert trained(trainer.model)  # it may be trained further
