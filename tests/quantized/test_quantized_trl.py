"""TRL's trainers on quantised models: SFT of an injected one equals PEFT's; DPO of PEFT's model on our kernels."""

from __future__ import annotations

import math
from pathlib import Path

import peft
import pytest
import torch
from support import tiny_trl
from support.optional import datasets, trl
from support.quantized import unchanged_bytes
from support.tiny_trl import PREFERENCES, TARGETS, decoder, save, tokenizer
from transformers import AutoModelForCausalLM, BitsAndBytesConfig

from lora_ext import LoraConfig, inject, save_adapter
from lora_ext.integrations.peft import accelerate

pytestmark = [pytest.mark.full, pytest.mark.filterwarnings("ignore"), pytest.mark.cpu_only("TRL chooses the device")]

CONFIG = {"r": 4, "lora_alpha": 8, "target_modules": TARGETS, "task_type": "CAUSAL_LM"}


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    torch.manual_seed(0)
    model = decoder(hidden_size=64, intermediate_size=128, num_key_value_heads=2)
    return save(model, tmp_path_factory.mktemp("base"))


def base(checkpoint: Path, format: str):
    how = {"load_in_8bit": True} if format == "int8" else {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4"}
    return AutoModelForCausalLM.from_pretrained(checkpoint, quantization_config=BitsAndBytesConfig(**how))


def settings(kind: str, directory: Path, **more):
    return tiny_trl.settings(kind, directory, **{"max_steps": 4, "learning_rate": 1e-2} | more)


def losses_of(trainer) -> list[float]:
    trainer.train()
    return [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]


@pytest.mark.parametrize("format", ["nf4", "int8"])
def test_sft_has_the_losses_of_peft(checkpoint: Path, format: str, tmp_path: Path):
    ours = inject(base(checkpoint, format), LoraConfig(**CONFIG))
    save_adapter(ours, tmp_path / "start")
    theirs = peft.PeftModel.from_pretrained(base(checkpoint, format), tmp_path / "start", is_trainable=True)
    data = datasets.Dataset.from_list([{"text": row["prompt"] + row["chosen"]} for row in PREFERENCES])
    results = []
    with unchanged_bytes(ours):
        for name, model in (("ours", ours), ("theirs", theirs)):
            args = settings("SFT", tmp_path / name)
            trainer = trl.SFTTrainer(model=model, args=args, train_dataset=data, processing_class=tokenizer())
            results.append(losses_of(trainer))
    assert results[0][-1] < results[0][0]
    assert results[0] == pytest.approx(results[1], rel=5e-3)  # TRL rounds the factors to bfloat16


def test_dpo(checkpoint: Path, tmp_path: Path):
    model = accelerate(peft.get_peft_model(base(checkpoint, "nf4"), peft.LoraConfig(**CONFIG)))
    data = datasets.Dataset.from_list(PREFERENCES)
    with unchanged_bytes(model):
        losses = losses_of(
            trl.DPOTrainer(
                model=model,
                args=settings("DPO", tmp_path, gradient_checkpointing=True),
                train_dataset=data,
                processing_class=tokenizer(),
            )
        )
    assert losses[0] == pytest.approx(math.log(2), rel=1e-3) and losses[-1] < losses[0]
