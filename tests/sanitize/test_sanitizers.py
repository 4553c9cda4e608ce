"""Tests tests/sanitize without running sanitizers; `make asan`, `make ubsan` and `make tsan` run them."""

from __future__ import annotations

import pytest

from sanitize import sanitizers
from sanitize.builds import ROOT
from sanitize.planted import PLANTED
from sanitize.sanitizers import SANITIZERS

pytestmark = [pytest.mark.cpu_only("is about the compiler"), pytest.mark.full]


@pytest.mark.parametrize("name", SANITIZERS)
def test_its_planted_bug_fits_the_sources(name):
    bug = PLANTED[name]
    assert bug.new in bug.applied((ROOT / bug.path).read_text())
    with pytest.raises(ValueError, match=r"has the text to replace 0 times, want once"):
        bug.applied("nothing")


@pytest.mark.parametrize("name", SANITIZERS)
def test_a_missing_sanitizer_library_is_reported_with_its_package(name, tmp_path, monkeypatch):
    compiler = tmp_path / "g++"
    compiler.write_text('#!/bin/sh\necho "${1#-print-file-name=}"\n')  # gcc's output for a file that it does not have
    compiler.chmod(0o755)
    monkeypatch.setenv("CXX", str(compiler))
    sanitizer = SANITIZERS[name]
    with pytest.raises(RuntimeError, match=rf"make {name}: .*g\+\+ has no {sanitizer.runtime}.*apt-get install g\+\+"):
        sanitizer.runtime_path()
    monkeypatch.setenv("CXX", "no-such-compiler")
    with pytest.raises(RuntimeError, match="there is no no-such-compiler"):
        sanitizers.compiler()
