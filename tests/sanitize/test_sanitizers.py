"""Tests tests/sanitize without running sanitizers; `make asan`, `make ubsan` and `make tsan` run them."""

from __future__ import annotations

import pytest

from sanitize import sanitizers
from sanitize.builds import ROOT
from sanitize.planted import PLANTED
from sanitize.sanitizers import SANITIZERS

pytestmark = [pytest.mark.cpu_only("is about the compiler"), pytest.mark.full]

BUGS = [bug for bugs in PLANTED.values() for bug in bugs]


@pytest.mark.parametrize("bug", BUGS, ids=lambda bug: bug.name)
def test_a_planted_bug_fits_the_sources(bug):
    text = (ROOT / bug.edit.path).read_text()
    assert f'lora_ext::is_planted("{bug.name}")' in bug.edit.applied(text, bug.name)


def test_an_edit_of_text_that_is_gone_says_so():
    with pytest.raises(ValueError, match=r"has the text to replace 0 times, want once"):
        BUGS[0].edit.applied("nothing", BUGS[0].name)


@pytest.mark.parametrize("name", SANITIZERS)
def test_a_missing_sanitizer_library_is_reported_with_its_package(name, tmp_path, monkeypatch):
    compiler = tmp_path / "g++"
    compiler.write_text('#!/bin/sh\necho "${1#-print-file-name=}"\n')  # gcc's output for a file that it does not have
    compiler.chmod(0o755)
    monkeypatch.setenv("CXX", str(compiler))
    sanitizer = SANITIZERS[name]
    with pytest.raises(RuntimeError, match=rf"make {name}: .*g\+\+ has no {sanitizer.runtime}.*apt-get install g\+\+"):
        sanitizer.runtime_path()


def test_without_a_compiler(monkeypatch):
    monkeypatch.setenv("CXX", "no-such-compiler")
    with pytest.raises(RuntimeError, match="there is no no-such-compiler"):
        sanitizers.compiler()
