"""Adapters of layers that tensor parallelism splits equal those of one process, with one small collective each."""

from __future__ import annotations

import copy
import os
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
from support.models import Net, snapshot
from support.ranks import CHANGES, assert_merges_alike, assert_same, trained, whole
from support.versions import needs
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import Shard
from torch.distributed.tensor.debug import CommDebugMode
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module
from transformers import LlamaConfig, LlamaForCausalLM

from lora_ext import LoraConfig, inject, load_adapter, merge, save_adapter
from lora_ext.adapters import lora_modules, merge_and_unload

pytestmark = [pytest.mark.full, pytest.mark.cpu_only("processes with gloo")]

LORA = {"r": 3, "lora_alpha": 6, "target_modules": ["up", "down"], "init_lora_weights": False}


PLAN = {"blocks.*.up": ColwiseParallel(), "blocks.*.down": RowwiseParallel()}


def _adapted(mesh, **options: Any) -> tuple[nn.Module, nn.Module]:
    """A model that is split and then adapted, and one with the same adapter in one piece; only the blocks are run."""
    torch.manual_seed(2)
    holder = nn.ModuleDict({"blocks": Net().blocks})
    alone = inject(copy.deepcopy(holder), LoraConfig(**LORA | options))
    model = inject(parallelize_module(holder, mesh, PLAN), LoraConfig(**LORA | options))
    state = alone.state_dict()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.requires_grad:
                mine = torch.distributed.tensor.distribute_tensor(state[name], mesh, parameter.placements)
                parameter.copy_(mine)
    return model, alone


def _run(model: nn.Module, x: Tensor) -> Tensor:
    for block in model.blocks:
        x = block(x)
    return x


def _gradients(model: nn.Module) -> dict[str, Tensor]:
    return {name: whole(p.grad) for name, p in trained(model).items()}


def _compare(rank: int, options: dict[str, Any]) -> None:
    mesh = init_device_mesh("cpu", (2,))
    models, x = _adapted(mesh, **options), torch.randn(2, 8, 6)
    xs = [x.clone().requires_grad_() for _ in models]
    ys = [_run(one, x) for one, x in zip(models, xs, strict=True)]
    torch.testing.assert_close(*ys)
    for y in ys:
        y.square().sum().backward()
    torch.testing.assert_close(xs[0].grad, xs[1].grad)
    assert_same(*map(_gradients, models))


@pytest.mark.parametrize("options", [{}, {"lora_bias": True, "target_modules": ["up"]}], ids=["", "lora_bias"])
def test_outputs_and_gradients(ranks, options):
    ranks(2, _compare, options)


def _count(rank: int) -> None:
    mesh, counts = init_device_mesh("cpu", (2,)), []
    torch.manual_seed(2)
    holder = nn.ModuleDict({"blocks": Net().blocks})
    bare = parallelize_module(holder, mesh, PLAN).requires_grad_(False)
    for one in (bare, _adapted(mesh)[0]):
        with CommDebugMode() as collectives:
            _run(one, torch.randn(2, 8, 6).requires_grad_()).sum().backward()
        counts.append(collectives.get_total_counts())
    assert counts[1] - counts[0] == 4, counts  # an all-reduce for each of four layers


def test_one_collective_for_each_layer(ranks):
    ranks(2, _count)


def _dropout_of_one_process(rank: int) -> list[Tensor]:
    model, alone = _adapted(init_device_mesh("cpu", (2,)), lora_dropout=0.5)
    x, ys = torch.randn(2, 8, 6), []
    for seed in (3, 3, 4):
        torch.manual_seed(seed)
        ys.append(_run(model, x).detach())
        torch.manual_seed(seed)
        with mock.patch("torch.distributed.get_rank", return_value=0):  # draws as one process does
            torch.testing.assert_close(ys[-1], _run(alone, x).detach())
    return ys


def test_dropout_is_that_of_one_process_and_repeats_by_seed(ranks):
    first, second = ranks(2, _dropout_of_one_process)
    for ys in (first, second):
        assert torch.equal(ys[0], ys[1]) and not torch.equal(ys[0], ys[2])
    assert all(map(torch.equal, first, second))


def _files(rank: int, directory: Path) -> None:
    mesh = init_device_mesh("cpu", (2,))
    model, alone = _adapted(mesh)
    save_adapter(model, directory / "split")
    if rank == 0:
        save_adapter(alone, directory / "alone")
    assert_merges_alike(model, alone)
    torch.distributed.barrier()
    load_adapter(model, directory / "alone", adapter_name="again")
    x = torch.randn(1, 3, 6)
    torch.testing.assert_close(_run(model, x), _run(alone, x))
    assert merge_and_unload(model) is model and not any(lora_modules(model))
    torch.testing.assert_close(_run(model, x), _run(alone, x))


def test_merged_bits_and_files(ranks, tmp_path):
    ranks(2, _files, tmp_path)
    assert snapshot(tmp_path / "split") == snapshot(tmp_path / "alone")


def _two_dimensions(rank: int) -> None:
    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("data", "tensor"))
    model, alone = _adapted(mesh["tensor"])
    for block in model.blocks:
        fully_shard(block, mesh=mesh["data"])
    batches = torch.randn(2, 2, 3, 6)
    for _ in range(2):
        _run(model, batches[rank // 2]).square().mean().backward()
        _run(alone, batches.flatten(0, 1)).square().mean().backward()
        assert_same(_gradients(model), _gradients(alone))
    assert_merges_alike(model, alone)


def test_two_dimensions_with_fsdp2(ranks):
    ranks(4, _two_dimensions)


def _transformers(rank: int, directory: Path) -> None:
    from transformers.distributed import DistributedConfig

    config = {"r": 4, "target_modules": ["q_proj", "k_proj", "o_proj", "up_proj", "down_proj"]}
    config |= {"init_lora_weights": False}
    ids = torch.randint(48, (2, 7))
    torch.manual_seed(3)
    alone = inject(LlamaForCausalLM.from_pretrained(directory), LoraConfig(**config))
    if rank == 0:
        save_adapter(alone, directory / "adapter")
    torch.distributed.barrier()
    with mock.patch.dict(os.environ, {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": "2"}):
        model = LlamaForCausalLM.from_pretrained(directory, distributed_config=DistributedConfig(tp_plan="auto"))
    load_adapter(model, directory / "adapter", trainable=True)
    losses = [one(input_ids=ids, labels=ids).loss for one in (model, alone)]
    torch.testing.assert_close(*losses)
    for loss in losses:
        loss.backward()
    assert_same(_gradients(model), _gradients(alone))
    with torch.no_grad():
        outputs = [one.eval()(input_ids=ids).logits for one in (model, alone)]
        torch.testing.assert_close(*outputs)
        torch.testing.assert_close(merge(model)(input_ids=ids).logits, outputs[1])


@needs("transformers", "5.13", "DistributedConfig takes no tp_plan")
def test_tp_plan_of_transformers(ranks, tmp_path):
    sizes = {"vocab_size": 48, "hidden_size": 16, "num_hidden_layers": 2, "intermediate_size": 24}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 32}
    LlamaForCausalLM(LlamaConfig(**sizes, **heads)).save_pretrained(tmp_path)
    ranks(2, _transformers, tmp_path)


def _refused(rank: int) -> None:
    mesh = init_device_mesh("cpu", (2,))
    holder = nn.ModuleDict({"blocks": Net().blocks})
    plan = {"blocks.*.up": ColwiseParallel(use_local_output=False), "blocks.*.down": RowwiseParallel()}
    model = inject(parallelize_module(holder, mesh, plan), LoraConfig(**LORA))
    with pytest.raises(ValueError, match="returned a DTensor; parallelize it with use_local_output=True"):
        _run(model, torch.randn(2, 6))
    layouts = {"up": ColwiseParallel(input_layouts=Shard(1)), "down": RowwiseParallel(output_layouts=Shard(1))}
    for name, plan in layouts.items():  # sequence parallelism
        block = parallelize_module(Net().blocks[0], mesh, {name: plan})
        layer = getattr(inject(block, LoraConfig(**LORA | {"target_modules": [name]})), name)
        with pytest.raises(
            ValueError, match=r"and the same tokens; leave .*\(SequenceParallel\), out of target_modules"
        ):
            layer(torch.randn(2, 4, layer.weight.to_local().shape[1]))
    for caller in ("add_weighted_adapter", "prepare_hotswap"):
        with pytest.raises(ValueError, match=rf"^{caller}: layers .* split over devices"):
            CHANGES[caller](model)
    packed = nn.ModuleDict({"qkv": nn.Linear(6, 12)})
    parallelize_module(packed, mesh, {"qkv": ColwiseParallel()})
    with pytest.raises(TypeError, match=r"its weight is sharded \(DTensor\)"):
        inject(packed, LoraConfig(target_modules=["qkv"], enable_lora={"qkv": [True, False, True]}))


def test_refused(ranks):
    ranks(2, _refused)
