"""Tests a small PhoBERT, with its tokenizer and architecture, on files like UIT-VSFC's: sentence and sentiment."""

from __future__ import annotations

import csv
import json
import random
from pathlib import Path

import pytest
import torch
from transformers import RobertaConfig, RobertaForMaskedLM

pytestmark = pytest.mark.full

GOOD, BAD = ["hay", "tốt", "nhiệt_tình"], ["chán", "khó_hiểu", "tệ"]
NOUNS = ["thầy", "giảng_viên", "môn_học", "sinh_viên", "slide", "phòng"]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Makes a model of PhoBERT's architecture with a few thousand weights and a vocabulary of whole words."""
    directory = tmp_path_factory.mktemp("phobert")
    words = [*GOOD, *BAD, *NOUNS, "rất", "là"]
    characters = sorted({char for word in words for char in word})
    pieces = words + [f"{char}@@" for char in characters] + characters
    (directory / "vocab.txt").write_text("".join(f"{piece} 1\n" for piece in pieces), encoding="utf-8")
    merges, seen = [], set()
    for word in words:  # merges one character at a time, from the left
        parts = [*word[:-1], f"{word[-1]}</w>"]
        while len(parts) > 1:
            if (pair := (parts[0], parts[1])) not in seen:
                seen.add(pair)
                merges.append(f"{pair[0]} {pair[1]} 1")
            parts[:2] = ["".join(pair)]
    (directory / "bpe.codes").write_text("\n".join([*merges, ""]), encoding="utf-8")
    settings = {"tokenizer_class": "PhobertTokenizer", "model_max_length": 30}
    (directory / "tokenizer_config.json").write_text(json.dumps(settings))
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 48}
    config = RobertaConfig(
        vocab_size=len(pieces) + 5,
        max_position_embeddings=32,
        type_vocab_size=1,
        pad_token_id=1,
        initializer_range=0.1,
        **sizes,
    )
    RobertaForMaskedLM(config).save_pretrained(directory)
    return directory


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    rng, path = random.Random(0), tmp_path_factory.mktemp("vsfc") / "train.csv"
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        writer.writerow(["sentence", "sentiment", "topic"])
        for _ in range(400):
            label = rng.choice([0, 2])
            nouns = " ".join(rng.choices(NOUNS, k=rng.randint(1, 4)))
            writer.writerow([f"{nouns} rất {rng.choice(GOOD if label else BAD)}", label, 1])
    return path


COLUMNS = ["--text_column", "sentence", "--label_column", "sentiment", "--max_length", 20]


def test_it_learns_from_its_files(finetune, model, data):
    words = ["--num_train_epochs", 8, "--per_device_train_batch_size", 8, "--learning_rate", "1e-2"]
    run = finetune("--model", model, "--data", data, *COLUMNS, *words, "--lora_targets", "q,v")
    assert run.metrics["labels"] == ["0", "2"] and run.metrics["test"]["accuracy"] > 0.9
    assert "segment the texts first" not in run.said
    # Query and value of two layers at rank 8, and RoBERTa's head of two layers.
    assert run.metrics["trainable_parameters"] == 4 * 8 * 64 + 32 * 32 + 32 + 2 * 32 + 2


def test_texts_that_are_not_segmented_are_noticed(finetune, model, data, tmp_path):
    plain = tmp_path / "plain.csv"
    plain.write_text(data.read_text(encoding="utf-8").replace("_", " "), encoding="utf-8")
    assert "segment the texts first" in finetune("--model", model, "--data", plain, *COLUMNS, "--max_steps", 1).said
