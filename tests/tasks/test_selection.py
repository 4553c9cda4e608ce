"""Tests ``--best-metric``, ``--early-stopping`` and ``--class-weights``."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from support import tiny_classifier
from support.optional import sklearn_class_weight
from transformers import BertForSequenceClassification, Trainer

from lora_ext.tasks import TaskError
from lora_ext.tasks.causal_lm.settings import CausalSettings
from lora_ext.tasks.finetune import run_checkpoints as checkpoints
from lora_ext.tasks.finetune.run import finetune
from lora_ext.tasks.finetune.selection import balanced
from lora_ext.tasks.finetune.settings import Settings
from lora_ext.tasks.finetune.trainer import build_trainer

pytestmark = pytest.mark.cpu_only("the Trainer chooses the device")


@pytest.fixture(scope="module")
def settings(tmp_path_factory: pytest.TempPathFactory) -> Settings:
    """Settings of runs whose validation loss falls, and rises again: the learning rate is far too high."""
    return Settings(
        **tiny_classifier.save(tmp_path_factory.mktemp("tiny"), 60),
        epochs=5,
        learning_rate=0.3,
        schedule="constant",
        max_length=32,
        validation_split=0.3,
    )


@pytest.fixture
def every_step(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(checkpoints, "SECONDS", 0.0)
    monkeypatch.setattr(checkpoints, "_SHARE", 0.0)


def run(settings: Settings, out: Path, **more: Any) -> dict[str, Any]:
    return finetune(settings, out, measure=False, say=lambda line: None, **more)


def evaluations(out: Path) -> list[dict[str, float]]:
    last = max(out.glob("checkpoints/*"), key=lambda path: int(path.name.rpartition("-")[2]))
    history = json.loads((last / "trainer_state.json").read_text())["log_history"]
    return [entry for entry in history if "eval_loss" in entry]


@pytest.mark.full
@pytest.mark.parametrize("ema_decay", [0.0, 0.9])
def test_the_best_epochs_weights_are_kept_and_training_stops(settings: Settings, tmp_path: Path, ema_decay: float):
    settings = replace(settings, best_metric="loss", early_stopping=2, epochs=30, ema_decay=ema_decay)
    metrics = run(settings, tmp_path / "run")
    found = evaluations(tmp_path / "run")
    losses = [entry["eval_loss"] for entry in found]
    best = int(np.argmin(losses))
    assert metrics["stopped_early"] and len(found) == best + 3 < 30  # two more, which are no better
    assert metrics["best"] == {
        "metric": "loss",
        "value": losses[best],
        "step": found[best]["step"],
        "epoch": found[best]["epoch"],
    }
    assert metrics["validation"]["loss"] == losses[best] and metrics["steps"] == found[-1]["step"]
    kept = tmp_path / "run" / "checkpoints" / f"checkpoint-{found[best]['step']}"
    weights = load_file(tmp_path / "run" / "adapter" / "adapter_model.safetensors")
    if ema_decay:  # what was evaluated is the average
        averages = load_file(kept / "average.safetensors")
        head = weights["base_model.model.classifier.weight"]
        assert any(torch.equal(value, head) for name, value in averages.items() if "classifier" in name)
    else:
        stored = load_file(kept / "adapter_model.safetensors")
        assert all(torch.equal(weights[name], stored[name]) for name in weights)
    again = run(settings, tmp_path / "run", resume=True)  # a finished run is only evaluated again
    assert (again["after"], again["best"]) == (metrics["after"], metrics["best"])


@pytest.mark.full
def test_without_a_better_epoch_the_first_one_stays_among_the_checkpoints(settings, every_step, tmp_path: Path):
    # So low a rate that no epoch changes an answer.
    metrics = run(replace(settings, best_metric="accuracy", epochs=4, learning_rate=1e-9), tmp_path / "run")
    assert not metrics["stopped_early"]
    steps = sorted(int(path.name.rpartition("-")[2]) for path in (tmp_path / "run" / "checkpoints").iterdir())
    found = evaluations(tmp_path / "run")
    assert metrics["best"]["value"] == max(entry["eval_accuracy"] for entry in found)
    first = next(entry for entry in found if entry["eval_accuracy"] == metrics["best"]["value"])
    last = found[-1]["step"]
    assert metrics["best"]["step"] == first["step"]  # of equal ones the first
    assert steps == sorted({first["step"], last - 1, last})


def test_classes_weigh_the_same_whatever_their_size():
    classes = np.array([0] * 90 + [1] * 8 + [2] * 2)
    theirs = sklearn_class_weight.compute_class_weight("balanced", classes=np.arange(3), y=classes)
    assert balanced(classes, 3).tolist() == pytest.approx(theirs.tolist())
    assert float(balanced(classes, 3)[torch.from_numpy(classes)].mean()) == pytest.approx(1.0)


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_the_loss_is_weighted(settings: Settings, tmp_path: Path, smoothing: float):
    torch.manual_seed(0)
    model = BertForSequenceClassification(tiny_classifier.config(num_labels=3)).eval()
    rows = [{"input_ids": [2, 5 + i, 3], "labels": i % 3} for i in range(8)]
    batch = {name: torch.tensor([row[name] for row in rows]) for name in ("input_ids", "labels")}
    settings = replace(settings.with_method("full"), set=f"label_smoothing_factor={smoothing}")
    trainer = build_trainer(model, settings, tmp_path, rows, [], None)
    plain = float(Trainer.compute_loss(trainer, model, dict(batch)))
    assert float(trainer.compute_loss(model, dict(batch))) == plain
    trainer.class_weights = torch.ones(3)
    assert float(trainer.compute_loss(model, dict(batch))) == pytest.approx(plain, rel=1e-6)
    trainer.class_weights = torch.tensor([0.2, 0.3, 4.0])
    logits = model(batch["input_ids"]).logits.log_softmax(-1)
    target = torch.nn.functional.one_hot(batch["labels"], 3) * (1 - smoothing) + smoothing / 3
    expected = (-(target * logits).sum(1) * trainer.class_weights[batch["labels"]]).mean()
    loss, outputs = trainer.compute_loss(model, dict(batch), return_outputs=True)
    assert float(loss) == pytest.approx(float(expected), rel=1e-5) and outputs["logits"].shape == (8, 3)


@pytest.mark.full
def test_a_rare_class_is_answered(settings: Settings, tmp_path: Path):
    """One text in ten is negative; without weights, an epoch of the head only learns that most are positive."""
    rows = tiny_classifier.reviews(800, seed=7)
    negative = [row for row in rows if row[1] == "neg"][:20]
    positive = [row for row in rows if row[1] == "pos"][:180]
    data = tiny_classifier.save_reviews(tmp_path / "rare.csv", positive + negative)
    test = tiny_classifier.save_reviews(tmp_path / "test.csv", tiny_classifier.reviews(60, seed=8))
    rare = replace(settings.with_method("head-only"), data=str(data), test_file=str(test), validation_split=0.0)
    rare = replace(rare, epochs=1, learning_rate=5e-3, schedule="linear")
    recalls = []
    for weights in (None, "balanced"):
        metrics = run(replace(rare, class_weights=weights), tmp_path / str(weights))
        recalls.append(next(one["recall"] for one in metrics["after"]["classes"] if one["label"] == "neg"))
    assert recalls[1] > recalls[0] + 0.2


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"best_metric": "f1"}, "--best-metric is 'f1', want one of loss, accuracy, macro_f1, weighted_f1"),
        ({"early_stopping": 2}, "--early-stopping goes with --best-metric"),
        ({"early_stopping": 0, "best_metric": "loss"}, "--early-stopping is 0, want at least 1"),
        ({"class_weights": "sqrt"}, "--class-weights is 'sqrt', want balanced"),
        ({"set": "load_best_model_at_end=true"}, "--set load_best_model_at_end: use --best-metric"),
    ],
)
def test_options_are_checked(settings: Settings, changes: dict[str, Any], message: str):
    with pytest.raises(TaskError, match=message):
        replace(settings, **changes)


def test_other_refusals(settings: Settings, tmp_path: Path):
    with pytest.raises(TaskError, match="--best-metric loss: there are no validation texts .* --validation-split"):
        run(replace(settings, best_metric="loss", validation_split=0.0), tmp_path / "run")
    assert not (tmp_path / "run").exists()
    assert CausalSettings(best_metric="perplexity", early_stopping=1).best_metric == "perplexity"
    with pytest.raises(TaskError, match="--best-metric is 'accuracy', want one of loss, perplexity"):
        CausalSettings(best_metric="accuracy")
    with pytest.raises(TaskError, match="--class-weights goes with classification"):
        CausalSettings(class_weights="balanced")
