"""The programs in examples/: they run, and what they print is so."""

from __future__ import annotations

import runpy
from pathlib import Path

import pytest

pytestmark = pytest.mark.cpu_only("the examples name no device")

EXAMPLES = Path(__file__).parent.parent / "examples"


def main_of(name: str):
    return runpy.run_path(str(EXAMPLES / name))["main"]


def test_train_and_save(tmp_path):
    assert main_of("train_and_save.py")(tmp_path) > 0.95
    assert (tmp_path / "adapter_model.safetensors").is_file()


def test_under_peft(capsys):
    unchanged, words = main_of("under_peft.py")()
    assert unchanged and words == list(range(3, 13))
    assert "14 of 14 LoRA layers on lora_ext's ops" in capsys.readouterr().out


@pytest.mark.full
def test_merge_and_serve(tmp_path, capsys):
    assert main_of("merge_and_serve.py")(tmp_path) == 0
    adapted, merged = (line.split(":")[1].split() for line in capsys.readouterr().out.splitlines() if ": " in line)
    assert len(adapted) == 16 and adapted == merged


def test_every_example_is_tested():
    source = Path(__file__).read_text(encoding="utf-8")
    assert all(f'"{path.name}"' in source for path in EXAMPLES.glob("*.py"))
