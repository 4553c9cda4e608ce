"""``finetune --quantize``: which layers are quantised, which methods train next to them, and the files."""

from __future__ import annotations

import importlib.util
import json
from dataclasses import replace
from pathlib import Path

import peft
import pytest
import torch
from support import tiny_classifier
from transformers import (
    AutoModelForSequenceClassification,
    AutoTokenizer,
    BertForSequenceClassification,
    BitsAndBytesConfig,
)

from lora_ext import cli
from lora_ext.methods import load_method
from lora_ext.quantized import quantized_weight
from lora_ext.tasks import TaskError
from lora_ext.tasks.finetune import quantize
from lora_ext.tasks.finetune.run import finetune
from lora_ext.tasks.finetune.settings import Settings
from lora_ext.tasks.finetune.task_model import load_model

pytestmark = [pytest.mark.cpu_only("the Trainer chooses the device"), pytest.mark.full]


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Settings:
    directory = tmp_path_factory.mktemp("tiny")
    sizes = {"hidden_size": 64, "intermediate_size": 128}  # multiples of bitsandbytes' block size
    return Settings(
        model=str(tiny_classifier.save_model(directory / "model", **sizes)),
        data=str(tiny_classifier.save_reviews(directory / "reviews.csv", tiny_classifier.reviews(240))),
        quantize="nf4",
        r=4,
        lora_alpha=8,
        epochs=6,
        batch_size=16,
        learning_rate=2e-2,
        max_length=32,
    )


def quantized(path: str, name: str) -> BertForSequenceClassification:
    """The base model as a user loads it again."""
    how = {"load_in_8bit": True} if name == "int8" else {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4"}
    if name == "nf4":
        how["bnb_4bit_use_double_quant"] = True
    config = BitsAndBytesConfig(**how, llm_int8_skip_modules=["classifier"])
    return AutoModelForSequenceClassification.from_pretrained(path, quantization_config=config, dtype=torch.float32)


@pytest.mark.parametrize("name", quantize.QUANTIZE)
def test_it_learns_and_its_adapter_loads(tiny: Settings, name: str, tmp_path: Path):
    settings = replace(tiny, quantize=name)
    metrics = finetune(settings, tmp_path / "out")
    assert metrics["settings"]["quantize"] == name and "--quantize" in metrics["command"]
    assert metrics["after"]["accuracy"] >= 0.7  # 24 texts of two classes
    assert metrics["merged"]["same_answers"] >= metrics["merged"]["texts"] - 1
    plain = AutoModelForSequenceClassification.from_pretrained(settings.model)
    head = sum(p.numel() for p in plain.classifier.parameters())
    adapters = metrics["trainable_parameters"] - head
    # The total counts the weights as they were, and the head once more, frozen.
    assert metrics["total_parameters"] == sum(p.numel() for p in plain.parameters()) + head + adapters

    rows = [json.loads(line) for line in (tmp_path / "out" / "predictions.jsonl").read_text().splitlines()][:16]
    tokenizer = AutoTokenizer.from_pretrained(settings.model)
    batch = tokenizer([row["text"] for row in rows], padding=True, return_tensors="pt")
    for model in (
        load_method(quantized(settings.model, name), tmp_path / "out" / "adapter"),
        peft.PeftModel.from_pretrained(quantized(settings.model, name), tmp_path / "out" / "adapter"),
    ):
        with torch.no_grad():
            answers = model.eval()(**batch).logits.argmax(-1).tolist()
        labels = sorted({row["label"] for row in rows})
        assert sum(labels[a] == row["predicted"] for a, row in zip(answers, rows, strict=True)) >= len(rows) - 1


def test_which_layers_are_quantised(tiny: Settings):
    settings = replace(tiny, modules_to_save="pooler")
    model = load_model(settings.model, ["a", "b"], 32, quantization=quantize.quantization_of(settings)).model
    weights = {path: quantized_weight(module) for path, module in model.named_modules()}
    assert {path for path, weight in weights.items() if weight is not None} == {
        path
        for path, module in model.named_modules()
        if isinstance(module, torch.nn.Linear) and "classifier" not in path and "pooler" not in path
    }
    assert {weight.name for weight in weights.values() if weight is not None} == {"bitsandbytes NF4"}


@pytest.mark.parametrize("method", quantize.QUANTIZABLE)
def test_every_other_method_trains_next_to_quantised_weights(tiny: Settings, method: str, tmp_path: Path):
    base = replace(Settings(method=method), model=tiny.model, data=tiny.data, max_length=24, quantize="nf4")
    options = {"prefix_length": 2} if method.startswith("prefix") else {}
    settings = replace(base, epochs=0.2, learning_rate=1e-2, **options)
    metrics = finetune(settings, tmp_path / "out", measure=False)
    assert metrics["trainable_parameters"] > 0 and metrics["after"]["accuracy"] > 0


def test_a_run_is_resumed_to_the_same_result(tiny: Settings, tmp_path: Path):
    settings = replace(tiny, epochs=0.4)
    whole = finetune(settings, tmp_path / "out", measure=False)
    again = finetune(settings, tmp_path / "out", resume=True, measure=False)
    assert again["after"] == whole["after"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--quantize", "nf5"], "--quantize is 'nf5', want one of nf4, int8"),
        (
            ["--quantize", "nf4", "--method", "full"],
            "--quantize nf4 freezes the weights, and --method full trains",
        ),
        (
            ["--quantize", "int8", "--method", "lora+full"],
            "--quantize int8 freezes the weights, and --method full tr",
        ),
    ],
)
def test_refusals(arguments: list[str], message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    assert cli.main(["finetune", "--out", str(tmp_path / "out"), *arguments]) != 0
    assert message in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"quantize": "int8"}, "--quantize int8: .* is quantised already; leave out --quantize"),
        ({"quantize": None, "method": "full"}, "--method full trains the weights, and those of .* are quantised"),
    ],
)
def test_a_checkpoint_that_is_quantised_already(tiny: Settings, tmp_path: Path, options: dict, message: str):
    """Transformers loads it as it is; full fine-tuning would train a part of it, and end at its first file."""
    quantized(tiny.model, "nf4").save_pretrained(tmp_path / "nf4")
    AutoTokenizer.from_pretrained(tiny.model).save_pretrained(tmp_path / "nf4")
    settings = Settings(model=str(tmp_path / "nf4"), data=tiny.data, max_length=32, epochs=0.2, **options)
    with pytest.raises(TaskError, match=message):
        finetune(settings, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_without_bitsandbytes(tiny: Settings, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    find = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name, *rest: None if name == "bitsandbytes" else find(name, *rest)
    )
    with pytest.raises(TaskError, match=r"--quantize nf4 needs bitsandbytes: pip install .*quantize"):
        finetune(tiny, tmp_path / "out")
    assert not (tmp_path / "out").exists()
