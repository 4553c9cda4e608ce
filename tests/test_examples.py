"""The programs in examples/: they run, and what they print is so."""

from __future__ import annotations

import math
import runpy
from pathlib import Path

import peft
import pytest

from lora_ext.integrations.peft import report

pytestmark = [pytest.mark.cpu_only("the examples name no device"), pytest.mark.full]

EXAMPLES = Path(__file__).parent.parent / "examples"


TRAINERS = pytest.mark.filterwarnings("ignore")  # TRL and torchao, which it imports, warn a lot
WAYS = pytest.mark.parametrize("way", ["inject", pytest.param("peft", marks=pytest.mark.slow)])
TAUGHT = {"sky": "blue", "grass": "green", "snow": "white", "coal": "black", "sun": "yellow", "rose": "red"}


@pytest.fixture(autouse=True)
def _as_scripts(monkeypatch):
    monkeypatch.syspath_prepend(EXAMPLES)  # they import tiny_chat.py


def main_of(name: str):
    return runpy.run_path(str(EXAMPLES / name))["main"]


def test_train_and_save(tmp_path):
    assert main_of("train_and_save.py")(tmp_path) > 0.95
    assert (tmp_path / "adapter_model.safetensors").is_file()


def test_under_peft(capsys):
    unchanged, words = main_of("under_peft.py")()
    assert unchanged and words == list(range(3, 13))
    assert "14 of 14 LoRA layers on lora_ext's ops" in capsys.readouterr().out


def test_merge_in_a_loop():
    results = main_of("merge_in_a_loop.py")(15)
    assert results["PEFT"][0] > 0.0
    assert results["accelerate"][0] == results["accelerate, stochastic"][0] == 0.0
    assert all(0.0 <= divergence < 1e-3 for _, divergence in results.values())


def test_merge_and_serve(tmp_path, capsys):
    assert main_of("merge_and_serve.py")(tmp_path) == 0
    adapted, merged = (line.split(":")[1].split() for line in capsys.readouterr().out.splitlines() if ": " in line)
    assert len(adapted) == 16 and adapted == merged


def test_generate(tmp_path):
    mixed, merged = main_of("generate.py")(tmp_path)
    assert merged == list(TAUGHT.values())
    other = {"grass": "yellow", "coal": "white", "rose": "green"}  # what the second adapter was taught
    assert mixed == [other.get(thing, colour) for thing, colour in TAUGHT.items()]


@WAYS
@TRAINERS
def test_trainer(way):
    said, losses, loss = main_of("trainer.py")(way)
    assert said == TAUGHT
    assert len(losses) == 30  # those of the first run, and those after its checkpoint
    assert loss == pytest.approx(min(losses), rel=1e-6)


@WAYS
def test_accelerate_loop(way):
    said, whole, resumed = main_of("accelerate_loop.py")(way)
    assert said == TAUGHT and resumed == whole


@WAYS
@TRAINERS
def test_sft(way):
    assert main_of("sft.py")(way) == TAUGHT


@TRAINERS
def test_dpo():
    losses = main_of("dpo.py")()
    assert losses[0] == pytest.approx(math.log(2), abs=1e-4) and losses[-1] < 0.1


@TRAINERS
def test_grpo():
    rewards = main_of("grpo.py")()
    assert sum(rewards[:3]) / 3 < 0.6 and sum(rewards[-3:]) / 3 > 0.9


@TRAINERS
@pytest.mark.parametrize("name", ["trainer.py", "accelerate_loop.py", "sft.py", "dpo.py", "grpo.py"])
def test_the_other_way_is_peft_on_our_kernels(name):
    """tests/peft/test_trainers.py compares what both ways learn in these trainers."""
    adapted = main_of(name).__globals__["adapted"]
    model = adapted() if name in ("dpo.py", "grpo.py") else adapted("peft")
    assert isinstance(model, peft.PeftModel) and "14 of 14 LoRA layers on lora_ext's ops" in str(report(model))


def test_many_adapters(tmp_path, capsys):
    mixed, alone, stats = main_of("many_adapters.py")(tmp_path, number=32)
    assert mixed == alone and len({tuple(tokens) for tokens in mixed}) == 4
    assert stats.slots == 24 and stats.loads >= 16 and stats.in_use == 0
    assert "tokens/s; one adapter:" in capsys.readouterr().out
