"""SIGTERM: who listens to it, and who is left alone."""

from __future__ import annotations

import errno
import io
import signal
import sys
import threading
from collections.abc import Iterator

import pytest

from lora_ext.tasks.finetune.trainer_callbacks import StopOnInterrupt
from lora_ext.tasks.shared import sigterm


@pytest.fixture(autouse=True)
def restored() -> Iterator[None]:
    before = signal.getsignal(signal.SIGTERM), signal.getsignal(signal.SIGINT)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    yield
    assert signal.getsignal(signal.SIGINT) is before[1]
    signal.signal(signal.SIGTERM, before[0])


def test_the_first_sigterm_interrupts_a_block():
    for _ in range(2):
        with sigterm.listening():
            assert not sigterm.received()
            with pytest.raises(KeyboardInterrupt):
                signal.raise_signal(signal.SIGTERM)
            signal.raise_signal(signal.SIGTERM)
        assert sigterm.received() and signal.getsignal(signal.SIGTERM) is signal.SIG_DFL


@pytest.mark.parametrize("handler", [signal.SIG_IGN, lambda *arguments: None])
def test_another_handler_is_left_alone(handler):
    signal.signal(signal.SIGTERM, handler)
    with sigterm.listening(), StopOnInterrupt().listening():
        assert signal.getsignal(signal.SIGTERM) is handler
    assert signal.getsignal(signal.SIGTERM) is handler


def test_a_training_stops_after_its_step(capsys):
    stop = StopOnInterrupt()
    with sigterm.listening():
        with stop.listening():
            assert not stop.requested
            for number in (signal.SIGTERM, signal.SIGTERM, signal.SIGINT):  # a scheduler, then a parent
                signal.raise_signal(number)
                assert stop.requested
            with pytest.raises(KeyboardInterrupt):
                signal.raise_signal(signal.SIGINT)
        signal.raise_signal(signal.SIGTERM)  # the training has stopped; nothing is to be interrupted
    assert "SIGTERM: stopping after this step" in capsys.readouterr().out


class Stream(io.RawIOBase):
    """Sends signals to this process while Python writes to it, then ends it or fails."""

    def __init__(self, numbers: list[int], error: OSError | None) -> None:
        self.numbers, self.error = numbers, error

    def writable(self) -> bool:
        return True

    def write(self, data) -> int:
        while self.numbers:
            signal.raise_signal(self.numbers.pop())
        if self.error is not None:
            raise self.error
        return len(data)


@pytest.mark.parametrize("error", [None, BrokenPipeError(), OSError(errno.ENOSPC, "No space left on device")])
def test_a_training_stops_after_its_step_whatever_its_output_does(error, monkeypatch):
    """Python's streams refuse a write within a write, which the second signal asked for."""
    stop, stream = StopOnInterrupt(), Stream([signal.SIGINT], error)
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(io.BufferedWriter(stream)))
    with stop.listening():
        signal.raise_signal(signal.SIGTERM)
    assert stop.requested and not stream.numbers
    stream.error = None  # for its last flush


def test_a_thread_has_no_signals():
    """``finetune`` may run in one; Python would refuse to set a handler there."""
    seen = []

    def listen() -> None:
        with sigterm.listening(), StopOnInterrupt().listening():
            seen.append(signal.getsignal(signal.SIGTERM))

    thread = threading.Thread(target=listen)
    thread.start()
    thread.join()
    assert seen == [signal.SIG_DFL]
