"""Contexts of choose_adapters that do not end in the order in which they began: generators, tasks, threads."""

from __future__ import annotations

import asyncio
import contextvars
from collections.abc import AsyncIterator, Iterator
from contextlib import ExitStack, contextmanager

import pytest
import torch
from support.models import llama
from support.rows import with_adapters
from torch import Tensor, nn

from lora_ext import set_adapter
from lora_ext.adapters import choose_adapters

IDS = torch.tensor([[3, 4, 5]])
MESSAGE = r"choose_adapters: a generator yielded within the context that chose \['a'\], and goes on after another"


@pytest.fixture
def model() -> Iterator[nn.Module]:
    model = set_adapter(with_adapters(llama(), ["q_proj", "lm_head"]).eval(), "c")
    with torch.no_grad():
        yield model
        assert used(model) == "c" and model._lora_adapters.active.row_calls == 0
        assert not model._lora_adapters.active.held


def used(model: nn.Module) -> str:
    """The name of the adapter that a call without names uses."""
    y = model(IDS).logits
    distances = {name: (model(IDS, adapter_names=[name]).logits - y).abs().max() for name in "abc"}
    assert sum(distance < 1e-5 for distance in distances.values()) == 1, distances
    return min(distances, key=distances.get)


def batches(model: nn.Module, name: str) -> Iterator[str]:
    with choose_adapters(model, [name]):
        while True:
            yield used(model)


def test_generators_that_take_turns_are_refused(model):
    first, second = batches(model, "a"), batches(model, "b")
    assert [next(first), next(second), next(second)] == ["a", "b", "b"]
    with pytest.raises(RuntimeError, match=MESSAGE):
        next(first)  # b is in force
    assert next(second) == "b"
    second.close()


def test_generators_that_take_turns_in_generate_are_refused(model):
    def generated(name: str) -> Iterator[Tensor]:
        with choose_adapters(model, [name]):
            while True:
                yield model.generate(IDS, max_new_tokens=2, do_sample=False)

    first, second = generated("a"), generated("b")
    next(first), next(second)
    with pytest.raises(RuntimeError, match=MESSAGE):
        next(first)
    second.close()


def test_a_context_that_ends_before_a_later_one_leaves_that_in_force(model):
    first, second = batches(model, "a"), batches(model, "b")
    next(first), next(second)
    first.close()
    assert used(model) == "b" == next(second)
    second.close()


def test_generators_that_are_contexts(model):
    @contextmanager
    def helper(name: str) -> Iterator[None]:
        with choose_adapters(model, [name]):
            yield

    with helper("a"), ExitStack() as stack:
        stack.enter_context(helper("b"))
        assert used(model) == "b"
    for first in batches(model, "a"):
        with helper("b"):
            assert (first, used(model)) == ("a", "b")
        break


def test_a_generator_that_goes_on_in_another_context_is_refused(model):
    """As servers do that run each step of a generator in a worker."""
    answer = batches(model, "a")
    assert contextvars.copy_context().run(next, answer) == "a"
    with pytest.raises(RuntimeError, match=MESSAGE):
        contextvars.copy_context().run(next, answer)

    async def steps() -> None:
        async def answers() -> AsyncIterator[str]:
            with choose_adapters(model, ["a"]):
                yield used(model)
                yield used(model)

        answer = answers()
        assert await asyncio.create_task(anext(answer)) == "a"
        with pytest.raises(RuntimeError, match=MESSAGE):
            await asyncio.create_task(anext(answer))

    asyncio.run(steps())


def test_tasks_have_their_own_choices(model):
    async def task(name: str) -> list[str]:
        found = []
        with choose_adapters(model, [name]):
            for _ in range(2):
                found.append(used(model))
                await asyncio.sleep(0)
        return found

    async def late() -> list[str]:
        found = [used(model)]
        await asyncio.sleep(0.01)
        return [*found, used(model)]

    async def run() -> None:
        assert await asyncio.gather(*map(task, "abc")) == [[name] * 2 for name in "abc"]
        with choose_adapters(model, ["a"]):
            inherits = asyncio.create_task(late())
            await asyncio.sleep(0)
        with choose_adapters(model, ["b"]):
            assert await inherits == ["a", "c"]  # the context in which it began is over

    asyncio.run(run())
