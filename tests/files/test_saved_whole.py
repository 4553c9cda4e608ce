"""Killed, failing and concurrent saves: a reader always finds the whole old adapter or the whole new one."""

from __future__ import annotations

import os
import signal
import subprocess
import threading
from pathlib import Path

import pytest
import torch
from faults import run_script
from faults.saving import adapted
from peft import PeftConfig
from peft.utils import load_peft_weights
from support.processes import Forked
from torch import nn

from lora_ext import load_adapter, save_adapter
from lora_ext.files.staged_files import staged_files

pytestmark = [pytest.mark.cpu_only("is about files, which hold CPU tensors"), pytest.mark.full]

CASES = {
    "adapter": ["nothing,nothing", "old,nothing", "another shape,nothing", "old,symbolic links", "old,hard links"],
    "method": ["nothing,nothing", "another shape,nothing", "old,locks"],
}


@pytest.mark.parametrize("what", CASES)
def test_a_save_is_whole_when_stopped_at_any_call(what, tmp_path):
    outcomes = run_script("save_killed", tmp_path, what, *CASES[what])
    for case, kinds in outcomes.items():
        before, lacks = case.split(",")
        first = "" if before == "nothing" else "old"
        gap = {""} if lacks == "symbolic links" else set()
        assert set(kinds["kill"]["states"]) == {first, "new"} | gap, case
        assert set(kinds["read-only"]["states"]) == {first, "new"} | gap, case
        assert set(kinds["disk full"]["states"]) == {first, "new"}, case
        assert kinds["kill"]["calls"] >= 10, case
        by_peft = {}
        for directory, state in kinds["left"]:
            if state:
                tensors = {key: tensor.tolist() for key, tensor in load_peft_weights(directory, device="cpu").items()}
                read = PeftConfig.from_pretrained(directory).lora_alpha, tensors
                assert by_peft.setdefault(state, read) == read, (case, directory)
        alphas = {"old": 5, "new": 7} if first else {"new": 7}
        assert {state: alpha for state, (alpha, _) in by_peft.items()} == alphas, case


def alpha_of(directory: Path) -> int:
    """Returns the ``alpha`` of :func:`~faults.saving.adapted`; checks that the config and all weights have it."""
    model = load_adapter(nn.Sequential(nn.Linear(64, 64)), directory)
    adapter = model[0].adapters["default"]
    for parameter in adapter.parameters():
        assert torch.equal(parameter, torch.full_like(parameter, adapter.lora_alpha))
    return adapter.lora_alpha


def test_concurrent_savers_and_readers_see_whole_adapters(tmp_path):
    """Two processes with two threads each; some are paused, so that others meet half-done saves."""
    directory = tmp_path / "saved"
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE}
    processes = [Forked("-m", "faults.saving", directory, first, first + 1, **pipes, text=False) for first in (1, 3)]
    try:
        for process in processes:
            assert process.stdout.readline() == b"ready\n"
        save_adapter(adapted(9), directory)
        for process in processes:
            process.stdin.write(b"\n")
            process.stdin.flush()
        seen = set()
        while any(process.poll() is None for process in processes):
            process = processes[len(seen) % 2]
            process.send_signal(signal.SIGSTOP)
            seen.add(alpha_of(directory))
            process.send_signal(signal.SIGCONT)
            seen.add(alpha_of(directory))
        assert [process.returncode for process in processes] == [0, 0]
    finally:
        for process in processes:
            process.kill()
            process.communicate()
    assert seen <= {1, 2, 3, 4, 9}
    assert len(seen) > 2
    assert alpha_of(directory) in {1, 2, 3, 4}
    assert sorted(os.listdir(directory)) == ["adapter_config.json", "adapter_model.safetensors"]


def test_a_save_waits_for_a_running_one(tmp_path):
    inside, go_on = threading.Event(), threading.Event()

    def slowly() -> None:
        with staged_files(tmp_path, ["a", "b"], "slow") as staging:
            for name in ("a", "b"):
                (staging / name).write_text("slow")
            inside.set()
            go_on.wait()
            assert sorted(os.listdir(staging)) == ["a", "b"]

    slow = threading.Thread(target=slowly)
    slow.start()
    inside.wait()
    fast = threading.Thread(target=save_adapter, args=(adapted(1), tmp_path))
    fast.start()
    fast.join(0.2)
    assert fast.is_alive()  # it waits
    go_on.set()
    slow.join()
    fast.join()
    assert alpha_of(tmp_path) == 1
    assert sorted(os.listdir(tmp_path)) == ["a", "adapter_config.json", "adapter_model.safetensors", "b"]
