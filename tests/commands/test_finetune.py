"""``lora-ext finetune`` of a classifier, from options to files, on a tiny model."""

from __future__ import annotations

import json
import random
from pathlib import Path

import numpy as np
import peft
import pytest
import torch
from safetensors.torch import load_file
from support import tiny_classifier
from support.command_lines import Run, mistake, stopped_after
from support.models import snapshot
from transformers import AutoModelForSequenceClassification, AutoTokenizer, RobertaConfig, RobertaForMaskedLM

from lora_ext.commands import main, trainer
from lora_ext.methods import load_method

pytestmark = [pytest.mark.cpu_only("the Trainer chooses the device"), pytest.mark.full]


@pytest.fixture(scope="module")
def trained(tiny: list[str], lora: list[str], tmp_path_factory: pytest.TempPathFactory) -> Run:
    """A finished run."""
    out = tmp_path_factory.mktemp("trained") / "run"
    assert main(["finetune", *tiny, *lora, "--output_dir", str(out)]) == 0
    return Run(out, "")


def test_a_run_learns_and_says_what_it_did(trained):
    metrics = trained.metrics
    assert metrics["task"] == "classification" and metrics["method"] == "lora"
    assert metrics["labels"] == ["neg", "pos"]
    assert sum(metrics["examples"].values()) == 300 and min(metrics["examples"].values()) >= 30
    assert metrics["test"]["accuracy"] > metrics["majority"]["accuracy"] + 0.2
    assert metrics["global_batch_size"] == 16 and metrics["processes"] == 1 and metrics["steps"] == 90
    # 2 layers, query and value, r (in + out); the head's 2 x 32 + 2
    assert metrics["trainable_parameters"] == 2 * 2 * 4 * (32 + 32) + 66
    assert metrics["train_seconds"] > 0 and metrics["tokens_per_second"] > 0 and metrics["peak_memory_bytes"] > 1e8
    assert {"adapter", "predictions.jsonl", "loss_curve.png"} <= {path.name for path in trained.out.iterdir()}
    assert (trained.out / "loss_curve.png").read_bytes()[:4] == b"\x89PNG"
    for name in ("adapter_model.safetensors", "model.safetensors"):  # a checkpoint holds what is trained, and buffers
        numbers = sum(value.numel() for value in load_file(trained.out / "checkpoint-90" / name).values())
        assert 1.0 <= numbers / metrics["trainable_parameters"] < 1.1, name


def test_scores_are_those_of_the_predictions(trained):
    rows, labels, test = trained.predictions, ["neg", "pos"], trained.metrics["test"]
    confusion = np.zeros((2, 2), int)
    for row in rows:
        assert row["predicted"] == labels[int(np.argmax(row["logits"]))]
        confusion[labels.index(row["label"]), labels.index(row["predicted"])] += 1
    assert test["confusion"] == confusion.tolist()
    assert test["accuracy"] == pytest.approx(confusion.trace() / len(rows))
    recall = confusion[1, 1] / confusion[1].sum()
    precision = confusion[1, 1] / confusion[:, 1].sum()
    assert test["per_class"]["pos"]["f1-score"] == pytest.approx(2 * recall * precision / (recall + precision))


@torch.no_grad()
def assert_predicts(model: torch.nn.Module, directory: str, run: Run) -> None:
    """Checks that a model gives the logits in the run's file."""
    tokenizer = AutoTokenizer.from_pretrained(directory)
    for row in run.predictions[:4]:
        logits = model.eval()(**tokenizer(row["text"], return_tensors="pt")).logits
        torch.testing.assert_close(logits[0], torch.tensor(row["logits"]), atol=1e-4, rtol=1e-4)


def test_peft_loads_the_adapter_and_answers_the_same(trained, tiny):
    base = AutoModelForSequenceClassification.from_pretrained(tiny[1], num_labels=2)
    assert_predicts(peft.PeftModel.from_pretrained(base, trained.out / "adapter"), tiny[1], trained)


EVERYTHING = ["--ema_decay", "0.9", "--lora_plus_ratio", "4", "--class_weights", "balanced", "--save_strategy", "steps"]
EVERYTHING += ["--save_steps", "8", "--eval_strategy", "steps", "--eval_steps", "8", "--save_total_limit", "3"]
EVERYTHING += ["--load_best_model_at_end", "true", "--metric_for_best_model", "macro_f1", "--early_stopping", "30"]


def test_resuming_gives_what_not_stopping_gives(command, finetune, tiny, lora, tmp_path, monkeypatch):
    words = [*tiny, *lora, *EVERYTHING, "--max_steps", "40"]
    whole = finetune(*words, out="whole")
    with monkeypatch.context() as patch:
        patch.setattr(trainer, "Clock", stopped_after(27))
        assert command("finetune", *words, "--output_dir", tmp_path / "parts")[0] == 130
    assert not (tmp_path / "parts" / "metrics.json").exists()
    parts = finetune(*words, "--resume_from_checkpoint", "true", out="parts")
    for name, value in whole.adapter.items():
        assert torch.equal(value, parts.adapter[name]), name
    assert whole.metrics["test"] == parts.metrics["test"] and parts.metrics["train_seconds"] > 0


@pytest.mark.parametrize("method", ["full", "bitfit", "lora", "adapter-drop", "prefix-layer", "lora+prefix-embed"])
def test_every_kind_of_method_trains_and_loads(finetune, tiny, method):
    words = ["--max_steps", "4"]
    words += ["--drop_layers", "1"] if method == "adapter-drop" else []
    words += ["--prefix_length", "3", "--max_length", "24"] if "prefix" in method else []
    run = finetune(*tiny, "--method", method, *words)
    assert f"{method} trains" in run.said
    if method == "full":
        model = AutoModelForSequenceClassification.from_pretrained(run.out / "model")
    else:
        torch.manual_seed(1)
        base = AutoModelForSequenceClassification.from_pretrained(tiny[1], num_labels=2)
        model = load_method(base, run.out / "adapter")
    assert_predicts(model, tiny[1], run)


@pytest.mark.parametrize(
    "options",
    [
        "--bf16 true --pooling mean",
        "--dtype bfloat16 --gradient_checkpointing true --gradient_accumulation_steps 2",
        "--optim adafactor --lr_scheduler_type cosine --label_smoothing_factor 0.1 --quantize nf4",
        "--quantize int8 --method bitfit",
        "--validation_split 0",
        "--dtype bfloat16 --merged true",
    ],
)
def test_options_of_trainer_and_ours(finetune, tiny, options):
    assert np.isfinite(finetune(*tiny, "--max_steps", "6", *options.split()).losses).all()


def test_a_config_file_and_the_command_line(finetune, tiny, tmp_path):
    path = tmp_path / "run.yaml"
    path.write_text("lora-targets: [query, value]\nlora_r: 2\nmax_steps: 3\nlearning_rate: 1e-3\n")
    metrics = finetune(*tiny[:-2], "--config", path, "--lora-r", "3").metrics
    assert metrics["options"]["lora_r"] == 3 and metrics["options"]["lora_targets"] == "query,value"
    assert metrics["steps"] == 3 and metrics["training"]["learning_rate"] == 1e-3


@pytest.mark.parametrize("suffix", ["csv", "tsv", "jsonl"])
def test_formats_keep_texts_and_labels_as_they_are(finetune, tiny, tmp_path, suffix):
    pairs = [(text, {"pos": "NA", "neg": "007"}[label]) for text, label in tiny_classifier.reviews(60)]
    path = tmp_path / f"data.{suffix}"
    if suffix == "jsonl":
        path.write_text("".join(json.dumps({"text": text, "label": label}) + "\n" for text, label in pairs))
    else:
        mark = {"csv": ",", "tsv": "\t"}[suffix]
        path.write_text("".join(f"{text}{mark}{label}\n" for text, label in [("text", "label"), *pairs]))
    assert finetune(*tiny, "--data", path, "--max_steps", "2").metrics["labels"] == ["007", "NA"]


def test_no_text_is_on_two_sides(finetune, tiny, tmp_path):
    pairs = tiny_classifier.reviews(60)
    train = tiny_classifier.save_reviews(tmp_path / "train.csv", [*pairs, *pairs[:10]])
    test = tiny_classifier.save_reviews(tmp_path / "test.csv", [(text.upper(), label) for text, label in pairs[:5]])
    run = finetune(*tiny, "--data", train, "--test_file", test, "--max_steps", "1")
    left_out = sum(text in {other for other, _ in pairs[:5]} for text, _ in [*pairs, *pairs[:10]])
    assert f"{left_out} texts of train are left out, because test or validation has them, too" in run.said


def test_another_run_is_neither_replaced_nor_continued(command, tiny, lora, trained):
    before = snapshot(trained.out)
    for options, expected in (
        ([], "holds a run; --resume_from_checkpoint true continues it, --overwrite"),
        (
            ["--resume_from_checkpoint", "true", "--lora_alpha", "9"],
            "holds a run with lora_alpha=8.0, not 9.0; resume it",
        ),
    ):
        assert expected in mistake(command("finetune", *tiny, *lora, "--output_dir", trained.out, *options))
    assert snapshot(trained.out) == before


def test_overwrite_replaces_a_run(finetune, tiny, lora):
    finetune(*tiny, *lora, "--max_steps", "2")
    run = finetune(*tiny, *lora, "--max_steps", "2", "--seed", "1", "--overwrite")
    assert run.metrics["training"]["seed"] == 1


def test_a_run_that_diverges_is_an_error(command, tiny, lora, tmp_path):
    words = ["--learning_rate", "1e30", "--max_steps", "8", "--output_dir", tmp_path / "run"]
    line = mistake(command("finetune", *tiny[:-2], *lora, *words))
    assert "training diverged: no finite outputs on 31 of 31 test texts" in line
    assert not (tmp_path / "run" / "metrics.json").exists()


# --- PhoBERT, on files like UIT-VSFC's --------------------------------------------------------------------------------

GOOD, BAD = ["hay", "tốt", "nhiệt_tình"], ["chán", "khó_hiểu", "tệ"]
NOUNS = ["thầy", "giảng_viên", "môn_học", "sinh_viên", "slide", "phòng"]


@pytest.fixture(scope="module")
def phobert(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """Options of a model of PhoBERT's architecture, with its tokenizer and a vocabulary of whole words."""
    directory, words = tmp_path_factory.mktemp("phobert"), [*GOOD, *BAD, *NOUNS, "rất", "là"]
    characters = sorted({char for word in words for char in word})
    pieces = words + [f"{char}@@" for char in characters] + characters
    (directory / "vocab.txt").write_text("".join(f"{piece} 1\n" for piece in pieces), encoding="utf-8")
    merges: dict[str, None] = {}
    for word in words:  # merges one character at a time, from the left
        parts = [*word[:-1], f"{word[-1]}</w>"]
        for end in range(1, len(parts)):
            merges[f"{''.join(parts[:end])} {parts[end]} 1"] = None
    (directory / "bpe.codes").write_text("\n".join([*merges, ""]), encoding="utf-8")
    settings = {"tokenizer_class": "PhobertTokenizer", "model_max_length": 30}
    (directory / "tokenizer_config.json").write_text(json.dumps(settings))
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 48}
    sizes |= {"vocab_size": len(pieces) + 5, "max_position_embeddings": 32, "type_vocab_size": 1, "pad_token_id": 1}
    RobertaForMaskedLM(RobertaConfig(**sizes, initializer_range=0.1)).save_pretrained(directory)
    return ["--model", directory, "--text_column", "sentence", "--label_column", "sentiment", "--max_length", "20"]


def feedback(path: Path, separator: str) -> Path:
    rng, rows = random.Random(0), ["sentence,sentiment,topic"]
    for _ in range(240):
        label = rng.choice([0, 2])
        nouns = " ".join(rng.choices(NOUNS, k=rng.randint(1, 4)))
        rows.append(f"{nouns} rất {rng.choice(GOOD if label else BAD)},{label},1")
    path.write_text("\n".join([*rows, ""]).replace("_", separator), encoding="utf-8")
    return path


def test_phobert_learns_from_its_files(finetune, phobert, tmp_path):
    words = ["--num_train_epochs", 8, "--per_device_train_batch_size", 8, "--learning_rate", "1e-2"]
    run = finetune(*phobert, "--data", feedback(tmp_path / "train.csv", "_"), *words, "--lora_targets", "q,v")
    assert run.metrics["labels"] == ["0", "2"] and run.metrics["test"]["accuracy"] > 0.9
    assert "segment the texts first" not in run.said
    # Query and value of two layers at rank 8, and RoBERTa's head of two layers.
    assert run.metrics["trainable_parameters"] == 4 * 8 * 64 + 32 * 32 + 32 + 2 * 32 + 2


def test_texts_that_are_not_segmented_are_noticed(finetune, phobert, tmp_path):
    data = feedback(tmp_path / "plain.csv", " ")
    assert "segment the texts first" in finetune(*phobert, "--data", data, "--max_steps", 1).said
