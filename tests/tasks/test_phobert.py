"""Tests a small PhoBERT, with its tokenizer and architecture, on files like UIT-VSFC's: sentence and sentiment."""

from __future__ import annotations

import csv
import json
import random
from pathlib import Path

import pytest
import torch
from transformers import AutoTokenizer, RobertaConfig, RobertaForMaskedLM

from lora_ext.cli import main
from lora_ext.tasks.finetune.data import Example
from lora_ext.tasks.finetune.task_data import segmentation_hint

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


def test_the_tokenizer_knows_segmented_words(model: Path):
    tokenizer = AutoTokenizer.from_pretrained(model)
    assert type(tokenizer).__name__ == "PhobertTokenizer"
    assert tokenizer.tokenize("giảng_viên rất nhiệt_tình") == ["giảng_viên", "rất", "nhiệt_tình"]
    assert len(tokenizer.tokenize("giảng viên")) > 2  # unsegmented words fall into pieces


@pytest.mark.parametrize("method", ["lora", "adapter-p", "lora+prefix-layer"])
def test_it_learns_from_its_files(model: Path, data: Path, tmp_path: Path, method: str):
    columns = ["--text-column", "sentence", "--label-column", "sentiment"]
    options = ["--max-length", "20", "--epochs", "8", "--batch-size", "8", "--learning-rate", "1e-2"]
    options += ["--target-modules", "q,v"] if "lora" in method else []
    command = ["finetune", "--model", str(model), "--data", str(data), *columns, *options, "--method", method]
    assert main([*command, "--out", str(tmp_path / "run")]) == 0
    metrics = json.loads((tmp_path / "run" / "metrics.json").read_text())
    assert metrics["id2label"] == {"0": "0", "1": "2"}
    assert metrics["after"]["accuracy"] > 0.9
    if method == "lora":  # query and value of two layers at rank 8, and RoBERTa's head of two layers
        assert metrics["trainable_parameters"] == 4 * 8 * 64 + 32 * 32 + 32 + 2 * 32 + 2


def test_texts_that_are_not_segmented_are_noticed(model: Path):
    tokenizer = AutoTokenizer.from_pretrained(model)
    plain, segmented = Example("sinh viên", "2", 2), Example("sinh_viên", "2", 3)
    assert "segment the texts first" in segmentation_hint(tokenizer, [plain])
    assert segmentation_hint(tokenizer, [plain, segmented]) is None
    assert segmentation_hint(object(), [plain]) is None


def test_the_command_of_finetune_vi_takes_it_unchanged(model: Path, data: Path, tmp_path: Path, capsys):
    """Its tokenizer is written in Python, so that its vocabulary stays; its head has a pooler in it."""
    rows = data.read_text(encoding="utf-8").splitlines()
    for name, part in (("train", rows[1:200]), ("dev", rows[200:240]), ("test", rows[240:])):
        lines = ["text,label", *(line.rpartition(",")[0] for line in part)]
        (tmp_path / f"{name}.csv").write_text("\n".join(lines) + "\n", encoding="utf-8")
    files = ["--data", "train", "--validation-file", "dev", "--test-file", "test"]
    files = [part if part.startswith("--") else str(tmp_path / f"{part}.csv") for part in files]
    command = ["finetune", "--model", str(model), *files, "--best-metric", "macro_f1", "--epochs", "1"]
    assert main([*command, "--max-length", "20", "--no-measure", "--out", str(tmp_path / "run")]) == 0
    metrics = json.loads((tmp_path / "run" / "metrics.json").read_text())
    assert metrics["best"]["metric"] == "macro_f1" and [one["label"] for one in metrics["after"]["classes"]] == [
        "0",
        "2",
    ]
    assert main([*command, "--max-length", "20", "--trim-vocabulary", "--out", str(tmp_path / "trimmed")]) == 2
    assert "has a PhobertTokenizer, which is written in Python and has no tokenizer.json" in capsys.readouterr().err
    assert not (tmp_path / "trimmed").exists()
