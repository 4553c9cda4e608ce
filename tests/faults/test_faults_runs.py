"""Tests finetune and compare with a kill, a full disk or a read-only disk at calls that change files.

Files under their final names are whole, an error is one line, and ``--resume`` ends with the bits of a run without
faults. A run on a tiny model makes about a hundred such calls, and each try is two runs of a second. So every 31st call
is tried, which varies the file and the kind of call; ``make test-full`` tries them all.
"""

from __future__ import annotations

import pytest

from faults import run_script

pytestmark = pytest.mark.full

KINDS = ["kill", "disk full", "read-only"]


@pytest.mark.parametrize("script", ["finetune_faults", "compare_faults"])
def test_some_calls(tmp_path, script):
    for kind, results in run_script(script, tmp_path, ",".join(KINDS), "31", "lora").items():
        assert results["calls"] > 50 and results["tries"] >= (1 if kind == "disk full" else results["calls"] // 32)
        assert kind == "kill" or len(results["kinds"]) > 1


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("method", ["lora", "full", "lora+adapter-p"])
def test_every_call_of_finetune(tmp_path, kind, method):
    assert run_script("finetune_faults", tmp_path, kind, "1", method)[kind]["tries"] > 40


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
def test_every_call_of_compare(tmp_path, kind):
    assert run_script("compare_faults", tmp_path, kind, "1")[kind]["tries"] > 40


def test_every_call_of_plan_analyze_and_report(tmp_path):
    results = run_script("small_commands_faults", tmp_path)
    assert results["run_report"]["kill"] >= 3 < results["run_plan"]["kill"] < results["run_analyze"]["kill"]
    assert all(calls["kill"] >= calls["read-only"] >= calls["disk full"] > 0 for calls in results.values())
