"""DoRA adapters under DDP and FSDP2 equal one process."""

from __future__ import annotations

import copy
from pathlib import Path

import pytest
import torch
from support.models import llama, token_ids
from support.ranks import assert_same, assert_trains_alike, loss_of, shard, trained
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from lora_ext import LoraConfig, inject, load_adapter, merge, save_adapter
from lora_ext.nn import DoraLinear

pytestmark = [pytest.mark.full, pytest.mark.cpu_only("processes with gloo")]


def _adapted() -> nn.Module:
    torch.manual_seed(1)
    config = LoraConfig(r=4, target_modules=["q_proj", "v_proj", "down_proj"], use_dora=True, init_lora_weights=False)
    model = inject(llama(), config)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "magnitude" in name:
                parameter *= torch.linspace(0.5, 2.0, len(parameter))
    return model


def _train(rank: int, how: str, directory: Path) -> None:
    alone = _adapted()
    model = copy.deepcopy(alone)
    assert_trains_alike(rank, DistributedDataParallel(model) if how == "DDP" else shard(model, how), model, alone)
    save_adapter(model, directory / "adapter")
    torch.distributed.barrier()
    loaded = load_adapter(llama(), directory / "adapter", trainable=True)
    assert_same(trained(loaded), trained(alone))
    if how != "DDP":
        with pytest.raises(ValueError, match="its weight is sharded, and a DoRA adapter needs whole rows"):
            merge(model)


@pytest.mark.parametrize("how", ["DDP", "", "layer", "adapter"])
def test_losses_gradients_weights_and_files(ranks, how, tmp_path):
    ranks(2, _train, how, tmp_path)


def _base_apart(rank: int) -> None:
    model = shard(_adapted(), "base")
    with pytest.raises(RuntimeError, match="FSDP2 shards the base layer apart"):
        loss_of(model, token_ids(2))


def test_a_base_layer_in_a_unit_of_its_own(ranks):
    ranks(2, _base_apart)


def _split(rank: int) -> None:
    from torch.distributed.tensor.parallel import ColwiseParallel, parallelize_module

    mesh = torch.distributed.init_device_mesh("cpu", (2,))
    model = parallelize_module(nn.Sequential(nn.Linear(8, 6)), mesh, {"0": ColwiseParallel()})
    with pytest.raises(TypeError, match=r"0 \(Linear\): its weight is split over devices .tensor parallelism."):
        inject(model, LoraConfig(r=2, target_modules=["0"], use_dora=True))
    assert not isinstance(model[0], DoraLinear)


def test_weights_that_tensor_parallelism_splits(ranks):
    ranks(2, _split)
