"""FSDP2 around injected models equals one process: merged bits, files, checkpoints; what it refuses."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed.checkpoint as dcp
from support.models import Net, llama, snapshot, token_ids
from support.ranks import CHANGES, assert_bits, assert_merges_alike, loss_of, shard, trained, whole
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_state_dict, set_state_dict
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import Shard
from torch.distributed.tensor.parallel import ColwiseParallel, parallelize_module

from lora_ext import LoraConfig, inject, load_adapter, merge, save_adapter, unmerge
from lora_ext.adapters import hotswap_adapter, lora_modules, merge_record_bytes

pytestmark = [pytest.mark.full, pytest.mark.cpu_only("processes with gloo")]

LORA = {"r": 4, "lora_alpha": 8, "target_modules": ["q_proj", "k_proj", "v_proj", "down_proj", "embed_tokens"]}


DORA = {"r": 4, "target_modules": ["q_proj", "v_proj", "down_proj"], "use_dora": True}


def _adapted(config: dict[str, Any] = LORA) -> nn.Module:
    torch.manual_seed(1)
    return inject(llama(), LoraConfig(**config, init_lora_weights=False))


def _adapters_that_reshard(rank: int) -> None:
    model = _adapted()
    for _, layer in lora_modules(model):
        fully_shard(layer.adapters["default"], reshard_after_forward=True)
    with pytest.raises(RuntimeError, match="reshard_after_forward=False"):
        loss_of(model, token_ids())


def test_adapters_that_reshard_after_forward_are_refused(ranks):
    ranks(1, _adapters_that_reshard)


def _dora(rank: int) -> None:
    model = shard(_adapted(DORA), "base")
    with pytest.raises(RuntimeError, match="FSDP2 shards the base layer apart"):
        loss_of(model, token_ids(2))
    with pytest.raises(ValueError, match="its weight is sharded, and a DoRA adapter needs whole rows"):
        merge(shard(_adapted(DORA)))
    mesh = init_device_mesh("cpu", (2,))
    model = parallelize_module(nn.Sequential(nn.Linear(8, 6)), mesh, {"0": ColwiseParallel()})
    with pytest.raises(TypeError, match=r"0 \(Linear\): its weight is split over devices .tensor parallelism."):
        inject(model, LoraConfig(r=2, target_modules=["0"], use_dora=True))
    assert type(model[0]) is nn.Linear


def test_refusals_of_dora(ranks):
    ranks(2, _dora)


def _merging(rank: int, directory: Path) -> None:
    cases = [(torch.float32, {}), (torch.bfloat16, {}), (torch.bfloat16, {"rounding": "stochastic", "seed": 5})]
    for dtype, how in cases[: 3 if torch.distributed.get_world_size() == 2 else 1]:
        torch.manual_seed(2)
        config = {"r": 2, "target_modules": ["up", "down", "head"], "lora_bias": False, "init_lora_weights": False}
        model = inject(Net().to(dtype), LoraConfig(**config))
        inject(model, LoraConfig(**config | {"target_modules": ["up"]}), adapter_name="second")
        alone, x = copy.deepcopy(model).eval(), torch.randn(4, 6, dtype=dtype)
        for block in model.blocks:
            fully_shard(block)
        fully_shard(model, reshard_after_forward=False)
        model.eval()
        before = {key: value.clone() for key, value in alone.state_dict().items()}
        for names in ("default", "second"):
            model(x)  # the root keeps its whole parameters
            merge(model, names, **how)
            merge(alone, names, **how)
            assert_bits(model, alone.state_dict())
            torch.testing.assert_close(model(x), alone(x))
        total = torch.tensor(merge_record_bytes(model))
        torch.distributed.all_reduce(total)
        assert total >= merge_record_bytes(alone)
        unmerge(model, "default")
        unmerge(alone, "default")
        assert_bits(model, alone.state_dict())
        unmerge(model)
        assert_bits(model, before)
        if dtype is torch.float32:
            _refused(model, before, rank, directory)


def _refused(model: nn.Module, before: dict[str, Tensor], rank: int, directory: Path) -> None:
    """A refusal on one rank changes nothing on any."""
    with torch.no_grad():
        weight = model.head.base_layer.weight.to_local()
        kept = weight.clone()
        if rank == 0:
            weight[0, 0] = float("nan")
    reason = "NaN or infinite" if rank == 0 else "another rank cannot merge"
    with pytest.raises(ValueError, match=reason):
        merge(model, "default")
    with torch.no_grad():
        weight.copy_(kept)
    assert_bits(model, before)
    for caller, call in (CHANGES | {"hotswap_adapter": lambda model: hotswap_adapter(model, directory)}).items():
        with pytest.raises(ValueError, match=rf"^{caller}: the model is sharded \(fully_shard\)"):
            call(model)


@pytest.mark.parametrize("number", [2, 4])  # the head has 3 rows: some of 4 ranks have none
def test_merged_bits_shard_by_shard(ranks, number, tmp_path):
    ranks(number, _merging, tmp_path)


def _merging_apart(rank: int, apart: str) -> None:
    model = _adapted()
    alone = copy.deepcopy(model)
    if apart == "columns":
        fully_shard(model, shard_placement_fn=lambda parameter: Shard(1) if parameter.dim() == 2 else None)
    else:
        shard(model, apart)
    assert_merges_alike(model, alone)
    if apart == "columns":
        model.to(torch.bfloat16)
        before = {key: whole(value).clone() for key, value in model.state_dict().items()}
        with pytest.raises(
            ValueError, match="the columns of .* are split over ranks, and rounding='stochastic' is for"
        ):
            merge(model, rounding="stochastic")
        assert_bits(model, before)


@pytest.mark.parametrize("apart", ["base", "layer", "adapter", "whole", "columns"])
def test_merged_bits_wrapped_apart(ranks, apart):
    ranks(2, _merging_apart, apart)


def _files(rank: int, directory: Path) -> None:
    for way, config in (("", LORA), ("whole", LORA), ("dora", DORA)):
        model = _adapted(config)
        alone = copy.deepcopy(model)
        shard(model, way if way != "dora" else "")
        if rank == 0:
            save_adapter(alone, directory / f"alone{way}")
        save_adapter(model, directory / f"sharded{way}")
        with torch.no_grad():
            for parameter in trained(model).values():
                parameter.zero_()
        torch.distributed.barrier()
        load_adapter(model, directory / f"alone{way}")
        assert_bits(model, alone.state_dict())
        if way == "":
            (directory / "file").touch()
            error, text = (RuntimeError, "another rank could not write") if rank else (OSError, "cannot write there")
            with pytest.raises(error, match=text):
                save_adapter(model, directory / "file")
            with pytest.raises(TypeError, match="inject before you shard"):
                load_adapter(model, directory / "alone", adapter_name="new")


@pytest.mark.parametrize("number", [2, 3])
def test_files(ranks, number, tmp_path):
    ranks(number, _files, tmp_path)
    for way in ("", "whole", "dora"):
        assert snapshot(tmp_path / f"sharded{way}") == snapshot(tmp_path / f"alone{way}")


def _trained_state(rank: int, directory: Path, full: bool) -> dict[str, Tensor]:
    model, optimizer = _sharded_pair()
    for _ in range(2):
        loss_of(model, token_ids()).backward()
        optimizer.step()
        optimizer.zero_grad()
    state = _state(model, optimizer, full)
    if full:
        if rank == 0:
            torch.save(state, directory / "full.pt")
    else:
        dcp.save(state, checkpoint_id=directory / "sharded")
    return _values(model, optimizer)


def _sharded_pair() -> tuple[nn.Module, torch.optim.Optimizer]:
    model = _adapted()
    shard(model)
    return model, torch.optim.AdamW(trained(model).values(), lr=1e-2)


def _state(model: nn.Module, optimizer: torch.optim.Optimizer, full: bool) -> dict[str, Any]:
    options = StateDictOptions(full_state_dict=full, ignore_frozen_params=True)
    return dict(zip(("model", "optimizer"), get_state_dict(model, optimizer, options=options), strict=True))


def _values(model: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    values = {name: whole(p).detach() for name, p in trained(model).items()}
    for name, parameter in trained(model).items():
        values |= {f"{name} {key}": whole(value) for key, value in optimizer.state[parameter].items()}
    return values


def _loaded_state(rank: int, directory: Path, full: bool) -> dict[str, Tensor]:
    model, optimizer = _sharded_pair()
    options = StateDictOptions(full_state_dict=full, ignore_frozen_params=True, strict=False)
    if full:
        state = torch.load(directory / "full.pt", weights_only=False)
    else:
        state = _state(model, optimizer, full)
        dcp.load(state, checkpoint_id=directory / "sharded")
    set_state_dict(
        model, optimizer, model_state_dict=state["model"], optim_state_dict=state["optimizer"], options=options
    )
    return _values(model, optimizer)


@pytest.mark.parametrize("full", [False, True], ids=["sharded", "full"])
def test_checkpoints_of_two_ranks_load_on_one_and_three(ranks, tmp_path, full):
    saved = ranks(2, _trained_state, tmp_path, full)[0]
    assert any("exp_avg_sq" in key for key in saved)
    for number in (1, 3):
        for loaded in ranks(number, _loaded_state, tmp_path, full):
            assert loaded.keys() == saved.keys()
            assert all(torch.equal(loaded[key], value) for key, value in saved.items())
