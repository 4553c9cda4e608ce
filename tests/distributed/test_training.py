"""Several processes train as one: losses, gradients and weights, for each engine and each way to adapt.

A new case is a row of CASES.
"""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Callable
from typing import Any

import peft
import pytest
import torch
from support.models import llama, token_ids
from support.ranks import assert_same, loss_of, shard, trained
from torch import Tensor, nn
from torch.distributed.fsdp import CPUOffloadPolicy, FullyShardedDataParallel, MixedPrecisionPolicy
from torch.nn.parallel import DistributedDataParallel

from lora_ext import LoraConfig, inject
from lora_ext.adapters import input_groups, set_adapter, unload
from lora_ext.integrations.peft import accelerate

pytestmark = [pytest.mark.full, pytest.mark.cpu_only("processes with gloo")]

STEPS, PARTS = 2, 2  # optimiser steps, and batches that DDP accumulates in each
LORA = {"r": 4, "lora_alpha": 8, "target_modules": ["q_proj", "k_proj", "v_proj", "down_proj", "embed_tokens"]}
MIXED = MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32)
BFLOAT16 = {"dtype": torch.bfloat16}  # float32 factors next to them
KEEP = {"reshard_after_forward": False}


def injected(dtype: torch.dtype = torch.float32, blocks: int = 2, **options: Any) -> tuple[nn.Module, nn.Module]:
    base = llama().to(dtype)
    base.model.layers = base.model.layers[:blocks]
    alone = inject(base, LoraConfig(**LORA | {"init_lora_weights": False} | options))
    with torch.no_grad():
        for name, parameter in alone.named_parameters():
            if "magnitude" in name:
                parameter *= torch.linspace(0.5, 2.0, len(parameter))
    return copy.deepcopy(alone), alone


def injected_dora() -> tuple[nn.Module, nn.Module]:
    return injected(use_dora=True, target_modules=["q_proj", "v_proj", "down_proj"])


def shared_and_alone() -> tuple[nn.Module, nn.Module]:
    config = LoraConfig(target_modules="all-linear", r=2, init_lora_weights=False)
    alone = inject(llama(), config, share_inputs=False)
    shared = inject(unload(copy.deepcopy(alone)), config)
    shared.load_state_dict(alone.state_dict())
    return shared, alone


def of_peft() -> tuple[nn.Module, nn.Module]:
    alone = accelerate(peft.get_peft_model(llama(), peft.LoraConfig(**LORA, init_lora_weights=False)))
    return copy.deepcopy(alone), alone


def compiled(model: nn.Module) -> nn.Module:
    return torch.compile(DistributedDataParallel(model), backend="eager")


def fsdp1(model: nn.Module) -> nn.Module:
    """PEFT's layers get their weights as views of FSDP's parameters, whose memory is freed between uses."""
    options = {"use_orig_params": True, "device_id": torch.device("cpu")}
    layers = model.base_model.model.model.layers
    for i, layer in enumerate(layers):
        layers[i] = FullyShardedDataParallel(layer, **options)
    return FullyShardedDataParallel(model, **options)


def fsdp2(apart: str = "") -> Callable[..., nn.Module]:
    return lambda model, **options: shard(model, apart, **options)


ENGINES = {"DDP": DistributedDataParallel, "compiled DDP": compiled, "FSDP1": fsdp1}
ENGINES |= {f"FSDP2 {apart}": fsdp2(apart) for apart in ("", "base", "layer", "adapter", "whole")}
WAYS = {
    "inject": injected,
    "one block": lambda: injected(blocks=1),
    "dora": injected_dora,
    "peft": of_peft,
    "shared inputs": shared_and_alone,
}
CASES = [
    ("inject", "DDP", None, {}),
    ("peft", "DDP", None, {}),
    ("inject", "DDP", True, {}),
    ("inject", "DDP", False, {}),
    ("one block", "compiled DDP", None, {}),
    ("shared inputs", "DDP", None, {}),
    ("peft", "FSDP1", None, {}),
    ("peft", "FSDP1", False, {}),
    ("inject", "FSDP2 ", None, {}),
    ("inject", "FSDP2 ", None, KEEP),
    ("inject", "FSDP2 ", None, BFLOAT16),
    ("inject", "FSDP2 ", None, {"mp_policy": MIXED}),
    ("inject", "FSDP2 ", None, {"offload_policy": CPUOffloadPolicy(pin_memory=False)}),
    ("inject", "FSDP2 ", False, {}),
    ("inject", "FSDP2 ", True, {}),
    ("inject", "FSDP2 base", None, {}),
    ("inject", "FSDP2 base", False, KEEP),
    ("inject", "FSDP2 layer", None, {}),
    ("inject", "FSDP2 layer", False, {}),
    ("inject", "FSDP2 adapter", None, {}),
    ("inject", "FSDP2 whole", None, {}),
    *[("dora", engine, None, {}) for engine in ("DDP", "FSDP2 ", "FSDP2 layer", "FSDP2 adapter")],
]


def _train(rank: int, way: str, engine: str, checkpointing: bool | None, options: dict[str, Any]) -> None:
    torch.manual_seed(1)
    options = dict(options)
    model, alone = WAYS[way](**{key: options.pop(key) for key in ("dtype",) if key in options})
    for one in (model, alone) if checkpointing is not None else ():
        one.enable_input_require_grads()
        one.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": checkpointing})
    outer, computes = ENGINES[engine](model, **options), alone
    if "mp_policy" in options:
        computes = copy.deepcopy(alone)
        for parameter in computes.parameters():  # not the buffers
            parameter.data = parameter.data.bfloat16()
    ranks, parts = torch.distributed.get_world_size(), PARTS if "DDP" in engine else 1
    no_sync = getattr(outer, "_orig_mod", outer).no_sync if parts > 1 else contextlib.nullcontext
    optimizers = [torch.optim.AdamW(trained(one).values(), lr=1e-2) for one in (outer, alone)]
    for _ in range(STEPS):
        if computes is not alone:
            computes.load_state_dict(alone.state_dict())
        shares: dict[Tensor, Tensor] = {}
        batches = token_ids(2 * parts * ranks).unflatten(0, (parts, ranks, 2))  # the same on all ranks
        for part, batch in enumerate(batches):
            with no_sync() if part < parts - 1 else contextlib.nullcontext():
                loss = loss_of(outer, batch[rank])
                (loss / parts).backward()
            for index, ids in enumerate(batch):
                expected = loss_of(computes, ids)
                if index == rank:
                    torch.testing.assert_close(loss.detach(), expected.detach())
                expected.backward()
                for parameter, computed in zip(trained(alone).values(), trained(computes).values(), strict=True):
                    share = computed.grad.to(parameter.dtype) / (ranks * parts)
                    shares[parameter] = shares.get(parameter, 0) + share
                    computed.grad = None
        for parameter in trained(model).values() if engine == "FSDP2 whole" else ():
            torch.distributed.all_reduce(parameter.grad)
            parameter.grad /= ranks
        for parameter, share in shares.items():
            parameter.grad = share
        if engine != "FSDP1":  # whose gradients are flat
            assert_same(*({name: p.grad for name, p in trained(one).items()} for one in (model, alone)))
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad()
    if engine == "FSDP1":
        ids = token_ids(3)
        torch.testing.assert_close(loss_of(outer, ids).detach(), loss_of(alone, ids).detach())
    else:
        assert_same(trained(model), trained(alone))
    if way == "shared inputs":
        assert len(input_groups(model).together) == 4  # q/k/v and gate/up of two blocks
        assert len(trained(model)) == 28  # two factors of seven layers in two blocks


@pytest.mark.parametrize(("way", "engine", "checkpointing", "options"), CASES, ids=str)
def test_losses_gradients_and_weights(ranks, way, engine, checkpointing, options):
    ranks(2, _train, way, engine, checkpointing, options)


def _one_of_several(rank: int, engine: str) -> None:
    """Adapters are switched; with DDP, which wraps again after a switch, one is active: no unused parameters."""
    model, _ = injected()
    second = LoraConfig(r=2, target_modules=["q_proj"], init_lora_weights=False)
    inject(model, second, adapter_name="second")
    alone = copy.deepcopy(model)
    outer = shard(model) if engine == "FSDP2 " else None
    for name in ("default", "second", *([["default", "second"]] if outer else [])):
        for one in (model, alone):
            set_adapter(one, name)
            one.zero_grad()
        parallel = outer or DistributedDataParallel(model)
        batches = token_ids(4).unflatten(0, (2, 2))
        for _ in range(2):  # a parameter without a gradient in the first backward is an error in the second forward
            model.zero_grad()
            loss_of(parallel, batches[rank]).backward()
        (sum(loss_of(alone, ids) for ids in batches) / 2).backward()
        gradients = {key: p.grad for key, p in trained(model).items()}
        assert gradients and (not isinstance(name, str) or all(f".{name}." in key for key in gradients))
        assert_same(gradients, {key: p.grad for key, p in trained(alone).items()})


@pytest.mark.parametrize("engine", ["DDP", "FSDP2 "])
def test_switching_adapters(ranks, engine):
    ranks(2, _one_of_several, engine)
