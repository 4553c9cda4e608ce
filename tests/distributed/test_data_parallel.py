"""DistributedDataParallel around injected and accelerated models: masks, functions on the wrapper, launchers."""

from __future__ import annotations

import copy
import json
from pathlib import Path

import peft
import pytest
import torch
from safetensors.torch import load_file
from support.models import Net, snapshot
from support.ranks import CHANGES
from torch import Tensor
from torch.nn.parallel import DistributedDataParallel

from lora_ext import LoraConfig, inject, load_adapter, merge, save_adapter, unmerge
from lora_ext.adapters import adapter_names, set_adapter, trainable_parameter_counts
from lora_ext.integrations.peft import accelerate

pytestmark = [pytest.mark.full, pytest.mark.cpu_only("processes with gloo")]


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


REFUSED = CHANGES | {
    "inject": lambda model: inject(model, LoraConfig(target_modules=["up"]), adapter_name="new"),
    "set_adapter": lambda model: set_adapter(model, "default"),
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
        torch.distributed.barrier()  # before a rank loads what the other one may still save
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
        torch.distributed.barrier()  # before a rank saves again what the other one may still read


def test_functions_on_the_wrapper(ranks, tmp_path):
    ranks(2, _functions, tmp_path)
    contents = [snapshot(tmp_path / name) for name in ("shared", "alone 0", "alone 1")]
    assert contents[0] == contents[1] == contents[2]
    config = json.loads(contents[0]["adapter_config.json"])
    assert sorted(config["target_modules"]) == ["head", "up"]  # no path begins with "module."
    keys = load_file(tmp_path / "shared" / "adapter_model.safetensors").keys()
    assert "base_model.model.blocks.0.up.lora_A.weight" in keys
