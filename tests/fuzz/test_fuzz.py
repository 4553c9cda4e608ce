"""Runs the fuzzers from fixed seeds, and checks that they find each kind of planted bug and call every op."""

from __future__ import annotations

import itertools
import subprocess
import sys

import pytest
from support.processes import environment

from fuzz import area_ops, area_planted, campaign  # noqa: F401  area_ops registers all makers
from fuzz.__main__ import main as fuzz_command
from fuzz.campaign import Campaign
from fuzz.choices import Choices
from fuzz.ops import MAKERS, registered_ops
from lora_ext import functional

pytestmark = [pytest.mark.cpu_only("starts processes"), pytest.mark.full]


# --- nothing is found in the package ----------------------------------------------------------------------------------

# The area, the number of cases in `make test` and in `make test-full`, and the share that must be compared.
AREAS = {"ops, first half": ("ops", 850, 2500, 0.4), "ops, second half": ("ops", 850, 2500, 0.4)}
AREAS |= {"models": ("models", 130, 400, 1.0), "files": ("files", 350, 800, 0.1)}
# Compared through the gradients of their forward, or where it is used; lora_merge_check is for CUDA.
NOT_COMPARED = {"lora_ext.functional.MergeRecord", "torch.ops.lora_ext.lora_merge_check"}
NOT_COMPARED |= {f"torch.ops.lora_ext.lora_{name}_backward" for name in ("shrink", "expand", "grouped")}


@pytest.mark.parametrize("name", AREAS)
def test_nothing_is_found(name, request):
    area, few, many, share = AREAS[name]
    cases = many if request.config.getoption("--slow") else few
    first = cases if "second" in name else 0
    result = campaign.run(area, range(first, first + cases))
    assert not result.found, result.texts()
    assert result.total("compared") >= share * result.total() and result.total() == cases, result.table()
    for function, counter in result.counts.items():  # valid calls are accepted, too
        known = "accepted" if function in NOT_COMPARED else "compared"
        assert counter[known] or function.endswith("lora_merge_check"), result.table()


def test_every_op_and_every_function_is_called():
    wanted = {f"torch.ops.lora_ext.{name}" for name in registered_ops()}
    wanted |= {f"lora_ext.functional.{name}" for name in functional.__all__}
    assert not wanted - MAKERS.keys(), "write makers of calls of these, like those in tests/fuzz/ops.py"
    assert not MAKERS.keys() - wanted


# --- planted bugs are found -------------------------------------------------------------------------------------------


def seed_of(name: str) -> int:
    """The first seed whose case calls a function with a planted bug."""
    return next(seed for seed in itertools.count() if Choices(seed).pick(area_planted.NAMES) == name)


@pytest.fixture(scope="module")
def planted() -> Campaign:
    return campaign.run("planted", map(seed_of, area_planted.NAMES), seconds=(1, 6))


@pytest.mark.parametrize("name", area_planted.NAMES)
def test_a_planted_bug_is_found(planted, name):
    found = [f for f in planted.found.values() if f.finding.function.rpartition(".")[2] == name]
    assert area_planted.KINDS[name] in [f.finding.kind for f in found], planted.table()
    assert all(f.seed == seed_of(name) for f in found)


def test_the_printed_program_fails_in_the_same_way(planted, monkeypatch, capfd):
    (found,) = (f for f in planted.found.values() if f.finding.function.endswith(".crashes"))
    assert "signal SIGSEGV" in found.text()
    result = subprocess.run([sys.executable, "-c", found.source], env=environment(), capture_output=True)
    assert result.returncode == -11
    monkeypatch.setattr(sys, "argv", f"fuzz planted --seed {found.seed} --cases 1 --processes 1".split())
    assert fuzz_command() == 1
    assert "FOUND crash: torch.ops.lora_ext_planted.crashes: signal SIGSEGV" in capfd.readouterr().out
