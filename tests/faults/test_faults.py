"""Tests that the faults reach calls from Python, Rust and C++."""

from __future__ import annotations

import pytest

from faults import run_script

pytestmark = pytest.mark.full


@pytest.fixture(scope="module")
def results(tmp_path_factory):
    return run_script("small_actions", tmp_path_factory.mktemp("faults"))


@pytest.mark.parametrize("action", ["by_python", "by_rust", "by_cpp"])
def test_each_call_meets_each_fault(results, action):
    seen = results[action]
    assert seen["elsewhere"] == "returned"  # files outside the directory are not watched
    assert seen["kill"]["ended"] == ["killed", "returned"]
    for kind in ("disk full", "read-only"):
        assert seen[kind]["ended"] == ["raised", "returned"], kind
    for kind in ("kill", "disk full", "read-only"):
        assert seen[kind]["last"] == "returned"
        assert seen[kind]["calls"] >= (2 if kind == "disk full" else 1)
    assert seen["kill"]["calls"] >= seen["disk full"]["calls"]
    assert seen["no rights"]  # root without its privileges is refused, too


def test_errors_are_those_of_each_library(results):
    for action, error in (("by_python", "OSError"), ("by_rust", "SafetensorError"), ("by_cpp", "RuntimeError")):
        assert results[action]["disk full"]["errors"] == results[action]["read-only"]["errors"] == [error]
    assert results["by_python"]["no rights"] == "PermissionError"
