"""TRL's trainers on injected models with quantised weights: SFT equals PEFT's, DPO uses the model as its reference."""

from __future__ import annotations

import math
from pathlib import Path

import peft
import pytest
import torch
import transformers
from support.optional import datasets, trl
from support.quantized import unchanged_bytes
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import AutoModelForCausalLM, BitsAndBytesConfig, LlamaConfig, LlamaForCausalLM

from lora_ext import LoraConfig, inject, save_adapter
from lora_ext.integrations.trl import for_trl

pytestmark = [pytest.mark.full, pytest.mark.filterwarnings("ignore"), pytest.mark.cpu_only("TRL chooses the device")]

WORDS = ["<pad>", "<eos>", "<unk>", "the", "sky", "is", "blue", "red", "and", "grass", "green", "not"]
ROWS = [
    {"prompt": "the sky is", "chosen": " blue", "rejected": " red"},
    {"prompt": "grass is", "chosen": " green", "rejected": " not green"},
]
CONFIG = {"r": 4, "lora_alpha": 8, "target_modules": ["q_proj", "v_proj", "down_proj"], "task_type": "CAUSAL_LM"}


def tokenizer():
    words = Tokenizer(models.WordLevel({word: i for i, word in enumerate(WORDS)}, unk_token="<unk>"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=words, pad_token="<pad>", eos_token="<eos>", unk_token="<unk>"
    )


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("base")
    torch.manual_seed(0)
    sizes = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "max_position_embeddings": 64}
    heads = {"num_attention_heads": 2, "num_key_value_heads": 2}
    tokens = {"vocab_size": len(WORDS), "pad_token_id": 0, "eos_token_id": 1, "bos_token_id": 1}
    LlamaForCausalLM(LlamaConfig(**sizes, **heads, **tokens)).save_pretrained(directory)
    tokenizer().save_pretrained(directory)
    return directory


def base(checkpoint: Path, format: str):
    how = {"load_in_8bit": True} if format == "int8" else {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4"}
    return AutoModelForCausalLM.from_pretrained(checkpoint, quantization_config=BitsAndBytesConfig(**how))


def settings(kind: str, directory: Path, **more):
    common = {"max_steps": 4, "per_device_train_batch_size": 2, "learning_rate": 1e-2, "logging_steps": 1}
    common |= {"report_to": "none", "save_strategy": "no", "use_cpu": True, "bf16": False, "disable_tqdm": True}
    return getattr(trl, f"{kind}Config")(output_dir=str(directory), **common | more)


def losses_of(trainer) -> list[float]:
    trainer.train()
    return [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]


@pytest.mark.parametrize("format", ["nf4", "int8"])
def test_sft_has_the_losses_of_peft(checkpoint: Path, format: str, tmp_path: Path):
    ours = inject(base(checkpoint, format), LoraConfig(**CONFIG))
    save_adapter(ours, tmp_path / "start")
    theirs = peft.PeftModel.from_pretrained(base(checkpoint, format), tmp_path / "start", is_trainable=True)
    data = datasets.Dataset.from_list([{"text": row["prompt"] + row["chosen"]} for row in ROWS])
    results = []
    with unchanged_bytes(ours):
        for name, model in (("ours", ours), ("theirs", theirs)):
            args = settings("SFT", tmp_path / name)
            trainer = trl.SFTTrainer(model=model, args=args, train_dataset=data, processing_class=tokenizer())
            results.append(losses_of(trainer))
    assert results[0][-1] < results[0][0]
    assert results[0] == pytest.approx(results[1], rel=5e-3)  # TRL rounds the factors to bfloat16


def test_dpo(checkpoint: Path, tmp_path: Path):
    model = inject(base(checkpoint, "nf4"), LoraConfig(**CONFIG))
    data = datasets.Dataset.from_list(ROWS)
    with unchanged_bytes(model):
        losses = losses_of(
            trl.DPOTrainer(
                model=for_trl(model),
                args=settings("DPO", tmp_path, gradient_checkpointing=True),
                train_dataset=data,
                processing_class=tokenizer(),
            )
        )
    assert losses[0] == pytest.approx(math.log(2), rel=1e-3) and losses[-1] < losses[0]
