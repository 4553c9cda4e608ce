"""SIGTERM: who listens to it, and who is left alone."""

from __future__ import annotations

import signal
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


def test_sigterm_interrupts_a_block(monkeypatch):
    monkeypatch.setattr(sigterm, "_received", False)
    with pytest.raises(KeyboardInterrupt), sigterm.listening():
        assert not sigterm.received()
        signal.raise_signal(signal.SIGTERM)
    assert sigterm.received() and signal.getsignal(signal.SIGTERM) is signal.SIG_DFL


@pytest.mark.parametrize("handler", [signal.SIG_IGN, lambda *arguments: None])
def test_another_handler_is_left_alone(handler):
    signal.signal(signal.SIGTERM, handler)
    with sigterm.listening(), StopOnInterrupt().listening():
        assert signal.getsignal(signal.SIGTERM) is handler
    assert signal.getsignal(signal.SIGTERM) is handler


def test_a_training_stops_after_its_step(capsys, monkeypatch):
    monkeypatch.setattr(sigterm, "_received", False)
    stop = StopOnInterrupt()
    with sigterm.listening():
        with stop.listening():
            assert not stop.requested
            for number in (
                signal.SIGTERM,
                signal.SIGTERM,
                signal.SIGINT,
            ):  # a scheduler, then a parent
                signal.raise_signal(number)
                assert stop.requested
            with pytest.raises(KeyboardInterrupt):
                signal.raise_signal(signal.SIGINT)
        with pytest.raises(KeyboardInterrupt):
            signal.raise_signal(signal.SIGTERM)
    assert "SIGTERM: stopping after this step" in capsys.readouterr().out


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
