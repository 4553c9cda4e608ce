"""Makes decoders of a few thousand weights, a tokenizer with a chat template, and chats, for runs of seconds."""

from __future__ import annotations

import json
import random
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import Gemma3ForCausalLM, Gemma3TextConfig, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

TEMPLATE = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n{{ message['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
MARKED = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n"
    "{% if message['role'] == 'assistant' %}{% generation %}{{ message['content'] }}<|im_end|>{% endgeneration %}"
    "{% else %}{{ message['content'] }}<|im_end|>{% endif %}{{ '\n' }}{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)

SPECIAL = ["<pad>", "<|end|>", "<|im_start|>", "<|im_end|>"]
COLOURS = ["red", "green", "blue", "black"]
THINGS = ["sky", "sea", "leaf", "coal", "rose", "frog", "night", "brick"]
LENGTH = 256  # positions


def tokenizer(template: str | None = TEMPLATE, **options: Any) -> PreTrainedTokenizerFast:
    """A byte-level BPE tokenizer with a few merges."""
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=320, special_tokens=SPECIAL, initial_alphabet=alphabet, show_progress=False
    )
    bpe.train_from_iterator([f"What is the colour of the {thing}? {c}" for thing in THINGS for c in COLOURS], trainer)
    options = {"pad_token": "<pad>", "eos_token": "<|end|>", "model_max_length": LENGTH} | options
    fast = PreTrainedTokenizerFast(tokenizer_object=bpe, extra_special_tokens=["<|im_start|>", "<|im_end|>"], **options)
    fast.chat_template = template
    return fast


def sizes(**options: Any) -> dict[str, Any]:
    found = {
        "vocab_size": 320,
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "num_key_value_heads": 1,
        "head_dim": 16,
        "max_position_embeddings": LENGTH,
        "pad_token_id": 0,
        "bos_token_id": None,
        "eos_token_id": 1,
        "initializer_range": 0.1,
    }
    return found | options


def llama(**options: Any) -> LlamaForCausalLM:
    torch.manual_seed(0)
    return LlamaForCausalLM(LlamaConfig(**sizes(**options)))


def gemma3(**options: Any) -> Gemma3ForCausalLM:
    """With a layer of sliding attention, which sees eight tokens."""
    torch.manual_seed(0)
    layers = ["sliding_attention", "full_attention"]
    config = Gemma3TextConfig(**sizes(layer_types=layers, sliding_window=8, query_pre_attn_scalar=16, **options))
    return Gemma3ForCausalLM(config)


def save(directory: Path, model: torch.nn.Module | None = None, template: str | None = TEMPLATE) -> Path:
    (model or llama()).save_pretrained(directory)
    tokenizer(template).save_pretrained(directory)
    return directory


def questions(count: int, seed: int = 0) -> list[tuple[str, str]]:
    """Makes distinct ``(question, answer)`` pairs; the thing decides the answer."""
    rng = random.Random(seed)
    found: dict[str, str] = {}
    while len(found) < count:
        first, second = rng.choice(THINGS), rng.choice(THINGS)
        found[f"What is the colour of the {first} near {rng.randint(1, 99)} {second}?"] = COLOURS[
            THINGS.index(first) % len(COLOURS)
        ]
    return list(found.items())


def chats(pairs: Iterable[tuple[str, str]]) -> list[dict[str, Any]]:
    return [
        {"messages": [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]}
        for question, answer in pairs
    ]


def completions(pairs: Iterable[tuple[str, str]]) -> list[dict[str, Any]]:
    return [{"prompt": question, "completion": f" {answer}"} for question, answer in pairs]


def texts(pairs: Iterable[tuple[str, str]]) -> list[dict[str, Any]]:
    return [{"text": f"{question} {answer}"} for question, answer in pairs]


def save_rows(path: Path, rows: Iterable[Any]) -> Path:
    path.write_text("".join((row if isinstance(row, str) else json.dumps(row)) + "\n" for row in rows))
    return path
