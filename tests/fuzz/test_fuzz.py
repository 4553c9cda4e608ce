"""Runs the fuzzer from fixed seeds, and checks that it reports what it finds and survives a crash."""

from __future__ import annotations

import sys

import pytest

pytest.importorskip("hypothesis", reason="hypothesis is not installed; make test installs it")

from fuzz import calls, campaign
from fuzz.__main__ import main as fuzz_command

pytestmark = [pytest.mark.cpu_only("starts processes"), pytest.mark.full]


@pytest.mark.parametrize("function", calls.NAMES)
def test_nothing_is_found(function, request):
    cases = 120 if request.config.getoption("--slow") else 40
    result = campaign.run(function, cases)
    assert not result.found and result.total() == cases, result.table()
    ((name, outcomes),) = result.counts.items()
    assert function == name
    wanted = outcomes["compared" if name.startswith(calls.FUNCTION) else "accepted"]
    assert wanted >= 0.15 * cases or name.endswith("lora_merge_check"), result.table()  # it has no kernel on the CPU


def test_the_reported_call_is_small_and_its_command_finds_it_again(monkeypatch, capfd):
    first = campaign.run("is_wrong", cases=20, seed=3)
    (said,) = first.found.values()
    assert "lora_ext_planted.is_wrong of\n    x: float32 [3, 2]\n" in said and first.total() > 1
    monkeypatch.setattr(sys, "argv", said.partition("again: PYTHONPATH=tests python -m ")[2].split())
    assert fuzz_command() == 1
    assert said in capfd.readouterr().out


def test_the_next_cases_run_after_a_crash():
    result = campaign.run("crashes", cases=20)
    (said,) = result.found.values()
    assert said.startswith("crash: lora_ext_planted.crashes: signal SIGSEGV")
    assert "lora_ext_planted.crashes of\n    x: float32 [3, 1]\n" in said and result.total() > 1, result.table()
