"""A BERT of a few thousand weights with its tokenizer, and reviews that it can learn: for runs that take seconds."""

from __future__ import annotations

import csv
import random
from pathlib import Path

import torch
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import BertConfig, BertForSequenceClassification, PreTrainedTokenizerFast

GOOD, BAD = ["good", "fine", "moving"], ["bad", "dull", "hollow"]
NOUNS = ["film", "plot", "cast", "score", "scene", "ending", "script", "story"]


def save_model(directory: Path) -> Path:
    vocabulary = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "the", "is", *GOOD, *BAD, *NOUNS]
    tokenizer = Tokenizer(models.WordLevel({word: i for i, word in enumerate(vocabulary)}, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]", special_tokens=[("[CLS]", 2), ("[SEP]", 3)]
    )
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token="[PAD]",
        unk_token="[UNK]",
        cls_token="[CLS]",
        sep_token="[SEP]",
        model_max_length=32,
    )
    fast.save_pretrained(directory)
    torch.manual_seed(0)
    config = BertConfig(
        vocab_size=len(vocabulary),
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=48,
        max_position_embeddings=32,
    )
    BertForSequenceClassification(config).bert.save_pretrained(directory)
    return directory


def reviews(count: int, seed: int = 0) -> list[tuple[str, str]]:
    """``(text, label)`` pairs of 3 to 15 words; the label follows from the one adjective."""
    rng = random.Random(seed)
    rows = []
    for _ in range(count):
        label = rng.choice(["pos", "neg"])
        nouns = rng.choices(NOUNS, k=rng.randint(1, 13))
        rows.append((f"the {' '.join(nouns)} is {rng.choice(GOOD if label == 'pos' else BAD)}", label))
    return rows


def save_reviews(path: Path, rows: list[tuple[str, str]]) -> Path:
    with path.open("w", newline="") as file:
        csv.writer(file).writerows([("text", "label"), *rows])
    return path
