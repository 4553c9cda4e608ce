"""Threads that change one model: one change at a time, and no weight is lost."""

from __future__ import annotations

import os
import random
import re
import threading
import time

import pytest
import torch
from support.merged_models import all_same, hard_model, weights
from support.models import Net
from support.threads import run_together
from torch import nn

from lora_ext import LoraConfig, inject, load_adapter, merge, save_adapter, unmerge
from lora_ext.adapters import hotswap_adapter, lora_modules
from lora_ext.merging import layers as merged_module

pytestmark = pytest.mark.full

CONFIG = LoraConfig(r=2, target_modules=["up", "down"], init_lora_weights=False)


def test_merges_and_unmerges_in_any_order():
    model = hard_model([torch.float32, torch.bfloat16, torch.float16], sizes=(0.1, 0.2, 1e-4))
    pristine = weights(model)

    def change(seed: int) -> None:
        draw = random.Random(seed)
        for _ in range(40):
            try:
                draw.choice([merge, unmerge])(model, draw.choice(["a", "b"]))
            except RuntimeError as error:
                assert re.match(
                    "merge: adapters are already merged|unmerge: the adapters are not merged", str(error)
                ), error

    assert run_together(*(lambda seed=seed: change(seed) for seed in range(4))) == [None] * 4
    for _, layer in lora_modules(model):
        if layer.is_merged:
            layer.unmerge()
    assert all_same(weights(model), pristine)


def test_files_hold_one_state(tmp_path):
    model = inject(Net().eval(), CONFIG, "a")
    kept = {}
    for value in (1.0, 2.0):
        for parameter in (p for p in model.parameters() if p.requires_grad):
            nn.init.constant_(parameter, value)
        save_adapter(model, tmp_path / str(value))
        kept[value] = tmp_path / str(value)

    def swap() -> None:
        for i in range(30):
            hotswap_adapter(model, kept[1.0 + i % 2])

    def save() -> None:
        for i in range(30):
            save_adapter(model, tmp_path / f"saved{i}")

    assert run_together(swap, save, seconds=60) == [None, None]
    for i in range(30):
        loaded = load_adapter(Net(), tmp_path / f"saved{i}", trainable=True)
        values = {value for p in loaded.parameters() if p.requires_grad for value in p.unique().tolist()}
        assert len(values) == 1, i


def test_one_model_is_injected_once():
    model = Net()
    errors = run_together(*[lambda: inject(model, CONFIG, "a")] * 4)
    assert errors.count(None) == 1
    assert {str(error) for error in errors if error} == {
        "inject: adapter 'a' exists already; the adapters are ['a']. Choose another name, or "
        "delete_adapter(model, 'a') or unload(model) first (lora_ext.adapters)"
    }
    assert sum(1 for _ in lora_modules(model)) == 4


@pytest.mark.skipif(not hasattr(os, "fork"), reason="processes are forked on POSIX alone")
@pytest.mark.filterwarnings("ignore:This process .* is multi-threaded:DeprecationWarning")
@pytest.mark.cpu_only("CUDA does not work in a forked process")
def test_a_fork_waits_for_a_change(monkeypatch):
    model = hard_model([torch.float32])
    pristine, under_way = weights(model), threading.Event()
    run = merged_module.run_unmerge

    def slow_run(launches):
        run(launches)
        under_way.set()
        time.sleep(0.2)

    monkeypatch.setattr(merged_module, "run_unmerge", slow_run)
    thread = threading.Thread(target=lambda: merge(model, "a"))
    thread.start()
    assert under_way.wait(20)
    if (child := os.fork()) == 0:
        same = False
        try:
            same = all_same(weights(unmerge(model)), pristine)  # the child has the lock and the merge state
        finally:
            os._exit(0 if same else 1)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
    thread.join(20)
    assert not thread.is_alive()
    assert all_same(weights(unmerge(model)), pristine)
