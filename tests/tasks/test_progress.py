"""Display of progress: a bar on a terminal, few lines in a pipe."""

from __future__ import annotations

import fcntl
import io
import os
import pty
import re
import struct
import sys
import termios
from collections.abc import Iterator
from pathlib import Path

import pytest
from support import tiny_classifier
from support.processes import Forked, run_forked

from lora_ext._common import progress as module
from lora_ext._common.progress import progress

pytestmark = pytest.mark.cpu_only("is about what is printed")


class Clock:
    now = 100.0

    def monotonic(self) -> float:
        return self.now


@pytest.fixture
def clock(monkeypatch) -> Iterator[Clock]:
    clock = Clock()
    monkeypatch.setattr(module, "time", clock)
    yield clock


def run(clock: Clock, steps: int, seconds: float, **options: object) -> None:
    """Runs ``steps`` steps that take ``seconds`` each."""
    with progress("work", steps, unit="steps", **options) as shown:
        for step in range(steps):
            clock.now += seconds
            shown.note(f"loss {step}")
            shown.advance(1)


def test_lines_are_at_least_10_seconds_apart(clock, capsys):
    run(clock, 1000, 0.125)
    lines = capsys.readouterr().err.splitlines()
    assert lines[0] == "work: 1% of 1,000 steps, 0:01, about 2:04 left, loss 7"
    assert lines[1] == "work: 9% of 1,000 steps, 0:11, about 1:54 left, loss 87"
    assert lines[-1] == "work: 100% of 1,000 steps, 2:05, loss 999"
    assert len(lines) == 14


def test_a_slow_start_gives_no_estimate(clock, capsys):
    with progress("work", 1000, unit="steps") as shown:
        clock.now += 30
        shown.advance(4)
        clock.now += 30
        shown.advance(96)
    assert capsys.readouterr().err.splitlines() == [
        "work: 0% of 1,000 steps, 0:30",
        "work: 10% of 1,000 steps, 1:00, about 9:00 left",
    ]


def test_the_last_line_has_the_last_note(clock, capsys):
    with progress("work", 2, unit="steps") as shown:
        clock.now += 2
        shown.note("loss 2")
        shown.advance(2)
        shown.note("loss 1")
    assert capsys.readouterr().err.splitlines()[-1] == "work: 100% of 2 steps, 0:02, loss 1"


def test_the_longest_run_prints_a_hundred_lines(clock, capsys):
    run(clock, 10_000, 20.0)
    lines = capsys.readouterr().err.splitlines()
    assert 100 <= len(lines) <= 102 and lines[-1].startswith("work: 100% of 10,000 steps, 55:33:20")


def test_short_work_prints_nothing(clock, capsys):
    run(clock, 9, 0.1)
    run(clock, 9, 1.0, first=10.0)
    run(clock, 1000, 1.0, show=False)
    assert capsys.readouterr().err == ""


def test_resumed_work_begins_where_it_was(clock, capsys):
    with progress("work", 4e9, done=1e9) as shown:
        clock.now += 2
        shown.advance(1e9)
    assert capsys.readouterr().err == "work: 50% of 4.00 GB, 0:02, about 0:04 left\n"


def test_work_that_fails_says_how_far_it_was(clock, capsys):
    with pytest.raises(RuntimeError), progress("work", 10, unit="steps") as shown:
        for step in range(10):
            clock.now += 2
            shown.set(step)
            if step == 3:
                raise RuntimeError
    assert [line.split("%")[0] for line in capsys.readouterr().err.splitlines()] == ["work: 0", "work: 30"]


def test_nothing_to_do(clock, capsys):
    with progress("work", 0) as shown:
        clock.now += 2
        shown.advance(0)
    assert capsys.readouterr().err == "work: 100% of 0.0 MB, 0:02\n"


def test_a_terminal_gets_a_bar(monkeypatch):
    class Terminal(io.StringIO):
        def isatty(self) -> bool:
            return True

    monkeypatch.setattr(sys, "stderr", terminal := Terminal())
    with progress("work", 10, unit="steps", done=5) as shown:
        shown.note("file")
        shown.advance(5)
    assert "work:  50%|" in terminal.getvalue() and "10/10" in terminal.getvalue() and "file" in terminal.getvalue()


@pytest.fixture(scope="module")
def arguments(tmp_path_factory) -> list[str]:
    directory = tmp_path_factory.mktemp("tiny")
    model = tiny_classifier.save_model(directory / "model")
    data = tiny_classifier.save_reviews(directory / "reviews.csv", tiny_classifier.reviews(120))
    options = ["--model", str(model), "--data", str(data), "--max-length", "32", "--epochs", "30", "--no-measure"]
    return ["-m", "lora_ext", "finetune", *options]


@pytest.mark.full
def test_finetune_prints_few_lines_into_a_pipe(arguments: list[str], tmp_path: Path):
    """Runs 180 steps and 30 evaluations; the Trainer's bars would print hundreds of states."""
    done = run_forked(*arguments, "--out", tmp_path / "out")
    assert done.returncode == 0, done.stderr
    lines = re.split(r"[\r\n]+", done.stderr.strip())
    assert len(lines) <= 12 and "|" not in done.stderr, done.stderr
    assert re.fullmatch(r"finetune: 100% of 180 steps, \d+:\d\d, epoch 30.00, loss \d\.\d{3}", lines[-1]), lines


@pytest.mark.full
def test_finetune_draws_bars_on_a_terminal(arguments: list[str], tmp_path: Path):
    ours, theirs = pty.openpty()
    fcntl.ioctl(theirs, termios.TIOCSWINSZ, struct.pack("4H", 24, 100, 0, 0))
    with open(os.devnull, "w") as nothing:
        more = ["--epochs", "1", "--out", tmp_path / "out"]
        process = Forked(*arguments, *more, stdout=nothing, stderr=theirs)
    os.close(theirs)
    output = b""
    while True:
        try:
            if not (part := os.read(ours, 1 << 16)):
                break
        except OSError:  # the process has closed its end
            break
        output += part
    os.close(ours)
    assert process.wait() == 0, output
    assert re.search(rb"finetune: 100%\|.*6/6", output) and b"epoch 1.00, loss " in output, output
