"""A tokenizer of a few words, decoders for it, and settings of TRL's trainers for runs of seconds."""

from __future__ import annotations

from pathlib import Path

import transformers
from support.optional import trl
from tokenizers import Tokenizer, models, pre_tokenizers
from torch import nn

WORDS = ["<pad>", "<eos>", "<unk>", "the", "sky", "is", "blue", "red", "and", "grass", "green", "not", "nice"]
TARGETS = ["q_proj", "v_proj", "down_proj"]


def tokenizer() -> transformers.PreTrainedTokenizerFast:
    words = Tokenizer(models.WordLevel({word: i for i, word in enumerate(WORDS)}, unk_token="<unk>"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=words, pad_token="<pad>", eos_token="<eos>", unk_token="<unk>"
    )


def decoder(kind: str = "Llama", **settings) -> nn.Module:
    sizes = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "max_position_embeddings": 64}
    heads = {"num_attention_heads": 2, "num_key_value_heads": 1}
    tokens = {"vocab_size": len(WORDS), "pad_token_id": 0, "eos_token_id": 1, "bos_token_id": 1}
    config = getattr(transformers, f"{kind}Config")(**sizes | heads | tokens | settings)
    return getattr(transformers, f"{kind}ForCausalLM")(config)


def save(model: nn.Module, directory: Path) -> Path:
    """Saves a base model with the tokenizer, as TRL would load it again."""
    model.save_pretrained(directory)
    tokenizer().save_pretrained(directory)
    return directory


def settings(kind: str, directory: Path, **more):
    common = {
        "output_dir": str(directory),
        "max_steps": 1,
        "per_device_train_batch_size": 2,
        "learning_rate": 0.05,
        "logging_steps": 1,
        "report_to": "none",
        "save_strategy": "no",
        "use_cpu": True,
        "bf16": False,
        "gradient_checkpointing": False,
    }
    return getattr(trl, f"{kind}Config")(**common | more)
