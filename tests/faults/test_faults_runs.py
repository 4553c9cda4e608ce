"""Tests finetune and compare with a kill, a full disk or a read-only disk at calls that change files.

Files under their final names are whole, an error is one line, and ``--resume`` ends with the bits of a run without
faults. A run on a tiny model makes about a hundred such calls, and each try is two runs of a second. So the first call
and every 30th are tried, which varies the file and the kind of call: the first call meets every fault, the others take
turns. ``make test-full`` tries every fault at every call.
"""

from __future__ import annotations

import json

import pytest

from faults import run_script

pytestmark = pytest.mark.full

KINDS = ["kill", "disk full", "read-only"]


SCRIPTS = {
    "finetune_faults": [",".join(KINDS), "30", "lora"],
    "compare_faults": [",".join(KINDS), "25"],
    "small_commands_faults": [],
}


@pytest.fixture(scope="module")
def results(tmp_path_factory) -> dict[str, dict]:
    """The results of each script."""
    folders = [str(tmp_path_factory.mktemp(name)) for name in SCRIPTS]
    calls = [json.dumps([name, folder, *more]) for (name, more), folder in zip(SCRIPTS.items(), folders, strict=True)]
    return dict(zip(SCRIPTS, run_script("forked", *calls), strict=True))


@pytest.mark.parametrize("script", ["finetune_faults", "compare_faults"])
def test_some_calls(results, script):
    assert "failed" not in results[script], results[script]["failed"]
    for kind, found in results[script].items():
        assert found["calls"] > 90 and found["tries"] >= 2
        assert kind == "kill" or len(found["kinds"]) > 1


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("method", ["lora", "full", "lora+adapter-p"])
def test_every_call_of_finetune(tmp_path, kind, method):
    assert run_script("finetune_faults", tmp_path, kind, "1", method)[kind]["tries"] > 40


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
def test_every_call_of_compare(tmp_path, kind):
    assert run_script("compare_faults", tmp_path, kind, "1")[kind]["tries"] > 40


def test_every_call_of_analyze_and_report(results):
    found = results["small_commands_faults"]
    assert "failed" not in found, found["failed"]
    assert found["run_report"]["kill"] >= 3 < found["run_analyze"]["kill"]
    assert all(calls["kill"] >= calls["read-only"] >= calls["disk full"] > 0 for calls in found.values())
