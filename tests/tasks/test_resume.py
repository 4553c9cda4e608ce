"""Tests that a run stopped anywhere resumes to the bits of an uninterrupted run."""

from __future__ import annotations

import json
import os
import shutil
import signal
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from support import tiny_classifier
from support.command_lines import silent

from lora_ext.tasks import TaskError
from lora_ext.tasks.finetune import busy_machine
from lora_ext.tasks.finetune import run_checkpoints as checkpoints
from lora_ext.tasks.finetune.run import finetune
from lora_ext.tasks.finetune.settings import Settings
from lora_ext.tasks.finetune.trainer import Interrupted

pytestmark = pytest.mark.full


@pytest.fixture(scope="module")
def settings(tmp_path_factory: pytest.TempPathFactory) -> Settings:
    """Settings of runs with three steps an epoch and dropout in the model and the adapter."""
    return Settings(
        **tiny_classifier.save(tmp_path_factory.mktemp("tiny"), 60),
        target_modules="query,value",
        r=4,
        lora_dropout=0.2,
        epochs=2,
        batch_size=16,
        learning_rate=2e-2,
        max_length=32,
        validation_split=0.2,
    )


def run(settings: Settings, out: Path, **more: Any) -> dict[str, Any]:
    return finetune(settings, out, measure=False, say=silent, **more)


def steps_of(out: Path) -> list[int]:
    return sorted(int(path.name.rpartition("-")[2]) for path in out.glob("checkpoints/*"))


def result_of(out: Path) -> dict[str, Any]:
    """Reads the results that must not depend on how often a run was stopped."""
    metrics = json.loads((out / "metrics.json").read_text())
    last = max(out.glob("checkpoints/*"), key=lambda path: int(path.name.rpartition("-")[2]))
    history = json.loads((last / "trainer_state.json").read_text())["log_history"]
    timed = ("_runtime", "_per_second")
    return {
        "weights": {
            f"{path.parent.name}/{path.name}": load_file(path)
            for path in [*out.glob("adapter/*.safetensors"), *out.glob("model/*.safetensors")]
        },
        "metrics": {name: metrics[name] for name in ("validation", "after", "majority", "trainable_parameters")},
        "history": [{key: value for key, value in entry.items() if not key.endswith(timed)} for entry in history],
        "optimizer": torch.load(last / "optimizer.pt")["state"],
        "predictions": (out / "predictions.jsonl").read_bytes(),
        "steps": int(last.name.rpartition("-")[2]),
    }


def assert_same(first: Any, second: Any, where: str = "") -> None:
    assert type(first) is type(second), where
    if isinstance(first, dict):
        assert first.keys() == second.keys(), where
        for key in first:
            assert_same(first[key], second[key], f"{where}/{key}")
    elif isinstance(first, torch.Tensor):
        assert torch.equal(first, second), f"{where}: {(first - second).abs().max()} apart"
    else:
        assert first == second, where


CASES = {
    "lora": {},
    "no evaluation": {"validation_split": 0.0},
    "average, constant, bfloat16": {"ema_decay": 0.9, "schedule": "constant", "precision": "bfloat16"},
    "part of an epoch": {"epochs": 1.5, "schedule": "constant"},
    "full": {"method": "full", "learning_rate": 5e-3},
    "accumulated, checkpointed": {"batch_size": 5, "accumulation_steps": 3, "gradient_checkpointing": "reentrant"},
    "16 bits, other optimizer": {
        "dtype": "bfloat16",
        "accumulation_steps": 2,
        "batch_size": 8,
        "gradient_checkpointing": "non-reentrant",
        "set": "weight_decay=0.1 lr_scheduler_type=cosine optim=adafactor neftune_noise_alpha=3",
    },
    "best epoch, stopped early": {
        "best_metric": "loss",
        "early_stopping": 2,
        "class_weights": "balanced",
        "learning_rate": 0.3,
        "epochs": 6,
    },
    "adapters and prefixes": {"method": "adapter-p+prefix-layer", "epochs": 1.3},
}


@pytest.mark.parametrize("changes", CASES.values(), ids=CASES)
def test_killed_after_any_checkpoint_and_resumed(settings, every_step, tmp_path: Path, changes: dict[str, Any]):
    if "method" in changes:
        settings = settings.with_method(changes["method"])
    settings = replace(settings, **changes)
    whole = tmp_path / "whole"
    run(settings, whole)
    expected, steps = result_of(whole), steps_of(whole)
    assert steps == list(range(1, expected["steps"] + 1)) and len(steps) > 3
    few = [2, 3, steps[-1]]  # inside an epoch, at its end, at the last
    for step in [0, *steps] if not changes else few:
        out = tmp_path / str(step)
        shutil.copytree(whole, out, ignore=shutil.ignore_patterns("adapter", "model", "metrics.json", "*.jsonl"))
        for later in steps[step:]:
            shutil.rmtree(out / "checkpoints" / f"checkpoint-{later}")
        run(settings, out, resume=True)
        assert_same(result_of(out), expected, f"after {step}")


def test_interrupted_at_any_step_and_resumed(settings, tmp_path: Path):
    """Ctrl-C writes a checkpoint at any step, including losses that are not logged yet."""
    settings = replace(settings, epochs=70, learning_rate=2e-3, validation_split=0.6)  # logs every second of 140 steps
    whole, out = tmp_path / "whole", tmp_path / "out"
    run(settings, whole)
    expected = result_of(whole)
    assert expected["steps"] == 140 and steps_of(whole) == [140]
    stops = [1, 67, 139]

    def interrupt(part: float) -> None:
        if stops and round(part * 140) == stops[0]:
            stops.pop(0)
            os.kill(os.getpid(), signal.SIGINT)

    written = []
    while stops:
        with pytest.raises(Interrupted):
            run(settings, out, resume=out.exists(), on_progress=interrupt)
        written.append(steps_of(out)[-1])
    assert written == [2, 68, 140]  # the current step is completed
    run(settings, out, resume=True)
    assert_same(result_of(out), expected)


def test_evaluation_draws_nothing_that_training_misses(settings, tmp_path: Path, monkeypatch):
    """Training uses the same random numbers with and without an evaluation after each epoch."""
    run(settings, tmp_path / "evaluated")
    build = __import__("lora_ext.tasks.finetune.run", fromlist=["x"]).build_trainer
    without = lambda model, options, out, train, _, collator: build(model, options, out, train, [], collator)  # noqa: E731
    monkeypatch.setattr("lora_ext.tasks.finetune.run.build_trainer", without)
    run(settings, tmp_path / "not")
    assert_same(result_of(tmp_path / "not")["weights"], result_of(tmp_path / "evaluated")["weights"])


def test_resuming_without_a_checkpoint_starts_from_the_beginning(settings, tmp_path: Path):
    metrics = run(settings, tmp_path / "whole")
    (tmp_path / "out").mkdir()
    shutil.copy(tmp_path / "whole" / "settings.json", tmp_path / "out")
    said = []
    again = finetune(settings, tmp_path / "out", resume=True, measure=False, say=said.append)
    assert again["after"] == metrics["after"]
    assert f"{tmp_path / 'out'} has no checkpoint yet: the run starts from the beginning" in said


def test_checkpoints_are_two_and_take_a_tenth_of_the_time(settings, tmp_path: Path, monkeypatch):
    now = [0.0]
    monkeypatch.setattr(checkpoints.time, "monotonic", lambda: now[0])
    clock = checkpoints.Clock()
    due = []
    for second in range(1000):
        now[0] += 1
        if clock.is_due():
            due.append(second)
            with clock.writing_one():
                now[0] += 20 if len(due) == 2 else 1
    assert due == [119, 239, 439, 559, 679, 799, 919]

    monkeypatch.undo()
    monkeypatch.setattr(checkpoints, "SECONDS", 0.0)
    monkeypatch.setattr(checkpoints, "_SHARE", 0.0)
    run(settings, tmp_path)
    assert steps_of(tmp_path) == [5, 6]


@pytest.mark.parametrize("content", [b"", b"{", b"[]", b"{}", b'{"global_step": "x"}', b"[" * 100_000, b"\xff"])
def test_a_damaged_state_is_named(settings, every_step, tmp_path: Path, content: bytes):
    state = tmp_path / "checkpoints" / "checkpoint-3" / "trainer_state.json"
    state.parent.mkdir(parents=True)
    settings.save(tmp_path)
    state.write_bytes(content)
    with pytest.raises(TaskError, match="--resume: .*checkpoint-3 cannot be read .*; delete it to continue from the"):
        run(settings, tmp_path, resume=True)


def test_a_busy_machine_gives_one_warning_with_advice(settings, tmp_path: Path, monkeypatch, capsys):
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: {0, 1})
    for threads, seconds, load, has_advice in [
        (2, 7.9, 5.2, True),
        (1, 7.9, 5.2, False),
        (2, 0.5, 5.2, False),
        (2, 9, 2.0, False),
    ]:
        monkeypatch.setattr(os, "getloadavg", lambda load=load: (load, 0.0, 0.0))
        assert bool(busy_machine.advice(threads, seconds)) == has_advice
    monkeypatch.setattr(os, "getloadavg", lambda: (5.2, 0.0, 0.0))
    monkeypatch.setattr(busy_machine, "_SLOW", 0.0)
    run(settings, tmp_path)
    said = capsys.readouterr().out
    assert said.count("5.2 processes share the 2 cores: fewer threads than 2 may be faster (Ctrl-C, then") == 1
