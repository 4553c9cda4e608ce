"""Runs the fuzzer from fixed seeds, and checks that it finds each kind of planted bug and calls every op."""

from __future__ import annotations

import subprocess
import sys

import pytest
from support.processes import environment

pytest.importorskip("hypothesis", reason="hypothesis is not installed; make test installs it")

from fuzz import campaign, ops, planted
from fuzz.__main__ import main as fuzz_command
from lora_ext import functional

pytestmark = [pytest.mark.cpu_only("starts processes"), pytest.mark.full]


@pytest.mark.parametrize("function", ops.MAKERS)
def test_nothing_is_found(function, request):
    cases = 120 if request.config.getoption("--slow") else 40
    result = campaign.run(function, cases)
    assert not result.found and result.total() == cases, result.table()
    ((name, outcomes),) = result.counts.items()
    assert function == name
    is_compared = name.startswith("lora_ext.functional.") and not name.endswith("MergeRecord")
    wanted = outcomes["compared" if is_compared else "accepted"]
    assert wanted >= 0.15 * cases or name.endswith("lora_merge_check"), result.table()  # it has no kernel on the CPU


def test_every_function_is_called():
    assert ops.MAKERS.keys() > {f"lora_ext.functional.{name}" for name in functional.__all__}


@pytest.mark.parametrize("name", planted.KINDS)
def test_a_planted_bug_is_found(name):
    result = campaign.run(name, cases=1, seconds=(1, 3), shrink=False)
    assert planted.KINDS[name] in [text.partition(":")[0] for text in result.found], result.table()


def test_the_program_is_small_and_fails_in_the_same_way(monkeypatch, capfd):
    """The program that is reported calls the planted op with its smallest input."""
    monkeypatch.setattr(sys, "argv", ["fuzz", "crashes", "--seed", "3", "--cases", "20"])
    assert fuzz_command() == 1
    said = capfd.readouterr().out
    assert "crash: torch.ops.lora_ext_planted.crashes: signal SIGSEGV" in said and "with the seed 3" in said
    (found,) = campaign.run("crashes", cases=20, seed=3).found.values()
    program = found.partition("with the seed 3\n")[2]
    assert program in said and "torch.randn((3, 1)" in program
    result = subprocess.run([sys.executable, "-c", program], env=environment(), capture_output=True)
    assert result.returncode == -11
