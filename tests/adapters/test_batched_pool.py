"""Continuous batching: requests that name adapters of a pool wait for slots."""

from __future__ import annotations

import asyncio
from pathlib import Path

import pytest
import torch
from support.batched import NAMES, NEW, TARGETS, alone, asked, config, generated, generation, prompts, running, with_abc
from support.models import llama
from torch import nn

from lora_ext import AdapterPool, load_adapter, save_adapter
from lora_ext.adapters import disable_adapters, unload

pytestmark = pytest.mark.usefixtures("no_collections")


@pytest.fixture
def root(tmp_path) -> Path:
    model = with_abc(TARGETS[:4])
    for name in "abc":
        save_adapter(model, tmp_path / name, name)
    (tmp_path / "bad").mkdir()
    (tmp_path / "bad" / "adapter_config.json").write_text("{")
    torch.save(unload(model).state_dict(), tmp_path / "base.pt")
    return tmp_path


def pooled(root: Path, slots: int) -> tuple[nn.Module, AdapterPool]:
    model = llama().eval()
    model.load_state_dict(torch.load(root / "base.pt"))
    options = {"target_modules": TARGETS[:4], "r": 5, "timeout": 5.0}
    with AdapterPool(model, root, max_bytes=1 << 20, **options) as pool:
        size = pool.stats().slot_bytes
    return model, AdapterPool(model, root, max_bytes=slots * size, **options)


@pytest.mark.parametrize("slots", [1, 2, 3])
def test_requests_wait_for_slots(root, slots):
    model, inputs = with_abc(TARGETS[:4]), prompts()
    model = unload(model)
    model.load_state_dict(torch.load(root / "base.pt"))
    for name in "abc":
        load_adapter(model, root / name, adapter_name=name)
    expected = alone(model.eval(), inputs, NAMES)
    model, pool = pooled(root, slots)
    assert generated(model, inputs, NAMES) == expected
    stats = pool.stats()
    assert stats.in_use == 0 and stats.resident == slots and stats.loads >= 3
    pool.close()


def test_a_running_request_keeps_its_slot(root):
    model, pool = pooled(root, 2)
    with running(model, num_blocks=128) as manager:
        manager.add_request([5, 6, 7], adapter_name="a", max_new_tokens=400)
        manager.add_request([5, 6, 8], adapter_name="bad")
        failed = manager.get_result(timeout=60)
        assert "adapter_config.json" in failed.error and not failed.generated_tokens
        assert pool.stats().in_use == 1
        with pytest.raises(RuntimeError, match="AdapterPool.evict: 'a' is used by a running call"):
            pool.evict("a")
        with pytest.raises(RuntimeError, match="AdapterPool.close: running calls use the pool"):
            pool.close()
        for name in ("b", "c", "b"):
            manager.add_request([5, 6, 8], adapter_name=name)
            result = manager.get_result(timeout=60)
            assert result.error is None and len(result.generated_tokens) == NEW
        manager.cancel_request("req_0")
        manager.add_request([5, 6, 8], adapter_name="b")
        assert manager.get_result(timeout=60).error is None
        assert pool.stats().in_use == 0
        pool.evict("a")
        pool.pin("b", "c")
        manager.add_request([5, 6, 8], adapter_name="a")
        manager.add_request([5, 6, 8], adapter_name="b")
        results = sorted((manager.get_result(timeout=60) for _ in range(2)), key=lambda result: result.request_id)
        assert "2 are pinned ('b', 'c')" in results[0].error and results[1].error is None
        pool.unpin("b", "c")
    pool.close()


def test_an_adapter_that_is_read_again_shares_no_old_prefix(root):
    model, pool = pooled(root, 1)
    inputs = prompts((13,))
    with running(model) as manager:
        of_a, of_b = (asked(manager, inputs[0], name) for name in "ab")
        assert of_a != of_b
        for path in (root / "b").iterdir():
            path.replace(root / "a" / path.name)
        assert asked(manager, inputs[0], "a") == of_b  # b's slot was taken, so a was read again
    pool.close()


def test_another_pool_and_other_adapters_in_a_pause(root):
    """Without adapters the model forgets that it had some; the manager finds the next ones, and no old prefix."""
    model, pool = pooled(root, 2)
    inputs = prompts((13,))
    with running(model) as manager:
        of_a, bare = asked(manager, inputs[0], "a"), asked(manager, inputs[0])
        with manager.pause():
            pool.close()
            pool = AdapterPool(model, root, target_modules=TARGETS[:4], r=5, max_bytes=1 << 20)
        assert asked(manager, inputs[0], "a") == of_a
        with manager.pause():
            pool.close()
        assert asked(manager, inputs[0]) == bare
        with manager.pause():
            load_adapter(model, root / "a", adapter_name="own")
        assert asked(manager, inputs[0]) == asked(manager, inputs[0], "own") == of_a != bare


def test_disabled_adapters_leave_no_prefix_of_a_pool(root):
    model, pool = pooled(root, 2)
    inputs = prompts((13,))
    expected = generated(model, inputs, ["a"])
    with running(model) as manager:
        with disable_adapters(model):
            assert [asked(manager, inputs[0], "a")] != expected
        assert [asked(manager, inputs[0], "a")] == expected
    pool.close()


@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")
def test_a_manager_that_breaks_frees_its_slots(root):
    """An event loop that is closed cannot take the results of requests, so that Transformers does not end them."""
    model, pool = pooled(root, 2)

    async def begun():
        manager = model.init_continuous_batching(generation(max_new_tokens=400), config(num_blocks=128))
        manager.start()
        manager.register_result_handler("long", lambda result: None)
        manager.add_request([5, 6, 7], request_id="long", adapter_name="a")
        while not pool.stats().in_use:
            await asyncio.sleep(0.01)
        return manager

    manager = asyncio.run(begun())
    manager.stop(hard_stop=True)
    assert pool.stats().in_use == 0
    pool.close()
