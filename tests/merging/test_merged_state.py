"""Whether and what is merged travels with a state_dict; the first layer with a mismatch refuses it."""

from __future__ import annotations

import copy

import pytest
import safetensors.torch
import torch
import torch.distributed.checkpoint.state_dict as dcp
from support.models import Net, refused
from torch import nn

from lora_ext import LoraConfig, inject, merge, unmerge
from lora_ext.adapters import lora_modules
from lora_ext.nn import LoraAdapter, LoraLinear


def pair() -> tuple[nn.Module, nn.Module]:
    """Returns two equal models, the second merged."""
    model = inject(Net(), LoraConfig(r=2, init_lora_weights=False, target_modules=["up", "head"])).eval()
    return model, merge(copy.deepcopy(model))


COUNTED_TWICE = [
    "load_state_dict: adapters are merged into",
    "in the state, where the update would count twice",
    "unmerge",
]


@pytest.mark.parametrize("form", ["torch", "safetensors"])
def test_files_say_what_is_merged(form, tmp_path):
    plain, merged = pair()
    if form == "torch":
        torch.save(merged.state_dict(), tmp_path / "state")
        state = torch.load(tmp_path / "state")
    else:
        safetensors.torch.save_file(merged.state_dict(), tmp_path / "state")
        state = safetensors.torch.load_file(tmp_path / "state")
    with refused(plain, RuntimeError, *COUNTED_TWICE):
        plain.load_state_dict(state)


def test_a_state_without_weights_is_taken_by_a_merged_model():
    plain, merged = pair()
    adapters = {key: torch.zeros_like(value) for key, value in plain.state_dict().items() if ".adapters." in key}
    result = merged.load_state_dict(adapters, strict=False)
    assert not result.unexpected_keys
    unmerge(merged)
    assert torch.equal(merged.head.weight, plain.head.weight)
    assert not any(
        parameter.any() for layer in dict(lora_modules(merged)).values() for parameter in layer.adapters.parameters()
    )


def test_layers_and_parts_without_inject():
    def layer() -> LoraLinear:
        return LoraLinear(nn.Linear(4, 3), LoraAdapter(4, 3, 2, 4, init_lora_weights=False)).eval()

    plain, merged = layer(), layer()
    merged.merge()
    with refused(plain, RuntimeError, "'LoraLinear' in the state"):
        plain.load_state_dict(merged.state_dict())
    with refused(merged, RuntimeError, "'LoraLinear' in the model"):
        merged.load_state_dict(plain.state_dict())
    plain, merged = pair()
    with refused(plain, RuntimeError, "'up'"):
        plain.blocks[0].load_state_dict(merged.blocks[0].state_dict())


def test_distributed_checkpoints_and_functional_calls_know_every_key():
    for model in pair():
        state = dcp.get_model_state_dict(model)
        assert {name for name, _ in model.named_parameters()} <= set(state)
        x = torch.randn(2, 6)
        assert torch.equal(torch.func.functional_call(model, model.state_dict(), (x,)), model(x))
    plain, merged = pair()
    with refused(plain, RuntimeError, *COUNTED_TWICE):
        dcp.set_model_state_dict(plain, dcp.get_model_state_dict(merged))
