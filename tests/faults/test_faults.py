"""The faults that tests put between a process and its files are met by Python's calls, Rust's and C++'s."""

from __future__ import annotations

import pytest

from faults import run_script


@pytest.fixture(scope="module")
def told(tmp_path_factory):
    return run_script("small_actions", tmp_path_factory.mktemp("faults"))


@pytest.mark.parametrize("action", ["by_python", "by_rust", "by_cpp"])
def test_each_call_meets_each_fault(told, action):
    own = told[action]
    assert own["elsewhere"] == "returned"  # what is outside of the directory is left alone
    assert own["kill"]["ended"] == ["killed", "returned"]
    for kind in ("disk full", "read-only"):
        assert own[kind]["ended"] == ["raised", "returned"], kind
    for kind in ("kill", "disk full", "read-only"):
        assert own[kind]["last"] == "returned"
        assert own[kind]["calls"] >= (2 if kind == "disk full" else 1)
    assert own["kill"]["calls"] >= own["disk full"]["calls"]
    assert own["no rights"]  # root, too, is refused without its privileges


def test_errors_are_those_of_each_library(told):
    for action, error in (("by_python", "OSError"), ("by_rust", "SafetensorError"), ("by_cpp", "RuntimeError")):
        assert told[action]["disk full"]["errors"] == told[action]["read-only"]["errors"] == [error]
    assert told["by_python"]["no rights"] == "PermissionError"
