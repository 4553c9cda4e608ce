"""Makes the same adapted model twice, PEFT's and accelerated, for the tests of lora_ext.integrations.peft."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable
from typing import Any

import peft
import torch
from support.models import VOCABULARY, bert, gpt2, llama
from torch import Tensor, nn

from lora_ext.integrations.peft import accelerate, report

TARGETS = {"llama": ["q_proj", "v_proj", "down_proj"], "gpt2": ["c_attn", "c_proj"], "bert": ["query", "dense"]}
MODELS: dict[str, Callable[[], nn.Module]] = {"llama": llama, "gpt2": gpt2, "bert": bert}


def config(**options: Any) -> peft.LoraConfig:
    """Makes a config with both factors random, so that a new adapter changes the output."""
    return peft.LoraConfig(**{"r": 4, "lora_alpha": 6, "init_lora_weights": False} | options)


def pair(model: nn.Module, *configs: peft.LoraConfig) -> tuple[nn.Module, nn.Module]:
    """Makes ``(theirs, ours)`` in evaluation mode, with adapters "default", "1", "2", ...; the first is active."""
    theirs = peft.get_peft_model(model, configs[0])
    for name, more in enumerate(configs[1:], start=1):
        theirs.add_adapter(str(name), more)
    theirs.eval()
    return theirs, accelerate(copy.deepcopy(theirs))


def mlp_pair(*options: dict[str, Any]) -> tuple[nn.Module, nn.Module]:
    """Makes a :func:`pair` of two linear layers, with an adapter for each of ``options``."""
    configs = [config(**{"target_modules": ["0", "2"]} | more) for more in options or ({},)]
    return pair(nn.Sequential(nn.Linear(12, 20), nn.Tanh(), nn.Linear(20, 8)), *configs)


def model_pair(name: str, dtype: torch.dtype = torch.float32, **options: Any) -> tuple[nn.Module, nn.Module]:
    extra = {"target_modules": TARGETS[name], "fan_in_fan_out": name == "gpt2"}
    return pair(MODELS[name]().to(dtype), config(**extra | options))


def spread_magnitudes(*models: nn.Module) -> None:
    """Makes DoRA's magnitudes differ from the norms, so that each feature has a factor of its own."""
    for model in models:
        for name, parameter in model.named_parameters():
            if "magnitude" in name:
                with torch.no_grad():
                    parameter *= torch.linspace(0.4, 2.0, len(parameter))


def alora_prompts() -> tuple[Tensor, Tensor]:
    """Ids and mask of five rows with the invocation tokens 7, 8 at other places, twice, or not at all."""
    generator = torch.Generator().manual_seed(0)
    ids, mask = torch.randint(10, VOCABULARY, (5, 9), generator=generator), torch.ones(5, 9, dtype=torch.int64)
    for row, places in enumerate(([2], [4], [1, 5], [], [7])):
        for place in places:
            ids[row, place : place + 2] = torch.tensor([7, 8])
    ids[1, :3] = mask[1, :3] = 0
    return ids, mask


def set_active(models: Iterable[nn.Module], *names: str) -> None:
    for model in models:
        model.base_model.set_adapter(list(names))


def factors(model: nn.Module) -> dict[str, nn.Parameter]:
    return {name: parameter for name, parameter in model.named_parameters() if "lora_" in name}


def gradients(model: nn.Module, output: Callable[[nn.Module], Tensor]) -> dict[str, Tensor]:
    """Returns the gradients of the trained parameters, and the model's output under "output"."""
    model.zero_grad(set_to_none=True)
    y = output(model)
    y.double().square().sum().backward()
    grads = {name: p.grad for name, p in model.named_parameters() if p.requires_grad}
    return {"output": y.detach()} | {name: grad for name, grad in grads.items() if grad is not None}


def assert_same_step(theirs: nn.Module, ours: nn.Module, output: Callable[[nn.Module], Tensor]) -> None:
    """Checks that outputs and gradients agree up to float32's rounding, and that ours use the ops."""
    assert any(layer.accelerated for layer in report(ours)), report(ours)
    expected, actual = gradients(theirs, output), gradients(ours, output)
    assert expected.keys() == actual.keys() and len(expected) > 1
    for name, tensor in expected.items():
        torch.testing.assert_close(actual[name], tensor, rtol=1e-4, atol=2e-5 * tensor.abs().max().item(), msg=name)
