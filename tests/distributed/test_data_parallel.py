"""DistributedDataParallel around injected and accelerated models equals one process with the same batches."""

from __future__ import annotations

import copy
import json
import re
import socket
from pathlib import Path

import peft
import pytest
import torch
from safetensors.torch import load_file
from support.models import Net, llama, token_ids
from support.processes import run_python
from support.ranks import assert_same, assert_trains_alike, loss_of, trained
from support.shared_llama import assert_shares, shared_and_alone
from torch import Tensor, nn
from torch.distributed.fsdp import FullyShardedDataParallel
from torch.nn.parallel import DistributedDataParallel

from lora_ext import LoraConfig, inject, load_adapter, merge, save_adapter, unmerge
from lora_ext.adapters import (
    adapter_names,
    add_weighted_adapter,
    merge_and_unload,
    prepare_hotswap,
    set_adapter,
    trainable_parameter_counts,
    unload,
)
from lora_ext.integrations.peft import accelerate

pytestmark = pytest.mark.cpu_only("processes with gloo")

STEPS, PARTS = 2, 2  # optimiser steps, and batches accumulated in each
LORA = {"r": 4, "lora_alpha": 8, "target_modules": ["q_proj", "k_proj", "v_proj", "down_proj", "embed_tokens"]}


def _adapted(way: str) -> nn.Module:
    torch.manual_seed(1)
    if way == "inject":
        return inject(llama(), LoraConfig(**LORA, init_lora_weights=False))
    return accelerate(peft.get_peft_model(llama(), peft.LoraConfig(**LORA, init_lora_weights=False)))


def _train(rank: int, way: str, checkpointing: bool | None, backend: str | None) -> None:
    alone, ranks = _adapted(way), torch.distributed.get_world_size()
    model = copy.deepcopy(alone)
    if checkpointing is not None:
        for one in (model, alone):
            one.enable_input_require_grads()
            one.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": checkpointing})
    parallel = DistributedDataParallel(model)
    if backend is not None:
        parallel = torch.compile(parallel, backend=backend)
    optimizers = [torch.optim.AdamW(trained(one).values(), lr=1e-2) for one in (model, alone)]
    for _ in range(STEPS):
        batches = token_ids(2 * PARTS * ranks).unflatten(0, (PARTS, ranks, 2))  # the same on all ranks
        losses: list[Tensor] = []
        for part in range(PARTS - 1):
            with (parallel if backend is None else parallel._orig_mod).no_sync():
                losses.append(loss_of(parallel, batches[part, rank]) / PARTS)
                losses[-1].backward()
        losses.append(loss_of(parallel, batches[PARTS - 1, rank]) / PARTS)
        losses[-1].backward()
        alone_losses = [loss_of(alone, ids) / (PARTS * ranks) for ids in batches.flatten(0, 1)]
        for loss in alone_losses:
            loss.backward()
        mean = torch.stack(losses).detach().sum()
        torch.distributed.all_reduce(mean)
        torch.testing.assert_close(mean / ranks, torch.stack(alone_losses).detach().sum())
        assert_same(*({name: p.grad for name, p in trained(one).items()} for one in (model, alone)))
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad()
    assert_same(trained(model), trained(alone))


@pytest.mark.parametrize("way", ["inject", "peft"])
def test_losses_gradients_and_weights_with_accumulation(ranks, way):
    ranks(2, _train, way, None, None)


@pytest.mark.parametrize("reentrant", [False, True])
def test_gradient_checkpointing(ranks, reentrant):
    ranks(2, _train, "inject", reentrant, None)


@pytest.mark.full
def test_compiled(ranks):
    ranks(2, _train, "inject", None, "eager")


def _one_of_several(rank: int) -> None:
    model = _adapted("inject")
    inject(model, LoraConfig(r=2, target_modules=["q_proj"], init_lora_weights=False), adapter_name="second")
    for name in ("default", "second"):
        set_adapter(model, name)
        parallel = DistributedDataParallel(model)  # wraps again after a switch
        batches = token_ids(4).unflatten(0, (2, 2))
        for _ in range(2):  # a parameter without a gradient in the first backward is an error in the second forward
            model.zero_grad()
            loss_of(parallel, batches[rank]).backward()
        gradients = {key: p.grad for key, p in trained(model).items()}
        assert gradients and all(f".{name}." in key for key in gradients)
        model.zero_grad()
        (sum(loss_of(model, ids) for ids in batches) / 2).backward()
        assert_same(gradients, {key: p.grad for key, p in trained(model).items()})


def test_several_adapters_one_active_without_find_unused_parameters(ranks):
    ranks(2, _one_of_several)


def _with_shared_inputs(rank: int) -> None:
    shared, alone = shared_and_alone()
    assert_trains_alike(rank, DistributedDataParallel(shared), shared, alone)
    assert_shares(shared)
    assert len(trained(shared)) == 28  # two factors of seven layers in two blocks


@pytest.mark.full
def test_layers_that_share_inputs(ranks):
    ranks(2, _with_shared_inputs)


def _sharded_by_fsdp1(rank: int, checkpointing: bool) -> None:
    alone = _adapted("peft")
    model, cpu = copy.deepcopy(alone), torch.device("cpu")
    layers = model.base_model.model.model.layers
    if checkpointing:
        model.enable_input_require_grads()
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    for i, layer in enumerate(layers):
        layers[i] = FullyShardedDataParallel(layer, use_orig_params=True, device_id=cpu)
    wrapped = FullyShardedDataParallel(model, use_orig_params=True, device_id=cpu)
    optimizers = [torch.optim.AdamW(trained(one).values(), lr=1e-2) for one in (wrapped, alone)]
    for _ in range(STEPS):
        batches = token_ids(4).unflatten(0, (2, 2))
        loss, losses = loss_of(wrapped, batches[rank]), [loss_of(alone, ids) for ids in batches]
        torch.testing.assert_close(loss.detach(), losses[rank].detach())
        loss.backward()
        (sum(losses) / 2).backward()
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad()
    ids = token_ids(3)
    torch.testing.assert_close(loss_of(wrapped, ids).detach(), loss_of(alone, ids).detach())


@pytest.mark.parametrize("checkpointing", [False, True])
def test_peft_sharded_by_fsdp1(ranks, checkpointing):
    """PEFT's layers get their weights as views of FSDP's parameters, whose memory is freed between uses."""
    ranks(2, _sharded_by_fsdp1, checkpointing)


def _masks(rank: int, way: str) -> list[Tensor]:
    torch.manual_seed(3)
    net, config = Net(), {"r": 4, "target_modules": ["up"], "lora_dropout": 0.5, "init_lora_weights": False}
    if way == "inject":
        model = inject(net, LoraConfig(**config))
    else:
        model = accelerate(peft.get_peft_model(net, peft.LoraConfig(**config)))
    parallel, x = DistributedDataParallel(model), torch.randn(32, 6)
    outputs = []
    for seed in (0, 0, 1):
        torch.manual_seed(seed)
        outputs.append(parallel(x).detach())
    return outputs


@pytest.mark.parametrize("way", ["inject", "peft"])
def test_dropout_masks_differ_between_ranks_and_repeat_by_seed(ranks, way):
    first, second = ranks(2, _masks, way)
    for outputs in (first, second):
        assert torch.equal(outputs[0], outputs[1]) and not torch.equal(outputs[0], outputs[2])
    assert not torch.equal(first[0], second[0])
    alone = ranks(1, _masks, way)[0]
    assert torch.equal(first[0], alone[0])  # rank 0 draws the masks of one process


REFUSED = {
    "inject": lambda model: inject(model, LoraConfig(target_modules=["up"]), adapter_name="new"),
    "set_adapter": lambda model: set_adapter(model, "default"),
    "add_weighted_adapter": lambda model: add_weighted_adapter(model, ["default"], [1.0], "sum"),
    "prepare_hotswap": lambda model: prepare_hotswap(model, 8),
    "merge_and_unload": merge_and_unload,
    "unload": unload,
}


def _functions(rank: int, directory: Path) -> None:
    torch.manual_seed(2)
    injected = inject(Net(), LoraConfig(r=2, target_modules=["up", "head"], init_lora_weights=False))
    state = {key: value.clone() for key, value in injected.state_dict().items()}
    merged = merge(copy.deepcopy(injected)).state_dict()
    for wrap in (lambda model: model, lambda model: torch.compile(model, backend="eager")):
        model = copy.deepcopy(injected)
        parallel = wrap(DistributedDataParallel(model))
        save_adapter(parallel, directory / "shared")  # all ranks at once
        save_adapter(model, directory / f"alone {rank}")
        assert adapter_names(parallel) == ["default"]
        assert trainable_parameter_counts(parallel) == trainable_parameter_counts(model)
        assert load_adapter(parallel, directory / f"alone {rank}") is parallel
        for function, expected in ((merge, merged), (unmerge, state)):
            function(parallel)
            for key, value in expected.items():
                assert torch.equal(model.state_dict()[key], value), key
        for caller, call in REFUSED.items():
            with pytest.raises(ValueError, match=rf"{caller}: the model is wrapped by Distributed.* on model\.module"):
                call(parallel)
        with pytest.raises(ValueError, match="inject: the model is wrapped"):
            load_adapter(parallel, directory / "shared", adapter_name="new")
        assert adapter_names(parallel) == ["default"]


def test_functions_on_the_wrapper(ranks, tmp_path):
    ranks(2, _functions, tmp_path)
    folders = [tmp_path / name for name in ("shared", "alone 0", "alone 1")]
    contents = [{file.name: file.read_bytes() for file in folder.iterdir()} for folder in folders]
    assert contents[0] == contents[1] == contents[2]
    config = json.loads(contents[0]["adapter_config.json"])
    assert sorted(config["target_modules"]) == ["head", "up"]  # no path begins with "module."
    keys = load_file(tmp_path / "shared" / "adapter_model.safetensors").keys()
    assert "base_model.model.blocks.0.up.lora_A.weight" in keys


@pytest.mark.slow
@pytest.mark.parametrize("way", ["inject", "peft"])
@pytest.mark.parametrize(
    "launcher",
    [
        ["torch.distributed.run", "--nproc-per-node", "2", "--master-port"],
        # For --cpu, accelerate starts processes by MPI only.
        ["accelerate.commands.launch", "--multi_gpu", "--num_processes", "2", "--main_process_port"],
    ],
    ids=["torchrun", "accelerate"],
)
def test_launchers(launcher, way):
    """The example trains in two processes, and a resumed run gets the weights of a run in one piece."""
    example = Path(__file__).parents[2] / "examples" / "accelerate_loop.py"
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    done = run_python("-m", *launcher, port, example, way, OMP_NUM_THREADS="1")
    assert done.returncode == 0, done.stderr
    losses = re.findall(r"loss (\S+); resumed from epoch 10 (\S+)", done.stdout)
    assert len(losses) == 1 and losses[0][0] == losses[0][1], done.stdout
