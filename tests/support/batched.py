"""Continuous batching: small batches, requests, and what ``generate`` computes for each of them alone."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import pytest
import torch
from support.models import VOCABULARY, llama
from support.rows import use, with_adapters
from support.versions import before
from torch import nn

if before("transformers", "5.18"):
    pytest.skip("Transformers before 5.18 has another continuous batching, which is refused", allow_module_level=True)
from transformers import ContinuousBatchingConfig, ContinuousBatchingManager, GenerationConfig

TARGETS = ["q_proj", "k_proj", "v_proj", "down_proj", "lm_head"]
NAMES = ["b", "__base__", "a", "b", "c", "a"]
NEW = 5


def with_abc(targets: list[str] = TARGETS) -> nn.Module:
    return with_adapters(llama(), targets)


def prompts(lengths: tuple[int, ...] = (9, 9, 9, 11, 3, 1)) -> list[list[int]]:
    """Prompts that begin with the same tokens."""
    ids = torch.randint(3, VOCABULARY, (max(lengths),)).tolist()
    return [[*ids[: length - 1], 3 + i] for i, length in enumerate(lengths)]


def config(**options) -> ContinuousBatchingConfig:
    """Small batches, so that prompts are computed in several, and small blocks, so that requests share them."""
    return ContinuousBatchingConfig(**{"page_size": 4, "num_blocks": 64, "max_batch_tokens": 8} | options)


def generation(**options) -> GenerationConfig:
    return GenerationConfig(
        **{"max_new_tokens": NEW, "do_sample": False, "eos_token_id": -1, "pad_token_id": 0} | options
    )


def generated(model: nn.Module, inputs: list[list[int]], names: list[str | None] | None, **options) -> list[list[int]]:
    results = model.generate_batch(
        inputs, generation_config=generation(), continuous_batching_config=config(**options), adapter_names=names
    )
    assert all(result.error is None for result in results.values())
    return [result.generated_tokens for result in results.values()]


def alone(model: nn.Module, inputs: list[list[int]], names: list[str]) -> list[list[int]]:
    """Returns the new tokens of ``generate`` for each prompt by itself."""
    tokens = []
    for prompt, name in zip(inputs, names, strict=True):
        use(model, name)
        ids = torch.tensor([prompt])
        tokens.append(model.generate(ids, generation_config=generation(), attention_mask=ids > -1)[0].tolist())
    return [row[len(prompt) :] for row, prompt in zip(tokens, inputs, strict=True)]


@contextmanager
def running(model: nn.Module, **options) -> Iterator[ContinuousBatchingManager]:
    """A manager that serves requests; ``options`` as in :func:`config`."""
    batching = config(**options)
    with model.continuous_batching_context_manager(generation(), continuous_batching_config=batching) as manager:
        yield manager


def asked(manager: ContinuousBatchingManager, prompt: list[int], name: str | None = None) -> list[int]:
    """The tokens of one request."""
    manager.add_request(prompt, adapter_name=name)
    return manager.get_result(timeout=60).generated_tokens
