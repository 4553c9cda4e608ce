"""Tests the whole task on a tiny model, and once on the real one; PEFT reads its files back."""

from __future__ import annotations

import argparse
import csv
import itertools
import json
import shutil
import signal
import subprocess
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import AutoPeftModelForSequenceClassification
from safetensors.torch import load_file
from support import tiny_classifier
from support.processes import Forked
from transformers import AutoModelForSequenceClassification, AutoTokenizer, pipeline

from lora_ext import cli
from lora_ext.methods import METHODS, load_method
from lora_ext.tasks import TaskError
from lora_ext.tasks.finetune import demo
from lora_ext.tasks.finetune import run_checkpoints as checkpoints
from lora_ext.tasks.finetune.run import finetune
from lora_ext.tasks.finetune.settings import Settings, command_line

pytestmark = [pytest.mark.cpu_only("the Trainer chooses the device"), pytest.mark.full]
DRAWS = True


def unmeasured(settings: Settings, out: Path, **more: Any) -> dict[str, Any]:
    return finetune(settings, out, measure=False, **more)


@pytest.fixture(scope="module")
def run(tiny: Settings, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Any]]:
    out = tmp_path_factory.mktemp("run")
    return out, finetune(tiny, out)


@pytest.fixture(scope="module", autouse=True)
def checkpoint_after_every_fifth_step() -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        steps = itertools.count(1)
        patch.setattr(checkpoints.Clock, "is_due", lambda clock: next(steps) % 5 == 0)
        yield


def read_predictions(out: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (out / "predictions.jsonl").read_text().splitlines()]


def newest_checkpoint(out: Path) -> Path:
    return max(out.glob("checkpoints/*"), key=lambda path: int(path.name.rpartition("-")[2]))


def assert_it_has_learned(out: Path) -> None:
    """Checks that the loss fell and the answers beat the majority; most methods learn no more so soon."""
    last = newest_checkpoint(out)
    history = json.loads((last / "trainer_state.json").read_text())["log_history"]
    losses = [entry["loss"] for entry in history if "loss" in entry]
    half = len(losses) // 2
    assert sum(losses[half:]) / len(losses[half:]) < sum(losses[:half]) / half
    metrics = json.loads((out / "metrics.json").read_text())
    assert metrics["after"]["accuracy"] >= metrics["majority"]["accuracy"]


def adapter_weights(out: Path) -> dict[str, torch.Tensor]:
    return load_file(out / "adapter" / "adapter_model.safetensors")


def assert_equal_weights(first: Path, second: Path) -> None:
    a, b = adapter_weights(first), adapter_weights(second)
    assert a.keys() == b.keys()
    assert [key for key in a if not torch.equal(a[key], b[key])] == []


def assert_peft_predicts_the_same(out: Path, num_labels: int) -> None:
    model = AutoPeftModelForSequenceClassification.from_pretrained(out / "adapter", num_labels=num_labels).eval()
    tokenizer = AutoTokenizer.from_pretrained(model.peft_config["default"].base_model_name_or_path)
    metrics = json.loads((out / "metrics.json").read_text())
    predictions = read_predictions(out)
    batch = tokenizer([row["text"] for row in predictions], padding=True, return_tensors="pt")
    with torch.no_grad():
        logits = model(**batch).logits
    torch.testing.assert_close(logits, torch.tensor([row["logits"] for row in predictions]), rtol=1e-4, atol=1e-5)
    predicted = [metrics["id2label"][str(index)] for index in logits.argmax(-1).tolist()]
    assert predicted == [row["predicted"] for row in predictions]


def test_it_learns_and_reports(tiny: Settings, run: tuple[Path, dict[str, Any]]):
    out, metrics = run
    assert metrics == json.loads((out / "metrics.json").read_text())
    assert metrics["id2label"] == {"0": "neg", "1": "pos"}
    assert metrics["after"]["accuracy"] > 0.9 > metrics["majority"]["accuracy"]
    assert metrics["after"]["macro_f1"] > 0.9 > metrics["majority"]["macro_f1"]
    labels = [row["label"] for row in read_predictions(out)]
    assert metrics["majority"]["accuracy"] == labels.count(metrics["majority"]["label"]) / len(labels)
    # query and value of two layers: A [4, 32] and B [32, 4] each; the head: [2, 32] and [2]
    assert metrics["trainable_parameters"] == 4 * (4 * 32 + 32 * 4) + 2 * 32 + 2
    assert metrics["examples"]["test"] == len(read_predictions(out))
    assert 4 * metrics["trainable_parameters"] < metrics["adapter_bytes"] < metrics["full_checkpoint_bytes"]
    assert 4 * (metrics["total_parameters"] - metrics["trainable_parameters"]) <= metrics["full_checkpoint_bytes"]
    assert metrics["merged"]["texts"] == metrics["merged"]["same_answers"] == min(64, metrics["examples"]["test"])
    assert metrics["merged"]["max_logit_difference"] < 1e-4
    assert all(metrics["latency"][f"{name}_seconds"] > 0 for name in ("base", "adapted", "merged"))
    assert metrics["tokens_per_second"] > 0 < metrics["peak_memory_bytes"]
    assert metrics["machine"]["torch"] == torch.__version__
    assert (out / "loss_curve.png").read_bytes().startswith(b"\x89PNG")


def test_predictions_belong_to_their_texts(tiny: Settings, run: tuple[Path, dict[str, Any]]):
    out, metrics = run
    rows = read_predictions(out)
    with open(tiny.data, newline="") as file:
        source = list(csv.reader(file))
    assert all(source[row["line"] - 1] == [row["text"], row["label"]] for row in rows)
    share = sum(row["label"] == row["predicted"] for row in rows) / len(rows)
    assert share == pytest.approx(metrics["after"]["accuracy"])


def test_peft_loads_the_adapter_and_predicts_the_same(run: tuple[Path, dict[str, Any]]):
    assert_peft_predicts_the_same(run[0], num_labels=2)


def test_checkpoints_are_few_and_hold_no_base_weights(run: tuple[Path, dict[str, Any]]):
    checkpoints = sorted((run[0] / "checkpoints").iterdir())
    assert len(checkpoints) == 2
    names = {path.name for path in checkpoints[-1].iterdir()}
    assert {"adapter_model.safetensors", "optimizer.pt", "rng_state.pth", "trainer_state.json"} <= names
    assert not {"model.safetensors", "pytorch_model.bin"} & names


def test_the_seed_decides_the_result(tiny: Settings, tmp_path: Path):
    settings = replace(tiny, epochs=1)
    for name, seed in (("first", 0), ("same", 0), ("other", 1)):
        unmeasured(replace(settings, seed=seed), tmp_path / name)
    assert_equal_weights(tmp_path / "first", tmp_path / "same")
    first, other = (adapter_weights(tmp_path / name) for name in ("first", "other"))
    key = next(key for key in first if "lora_B" in key)
    assert not torch.equal(first[key], other[key])


@pytest.mark.parametrize("name", ["adapter_model.safetensors", "optimizer.pt"])
def test_damaged_checkpoint_is_named_and_the_one_before_still_works(
    run: tuple[Path, dict[str, Any]], tiny: Settings, tmp_path: Path, name: str
):
    finished, metrics = run
    out = tmp_path / "out"
    shutil.copytree(finished, out)
    newest, before = sorted(out.glob("checkpoints/checkpoint-*"), key=lambda p: -int(p.name.rpartition("-")[2]))[:2]
    if name == "optimizer.pt":  # not read after the last step
        shutil.rmtree(newest)
        newest = before
    (newest / name).write_bytes(b"damaged")
    with pytest.raises(TaskError, match=rf"--resume: .*{newest.name} cannot be read .*; delete it to continue from"):
        unmeasured(tiny, out, resume=True)
    shutil.rmtree(newest)
    assert unmeasured(tiny, out, resume=True)["after"] == metrics["after"]


EVERY_STEP = """
import sys
from lora_ext.cli import main
from lora_ext.tasks.finetune import run_checkpoints
run_checkpoints.SECONDS = run_checkpoints._SHARE = 0.0
sys.exit(main())
"""


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])  # a terminal's, a scheduler's
def test_interrupted_and_resumed_ends_like_uninterrupted(tiny: Settings, tmp_path: Path, monkeypatch, number):
    settings = ["--model", tiny.model, "--data", tiny.data, "--target-modules", "query,value", "--epochs", "3"]
    settings += ["--batch-size", "8", "--max-length", "32"]
    out = tmp_path / "interrupted"
    process = Forked(
        *("-c", EVERY_STEP, "finetune", *settings, "--out", out),
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        OMP_NUM_THREADS=str(torch.get_num_threads()),
    )
    while not list(out.glob("checkpoints/*/trainer_state.json")):  # long before the end of 90 steps
        assert process.poll() is None, process.stdout.read()
        time.sleep(0.01)
    process.send_signal(number)
    output = process.communicate()[0]
    assert process.returncode == 128 + number, output
    assert "stopping after this step" in output
    assert f"to continue: lora-ext finetune --resume --out {out}" in output
    assert not (out / "metrics.json").exists()
    newest = max(int(path.name.split("-")[1]) for path in (out / "checkpoints").iterdir())
    assert newest % 30 != 0, "want a checkpoint in the middle of an epoch, which has 30 steps"

    whole = tmp_path / "whole"
    monkeypatch.setattr(checkpoints.Clock, "is_due", lambda clock: False)  # only at the end
    assert cli.main(["finetune", "--resume", "--out", str(out)]) == 0
    assert cli.main(["finetune", *settings, "--out", str(whole)]) == 0
    assert_equal_weights(out, whole)
    resumed, uninterrupted = (json.loads((path / "metrics.json").read_text()) for path in (out, whole))
    assert resumed["majority"] == uninterrupted["majority"]
    assert resumed["after"] == uninterrupted["after"]
    assert resumed["validation"] == uninterrupted["validation"]


def test_resuming_a_finished_run_trains_no_further(tiny: Settings, tmp_path: Path):
    settings = replace(tiny, epochs=1)
    first = unmeasured(settings, tmp_path)
    weights = adapter_weights(tmp_path)
    again = unmeasured(settings, tmp_path, resume=True)
    assert again["after"] == first["after"] and again["validation"] == first["validation"]
    assert again["train_seconds"] == first["train_seconds"] > 0  # of all parts of the run
    assert again["tokens_per_second"] == first["tokens_per_second"]
    assert all(torch.equal(weights[key], value) for key, value in adapter_weights(tmp_path).items())


def test_a_test_file_is_the_test_set_and_its_texts_are_not_trained_on(tiny: Settings, tmp_path: Path):
    rows = tiny_classifier.reviews(200)
    test_rows = rows[:50]
    distinct = len({text for text, _ in test_rows})
    test_file = tiny_classifier.save_reviews(tmp_path / "test.csv", test_rows)
    data = tiny_classifier.save_reviews(tmp_path / "all.csv", rows)
    settings = replace(tiny, data=str(data), test_file=str(test_file), epochs=1)
    metrics = unmeasured(settings, tmp_path / "out")
    assert metrics["examples"]["test"] == 50
    assert metrics["examples"]["train"] + metrics["examples"]["validation"] <= 200 - distinct


@pytest.mark.parametrize("method", sorted({*METHODS, "lora+adapter-p"} - {"lora", "full"}))
def test_every_method_learns_and_resumes(tiny: Settings, tmp_path: Path, method: str):
    learning_rate = 0.1 if method in ("bitfit", "head-only") else tiny.learning_rate
    settings = replace(tiny.with_method(method), learning_rate=learning_rate, epochs=3)
    metrics = finetune(settings, tmp_path)
    assert_it_has_learned(tmp_path)
    checkpoint = newest_checkpoint(tmp_path)
    shutil.rmtree(checkpoint)
    again = unmeasured(settings, tmp_path, resume=True)
    assert again["after"] == metrics["after"]
    assert again["trainable_parameters"] == metrics["trainable_parameters"] < metrics["total_parameters"] / 2
    assert metrics["adapter_bytes"] < metrics["full_checkpoint_bytes"] / 2

    model = AutoModelForSequenceClassification.from_pretrained(tiny.model, num_labels=2)
    load_method(model, tmp_path / "adapter").eval()
    rows = read_predictions(tmp_path)
    batch = AutoTokenizer.from_pretrained(tiny.model)([row["text"] for row in rows], padding=True, return_tensors="pt")
    with torch.no_grad():
        logits = model(**batch).logits
    torch.testing.assert_close(logits, torch.tensor([row["logits"] for row in rows]), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("method", [*METHODS, "lora+prefix-layer"])
def test_the_command_in_the_results_starts_the_same_run(method: str):
    options = {
        "lora": {"r": 4, "lora_plus_ratio": 2.0, "target_modules": "(?:query|value)", "learning_rate": 1e-4},
        "adapter-drop": {"drop_layers": 1, "bottleneck_size": 8},
        "lora+prefix-layer": {"prefix_length": 3, "modules_to_save": "pooler", "epochs": 1.5},
    }
    settings = Settings(method=method, seed=3, ema_decay=0.5, **options.get(method, {}))
    command = command_line("finetune", vars(settings), Path("some where"))
    parser = argparse.ArgumentParser()
    cli.finetune.add_parser(parser.add_subparsers())
    args = parser.parse_args(command[1:])
    assert Settings(**cli.training.options_of(args)) == settings and args.out == Path("some where")


@pytest.mark.parametrize("method", ["lora", "full"])
def test_an_average_is_evaluated_saved_and_resumed(tiny: Settings, tmp_path: Path, method: str):
    rate = {"lora": tiny.learning_rate, "full": 5e-3}[method]
    changes = {"learning_rate": rate, "epochs": 2, "schedule": "constant"}
    plain = replace(tiny.with_method(method), **changes)
    unmeasured(plain, tmp_path / "plain")
    settings = replace(plain, ema_decay=0.9)
    metrics = unmeasured(settings, tmp_path / "averaged")
    assert metrics["after"]["accuracy"] > 0.6
    file = {"lora": "adapter/adapter_model.safetensors", "full": "model/model.safetensors"}[method]
    last, averaged = (load_file(tmp_path / name / file) for name in ("plain", "averaged"))
    different = [name for name in last if not torch.equal(last[name], averaged[name])]
    assert len(different) > len(last) / 2  # the same steps, but another result
    checkpoints = [newest_checkpoint(tmp_path / name) for name in ("plain", "averaged")]
    last, trained = (load_file(checkpoint / Path(file).name) for checkpoint in checkpoints)
    assert last.keys() == trained.keys()
    assert all(torch.equal(trained[name], last[name]) for name in last)  # checkpoints hold the trained values
    shutil.rmtree(checkpoints[1])
    again = unmeasured(settings, tmp_path / "averaged", resume=True)
    assert (again["after"], again["validation"]) == (metrics["after"], metrics["validation"])
    resumed = load_file(tmp_path / "averaged" / file)
    assert all(torch.equal(resumed[name], averaged[name]) for name in averaged)
    with pytest.raises(TaskError, match="--ema-decay is 1.0, want 0 <= decay < 1"):
        replace(settings, ema_decay=1.0)
    with pytest.raises(TaskError, match="--schedule is 'cosine', want one of linear, constant"):
        replace(settings, schedule="cosine")


@pytest.mark.parametrize("method", ["full", *sorted({*METHODS, "lora+prefix-layer"} - {"full"})])
def test_every_method_learns_in_bfloat16(tiny: Settings, tmp_path: Path, method: str):
    rates = {"bitfit": 0.1, "head-only": 0.1, "full": 5e-3}
    rate = rates.get(method, tiny.learning_rate)
    changes = {"learning_rate": rate, "precision": "bfloat16", "epochs": 3}
    metrics = finetune(replace(tiny.with_method(method), **changes), tmp_path, measure=method == "lora")
    assert_it_has_learned(tmp_path)
    weights = load_file(
        next(tmp_path.glob("adapter/*.safetensors") if method != "full" else tmp_path.glob("model/*.saf*"))
    )
    assert {tensor.dtype for tensor in weights.values()} == {torch.float32}
    if method == "lora":  # the merge is in float32, so products round differently
        assert 0 < metrics["merged"]["max_logit_difference"] < 0.2


def test_lora_plus_is_a_higher_rate_of_lora_B_alone(tiny: Settings, tmp_path: Path):
    """AdamW's first step moves each number by its learning rate, or slightly less if the gradient is tiny."""
    settings = replace(tiny, lora_plus_ratio=4.0, epochs=0.01, warmup=0.0, lora_dropout=0.0)
    unmeasured(settings, tmp_path)
    trained = adapter_weights(tmp_path)
    moved = {name: tensor.abs().max().item() for name, tensor in trained.items() if "lora_B" in name}  # from zero
    rate = 4 * settings.learning_rate
    assert moved and all(0.9 * rate < value < rate * (1 + 1e-5) for value in moved.values())
    with pytest.raises(TaskError, match="--lora-plus-ratio goes with lora, not with --method bitfit"):
        Settings(method="bitfit", lora_plus_ratio=4.0)
    with pytest.raises(TaskError, match="--lora-plus-ratio is 0.0, want a finite number above 0"):
        Settings(lora_plus_ratio=0.0)


def test_full_fine_tuning_saves_a_whole_model(tiny: Settings, tmp_path: Path):
    settings = replace(tiny.with_method("full"), learning_rate=5e-3, epochs=2)
    metrics = finetune(settings, tmp_path)
    assert metrics["trainable_parameters"] == metrics["total_parameters"]
    assert "merged" not in metrics
    whole = pipeline("text-classification", model=str(tmp_path / "model"))
    predictions = read_predictions(tmp_path)
    assert [whole(row["text"])[0]["label"] for row in predictions] == [row["predicted"] for row in predictions]
    assert finetune(settings, tmp_path, resume=True)["after"] == metrics["after"]


def test_all_linear_and_regular_expressions_select_layers(tiny: Settings, tmp_path: Path):
    counts = {}
    for targets in ("all-linear", r"bert\.encoder\.layer\.1\..*(query|value)"):
        settings = replace(tiny, target_modules=targets, epochs=1)
        counts[targets] = unmeasured(settings, tmp_path / str(len(counts)))["trainable_parameters"]
    head = 2 * 32 + 2
    layer = 4 * (4 * 64) + 2 * 4 * (32 + 48)  # query, key, value, output; intermediate, output
    assert list(counts.values()) == [2 * layer + 4 * 64 + head, 2 * (4 * 64) + head]  # the first includes the pooler


def test_the_real_model_on_real_reviews(tmp_path: Path):
    rows = [(e.text, e.label) for e in demo.examples() if e.label != "neutral"][:200]
    data = tiny_classifier.save_reviews(tmp_path / "reviews.csv", rows)
    metrics = finetune(Settings(data=str(data), epochs=1), tmp_path / "out")
    # Factors of rank 4 on the embeddings and on six linear layers in six blocks; the pooler and the head.
    block = 4 * 4 * (384 + 384) + 2 * 4 * (384 + 1536)
    assert metrics["trainable_parameters"] == 4 * (30522 + 384) + 6 * block + 384 * 385 + 2 * 385
    assert metrics["merged"]["max_logit_difference"] < 1e-4
    state = json.loads(max((tmp_path / "out").glob("checkpoints/*/trainer_state.json")).read_text())
    losses = [entry["loss"] for entry in state["log_history"] if "loss" in entry]
    assert losses[-1] < losses[0]
    assert_peft_predicts_the_same(tmp_path / "out", num_labels=2)
