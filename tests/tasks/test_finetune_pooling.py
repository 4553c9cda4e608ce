"""Tests ``finetune --pooling`` on a BERT without a pooler, as E5 is."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from peft import AutoPeftModelForSequenceClassification
from support import tiny_classifier
from transformers import AutoModelForSequenceClassification, AutoTokenizer, BertModel

from lora_ext.methods import load_method, set_pooling
from lora_ext.tasks import TaskError
from lora_ext.tasks.finetune.run import finetune
from lora_ext.tasks.finetune.settings import Settings

pytestmark = [pytest.mark.cpu_only("the Trainer chooses the device"), pytest.mark.full]


@pytest.fixture(scope="module")
def settings(tmp_path_factory: pytest.TempPathFactory) -> Settings:
    directory = tmp_path_factory.mktemp("tiny")
    tiny_classifier.save_tokenizer(directory / "model")
    torch.manual_seed(0)
    BertModel(tiny_classifier.config(), add_pooling_layer=False).save_pretrained(directory / "model")
    data = tiny_classifier.save_reviews(directory / "reviews.csv", tiny_classifier.reviews(80))
    return Settings(
        model=str(directory / "model"), data=str(data), epochs=1, batch_size=16, learning_rate=2e-2, max_length=32
    )


def logits_of(model: torch.nn.Module, out: Path) -> tuple[torch.Tensor, torch.Tensor]:
    """Returns the model's logits for the run's test texts, and those of its predictions.jsonl."""
    rows = [json.loads(line) for line in (out / "predictions.jsonl").read_text().splitlines()]
    tokenizer = AutoTokenizer.from_pretrained(json.loads((out / "metrics.json").read_text())["settings"]["model"])
    batch = tokenizer([row["text"] for row in rows], padding=True, return_tensors="pt")
    with torch.no_grad():
        return model.eval()(**batch).logits, torch.tensor([row["logits"] for row in rows])


@pytest.mark.parametrize("pooling", [None, "mean"])
@pytest.mark.parametrize("method", ["lora", "adapter-h"])
def test_files_give_the_runs_predictions(settings: Settings, method: str, pooling: str | None, tmp_path: Path):
    said: list[str] = []
    settings = replace(settings.with_method(method), pooling=pooling)
    metrics = finetune(settings, tmp_path / "run", measure=method == "lora", say=said.append)
    has_pooler = pooling is None
    assert any("has no pooler: a new one is trained with the head" in line for line in said) == has_pooler
    assert metrics["head_parameters"] == (32 * 32 + 32 if has_pooler else 0) + 2 * 32 + 2
    model = AutoModelForSequenceClassification.from_pretrained(settings.model)
    load_method(model, tmp_path / "run" / "adapter")
    torch.testing.assert_close(*logits_of(model, tmp_path / "run"), rtol=1e-4, atol=1e-5)
    if method == "lora":
        assert metrics["merged"]["same_answers"] == metrics["merged"]["texts"]
    if method == "lora" and has_pooler:
        theirs = AutoPeftModelForSequenceClassification.from_pretrained(tmp_path / "run" / "adapter", num_labels=2)
        torch.testing.assert_close(*logits_of(theirs, tmp_path / "run"), rtol=1e-4, atol=1e-5)


def test_a_whole_model_with_the_mean_trains_on(settings: Settings, tmp_path: Path):
    first = finetune(replace(settings.with_method("full"), pooling="mean"), tmp_path / "run", say=lambda line: None)
    trained = tmp_path / "run" / "model"
    assert json.loads((trained / "config.json").read_text())["classifier_pooling"] == "mean"
    model = set_pooling(AutoModelForSequenceClassification.from_pretrained(trained), "mean")
    torch.testing.assert_close(*logits_of(model, tmp_path / "run"), rtol=1e-4, atol=1e-5)
    again = replace(settings.with_method("head-only"), model=str(trained), learning_rate=1e-6)
    second = finetune(again, tmp_path / "again", say=lambda line: None)  # its config says mean
    assert second["total_parameters"] == first["total_parameters"]
    assert second["head_parameters"] == 2 * 32 + 2


def test_a_tokenizer_of_another_model_is_refused(settings: Settings, tmp_path: Path):
    for path in Path(settings.model).iterdir():
        (tmp_path / path.name).write_bytes(path.read_bytes())
    torch.manual_seed(0)
    config = tiny_classifier.config()
    config.vocab_size = 10
    BertModel(config, add_pooling_layer=False).save_pretrained(tmp_path)
    with pytest.raises(TaskError, match=r"its tokenizer gives the token 1\d, but the model has 10 tokens"):
        finetune(replace(settings, model=str(tmp_path), pooling="mean"), tmp_path / "run", say=lambda line: None)
    assert not (tmp_path / "run").exists()


def test_refusals(settings: Settings, tmp_path: Path):
    with pytest.raises(TaskError, match="--pooling is 'max', want one of cls, mean"):
        replace(settings, pooling="max")
    from transformers import GPT2Config, GPT2ForSequenceClassification

    tiny_classifier.save_tokenizer(tmp_path / "gpt2")
    config = GPT2Config(vocab_size=20, n_embd=8, n_layer=1, n_head=1, n_positions=32)
    GPT2ForSequenceClassification(config).transformer.save_pretrained(tmp_path / "gpt2")
    with pytest.raises(TaskError, match="--pooling mean: .*gpt2 is a GPT2ForSequenceClassification, whose pooling is"):
        finetune(replace(settings, model=str(tmp_path / "gpt2"), pooling="mean"), tmp_path / "run", say=lambda _: None)
