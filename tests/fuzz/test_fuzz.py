"""Tests the fuzzers: they find, minimise and print each kind of bug as a program, and call everything public."""

from __future__ import annotations

import dataclasses
import itertools
import re
import subprocess
import sys
from pathlib import Path

import pytest
from support.optional import matplotlib  # noqa: F401

import lora_ext
from fuzz import area_ops, area_planted, area_values, campaign, functions, ops
from fuzz.__main__ import main as fuzz_command
from fuzz.campaign import Campaign
from fuzz.choices import Choices, smaller
from fuzz.values import FLOATING, KINDS, LAYOUTS, OVERLAPS, TensorValue
from lora_ext import analysis, functional
from lora_ext import nn as layers

pytestmark = [pytest.mark.cpu_only("starts processes"), pytest.mark.full]

TESTS = Path(__file__).parents[1]


# --- choices ----------------------------------------------------------------------------------------------------------


def test_choices_are_those_of_the_seed_and_can_be_made_again():
    first = Choices(5)
    drawn = [first.integer(10), first.pick("abc"), first.chance(50), first.between(3, 9)]
    second = Choices(5)
    assert [second.integer(10), second.pick("abc"), second.chance(50), second.between(3, 9)] == drawn
    again = Choices(replay=first.made)
    assert [again.integer(10), again.pick("abc"), again.chance(50), again.between(3, 9)] == drawn
    simplest = Choices(replay=[])
    assert [simplest.integer(10), simplest.pick("abc"), simplest.chance(50), simplest.between(3, 9)] == [
        0,
        "a",
        False,
        3,
    ]


def test_the_smallest_choices_that_fail_are_found():
    def fails(choices: list[int]) -> bool:
        made = Choices(replay=choices)
        sizes = [made.integer(1000) for _ in range(made.integer(20))]
        return any(size > 700 for size in sizes)

    big = next(choices for seed in range(1000) if fails(choices := _drawn(seed)))
    small = smaller(big, fails)
    assert fails(small) and len(small) == 2 and small[0] == 1 and 700 < small[1] <= 750


def _drawn(seed: int) -> list[int]:
    choices = Choices(seed)
    for _ in range(choices.integer(20)):
        choices.integer(1000)
    return choices.made


# --- what is found ----------------------------------------------------------------------------------------------------


def times(name: str) -> int:
    """Number of cases of a planted bug."""
    return 1 if name in area_planted.COSTLY else 3


@pytest.fixture(scope="module")
def planted() -> Campaign:
    seeds = [
        seed
        for name in area_planted.NAMES
        for seed in itertools.islice(
            (s for s in itertools.count() if Choices(s).pick(area_planted.NAMES) == name), times(name)
        )
    ]
    return campaign.run("planted", seeds, processes=1, processor_seconds=2, clock_seconds=6, costly_tries=3)


@pytest.mark.parametrize("kind", area_planted.OPS)
def test_a_planted_op_is_found(planted, kind):
    name = f"torch.ops.lora_ext_planted.{area_planted.OPS[kind].__name__[1:]}"
    found = [entry for entry in planted.found.values() if entry.finding.function == name]
    assert found, planted.table()
    assert any(kind.startswith(entry.finding.kind) for entry in found), [entry.finding for entry in found]
    if kind in ("crash", "hang"):
        return  # each try takes a new process
    # Minimised: the smallest size that triggers the bug, and the simplest tensor.
    sizes = {int(size) for entry in found for size in re.findall(r"^size = (\d+)$", entry.smallest.source, re.M)}
    assert min(sizes) in (0, 4)
    assert any("torch.randn((2, 3), generator=torch.Generator().manual_seed(0))" in f.smallest.source for f in found)


@pytest.mark.parametrize("kind", area_planted.READERS)
def test_a_planted_reader_is_found(planted, kind):
    name = area_planted.READERS[kind].__name__
    found = {entry.finding.kind for entry in planted.found.values() if entry.finding.function == name}
    assert kind in found, planted.table()


def test_the_printed_program_fails_in_the_same_way(planted, monkeypatch, capsys):
    found = next(entry for entry in planted.found.values() if entry.finding.function.endswith(".crashes"))
    assert "signal SIGSEGV" in found.text() and f"seed {found.first.seed}" in found.text()
    environment = {"PYTHONPATH": f"{TESTS}:{Path(lora_ext.__file__).parent.parent}"}
    result = subprocess.run([sys.executable, "-c", found.smallest.source], env=environment, capture_output=True)
    assert result.returncode == -11
    choices = ",".join(map(str, found.smallest.choices)) or "0"
    monkeypatch.setattr(sys, "argv", ["fuzz", "planted", "--replay", choices])
    assert fuzz_command() == 1
    assert "FOUND crash: torch.ops.lora_ext_planted.crashes: signal SIGSEGV" in capsys.readouterr().out


def test_all_are_counted(planted):
    total = sum(map(times, area_planted.NAMES))
    assert planted.total == total
    assert re.search(rf"^all +{total} ", planted.table(), re.M)
    assert re.search(r"^torch\.ops\.lora_ext_planted\.crashes +1 ", planted.table(), re.M)
    assert f"planted: {total} cases in 7 s: " in planted.summary(7.0)


# --- what is called ---------------------------------------------------------------------------------------------------


def test_every_op_and_every_function_is_called():
    missing = set(ops.registered_ops()) - area_ops.OPS.keys()
    assert not missing, "write makers of calls of these ops, like those in tests/fuzz/ops.py"
    assert sorted(area_ops.OPS) == ops.registered_ops()
    missing = set(functional.__all__) - functions.FUNCTIONS.keys()
    assert not missing, "write makers of calls of these functions in tests/fuzz/functions.py"
    assert sorted(functions.FUNCTIONS) == sorted(functional.__all__)


# tests/fuzz/area_models.py calls all public functions of models in tests/support/refusals.py; tests/test_refusals.py
# checks that none is missing there.
NOT_CALLED = {
    "AdapterLayer": "is abstract",
    "LORA_LAYERS": "is a list",
    "LoraLayer": "is abstract",
    "MergedLinear": "is LoraPackedLinear",
}


@pytest.mark.parametrize("module", [analysis, layers], ids=lambda module: module.__name__)
def test_every_layer_and_every_measure_is_called(module):
    names = {name for name in module.__all__ if not _is_record(getattr(module, name))}
    prefix = f"{module.__name__}."
    called = {name.removeprefix(prefix) for name in area_values.VALUES if name.startswith(prefix)}
    missing = names - NOT_CALLED.keys() - called
    assert not missing, "make calls of these in tests/fuzz/python_values.py (layers: LAYERS) or python_analysis.py"
    assert names - NOT_CALLED.keys() == called


def _is_record(value: object) -> bool:
    return dataclasses.is_dataclass(value) or (isinstance(value, type) and issubclass(value, tuple))


@pytest.mark.parametrize("step", [*LAYOUTS, *OVERLAPS, *KINDS])
def test_every_kind_of_tensor_can_be_made(step):
    text = {**LAYOUTS, **OVERLAPS, **KINDS}[step]
    made = 0
    for dtype in FLOATING:
        space: dict = {}
        try:
            exec("\n".join(["import torch", *TensorValue((3, 4), dtype, steps=[text]).lines("x")]), space)
        except RuntimeError:  # PyTorch has some layouts for some dtypes only
            continue
        made += 1
        assert space["x"].numel() == 12 or space["x"].is_nested
    assert made
