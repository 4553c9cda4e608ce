"""Layers that share inputs inside what trains and generates: Trainer, DDP, accumulation, caches of decoders."""

from __future__ import annotations

import copy
from pathlib import Path

import pytest
import torch
from support.models import llama, token_ids
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from transformers import Trainer, TrainingArguments

from lora_ext import LoraConfig, inject
from lora_ext.adapters import input_groups

pytestmark = pytest.mark.cpu_only("gloo and Trainer on the CPU")

OPTIONS = {"target_modules": "all-linear", "r": 2, "init_lora_weights": False}


def shared_and_alone(**options) -> tuple[nn.Module, nn.Module]:
    torch.manual_seed(0)
    base, config = llama(), LoraConfig(**OPTIONS | options)
    shared, alone = inject(copy.deepcopy(base), config), inject(base, config, share_inputs=False)
    alone.load_state_dict(shared.state_dict())
    return shared, alone


def assert_same_values(shared: nn.Module, alone: nn.Module) -> None:
    for (name, ours), theirs in zip(shared.named_parameters(), alone.parameters(), strict=True):
        torch.testing.assert_close(ours, theirs, msg=lambda text, name=name: f"{name}: {text}")


def assert_shares(model: nn.Module) -> None:
    assert sum(group.shared for group in input_groups(model)) == 4  # q/k/v and gate/up of two blocks


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"gradient_accumulation_steps": 2},
        {"gradient_checkpointing": True, "gradient_checkpointing_kwargs": {"use_reentrant": True}},
        {"gradient_checkpointing": True, "gradient_checkpointing_kwargs": {"use_reentrant": False}},
        {"bf16": True},
    ],
    ids=["plain", "accumulation", "reentrant", "not reentrant", "autocast"],
)
def test_trainer(options, tmp_path):
    data = [{"input_ids": row, "labels": row} for row in token_ids(8)]
    models = shared_and_alone()
    losses = []
    for model in models:
        arguments = TrainingArguments(
            str(tmp_path),
            per_device_train_batch_size=2,
            max_steps=3,
            report_to=[],
            save_strategy="no",
            use_cpu=True,
            **options,
        )
        losses.append(Trainer(model, arguments, train_dataset=data).train().training_loss)
    assert_shares(models[0])
    # Autocast rounds the sum of the gradients of one input once instead of twice.
    assert losses[0] == pytest.approx(losses[1], rel=1e-3 if "bf16" in options else 1e-6)
    if "bf16" not in options:
        assert_same_values(*models)


@pytest.mark.parametrize("cache", ["dynamic", "static"])
@pytest.mark.parametrize("beams", [1, 2])
def test_generate(cache, beams):
    shared, alone = shared_and_alone()
    options = {"max_new_tokens": 6, "do_sample": False, "num_beams": beams, "pad_token_id": 0}
    if cache == "static":
        options |= {"cache_implementation": "static", "disable_compile": True}
    ids = token_ids()
    for _ in range(2):
        tokens = [model.eval().generate(ids, **options) for model in (shared, alone)]
        assert torch.equal(*tokens)
    assert_shares(shared)


def _loss(model: nn.Module, ids: Tensor) -> Tensor:
    return model(input_ids=ids, labels=ids).loss


def _process(rank: int, directory: str) -> None:
    store = torch.distributed.FileStore(f"{directory}/store", 2)
    torch.distributed.init_process_group("gloo", store=store, rank=rank, world_size=2)
    try:
        shared, alone = shared_and_alone()
        ids = token_ids(4)
        parallel = DistributedDataParallel(shared)
        for _ in range(2):
            shared.zero_grad(set_to_none=True)
            _loss(parallel, ids[2 * rank : 2 * rank + 2]).backward()
        _loss(alone, ids).backward()
        assert_shares(shared)
        for (name, ours), theirs in zip(shared.named_parameters(), alone.parameters(), strict=True):
            if theirs.grad is not None:
                torch.testing.assert_close(ours.grad, theirs.grad, msg=lambda text, name=name: f"{name}: {text}")
        Path(directory, f"done {rank}").touch()
    finally:
        torch.distributed.destroy_process_group()


@pytest.mark.full
def test_two_processes_with_ddp(tmp_path):
    torch.multiprocessing.spawn(_process, (str(tmp_path),), nprocs=2)
    assert {path.name for path in tmp_path.glob("done *")} == {"done 0", "done 1"}
