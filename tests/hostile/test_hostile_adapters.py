"""Tests that hostile files of adapters end with one message, soon and cheaply."""

from __future__ import annotations

import json

import pytest
from support.processes import run_forked

pytestmark = [pytest.mark.cpu_only("is about files, which hold CPU tensors"), pytest.mark.full]


@pytest.mark.parametrize(
    "attacks",
    [["config"], ["weights", "method", "kinds"], pytest.param(["every expression"], marks=pytest.mark.slow)],
    ids="-".join,
)
def test_hostile_files_end_with_a_message(attacks, tmp_path):
    arguments = [tmp_path / "adapter", tmp_path / "results", *attacks]
    one_thread = {"OMP_NUM_THREADS": "1"}  # a process that has started threads cannot fork
    done = run_forked("-m", "hostile.reading", *arguments, **one_thread)
    assert done.returncode == 0, done.stderr
    wrong = []
    for name, words, report in json.loads((tmp_path / "results").read_text()):
        error, message = report["error"], report["message"]
        if error not in ("", "ValueError", "TypeError", "FileNotFoundError", "OSError"):
            wrong.append(f"{name}: {error}: {message[:200]}\n{report['trace']}")
        elif words is not None and (words not in message or bool(words) != bool(error)):
            wrong.append(f"{name}: want {words!r}, not {error} {message[:300]!r}")
        elif len(message) > 15_000 or not message.replace("\n", "").isprintable():
            wrong.append(f"{name}: a message of {len(message)} characters: {message[:300]!r}")
        elif report["megabytes"] > 100:
            wrong.append(f"{name}: {report['megabytes']:.0f} MB")
    assert not wrong, "\n".join(wrong)
