"""A tiny classifier with reviews, and a way to run a command and read what it prints."""

from __future__ import annotations

import gc
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from support import tiny_classifier
from support.analyzed import save_files
from support.command_lines import Command, Run

from lora_ext.commands import main


@pytest.fixture
def command(capsys: pytest.CaptureFixture[str]) -> Command:
    """Runs a command. Returns its exit status, and what it printed on standard output and standard error."""

    def run(*arguments: Any) -> tuple[int, str, str]:
        capsys.readouterr()
        status = main(list(map(str, arguments)))
        return status, *capsys.readouterr()

    return run


@pytest.fixture
def finetune(command: Command, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Callable[..., Run]:
    """Runs ``finetune`` into a directory of ``tmp_path``, and checks that it succeeds.

    It draws no losses, and Trainer's garbage collections pass over the imports: both take longer than the training.
    """
    monkeypatch.setattr("lora_ext.commands.finetune.loss_curve", lambda *_: None)
    monkeypatch.setattr("lora_ext.commands.finetune.save_figure", lambda *_: None)

    def run(*options: Any, out: str = "run") -> Run:
        gc.freeze()
        status, said, messages = command("finetune", *options, "--output_dir", tmp_path / out)
        assert status == 0, messages
        return Run(tmp_path / out, said)

    return run


@pytest.fixture(scope="session")
def files(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A llama in several files, ``base``, and its adapters ``four`` and ``six``."""
    return save_files(tmp_path_factory.mktemp("files"))


@pytest.fixture(scope="session")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """Options of a classifier that learns 240 reviews in seconds; the only adjective decides the label."""
    inputs = tiny_classifier.save(tmp_path_factory.mktemp("tiny"))
    words = ["--model", inputs["model"], "--data", inputs["data"], "--max_length", "32"]
    return [*words, "--num_train_epochs", "6", "--learning_rate", "2e-2"]


@pytest.fixture(scope="session")
def lora() -> list[str]:
    """Options of a small adapter, which takes the defaults of named layers."""
    return ["--lora_targets", "query,value", "--lora_r", "4", "--lora_alpha", "8"]
