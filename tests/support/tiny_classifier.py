"""Makes a BERT of a few thousand weights, its tokenizer, and reviews that it can learn, for runs of seconds."""

from __future__ import annotations

import csv
import random
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import BertConfig, BertForSequenceClassification, PreTrainedTokenizerFast

GOOD, BAD = ["good", "fine", "moving"], ["bad", "dull", "hollow"]
NOUNS = ["film", "plot", "cast", "score", "scene", "ending", "script", "story"]


VOCABULARY = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "the", "is", *GOOD, *BAD, *NOUNS]
LENGTH = 32  # positions


def save_tokenizer(directory: Path, **options: Any) -> None:
    tokenizer = Tokenizer(models.WordLevel({word: i for i, word in enumerate(VOCABULARY)}, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]", special_tokens=[("[CLS]", 2), ("[SEP]", 3)]
    )
    options = {"pad_token": "[PAD]", "unk_token": "[UNK]", "model_max_length": LENGTH} | options
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, **options).save_pretrained(directory)


NO_DROPOUT = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}


def config(**options: Any) -> BertConfig:
    sizes = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 48}
    return BertConfig(vocab_size=len(VOCABULARY), max_position_embeddings=LENGTH, **sizes | options)


def save_model(directory: Path, **options: Any) -> Path:
    """Saves a model with ``options`` of :func:`config` and its tokenizer."""
    save_tokenizer(directory)
    torch.manual_seed(0)
    BertForSequenceClassification(config(**options)).bert.save_pretrained(directory)
    return directory


def reviews(count: int, seed: int = 0) -> list[tuple[str, str]]:
    """Makes ``(text, label)`` pairs of 3 to 15 words; the only adjective decides the label."""
    rng = random.Random(seed)
    rows = []
    for _ in range(count):
        label = rng.choice(["pos", "neg"])
        nouns = rng.choices(NOUNS, k=rng.randint(1, 13))
        rows.append((f"the {' '.join(nouns)} is {rng.choice(GOOD if label == 'pos' else BAD)}", label))
    return rows


def save(directory: Path, count: int = 300) -> dict[str, str]:
    """Saves a model and ``count`` reviews; returns their options."""
    data = save_reviews(directory / "reviews.csv", reviews(count))
    return {"model": str(save_model(directory / "model")), "data": str(data)}


def save_reviews(path: Path, rows: list[tuple[str, str]]) -> Path:
    with path.open("w", newline="") as file:
        csv.writer(file).writerows([("text", "label"), *rows])
    return path
