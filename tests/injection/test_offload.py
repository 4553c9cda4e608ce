"""Models whose weights accelerate keeps on the CPU or on disk, and brings to a device for each call."""

from __future__ import annotations

import copy
from collections.abc import Callable

import pytest
import torch
from accelerate import cpu_offload, disk_offload, dispatch_model
from support.models import bert, logits, refused, token_ids
from torch import nn

from lora_ext import LoraConfig, inject, load_adapter, merge, save_adapter

ALIVE = {"r": 2, "lora_alpha": 4, "init_lora_weights": False}


def cpu(model: nn.Module, tmp_path) -> nn.Module:
    return cpu_offload(model, execution_device="cpu")


def disk(model: nn.Module, tmp_path) -> nn.Module:
    return disk_offload(model, tmp_path / "offloaded", execution_device="cpu")


def mixed(model: nn.Module, tmp_path) -> nn.Module:
    """A part on a device, a part on the CPU, a part on disk, as ``device_map="auto"`` leaves a model."""
    device_map = {"bert.embeddings": "cpu", "bert.encoder.layer.0": "disk", "bert.encoder.layer.1": "cpu"}
    device_map |= {"bert.pooler": "cpu", "dropout": "cpu", "classifier": "cpu"}
    return dispatch_model(model, device_map, main_device="cpu", offload_dir=tmp_path / "offloaded", force_hooks=True)


def injected(model: nn.Module, **settings) -> nn.Module:
    torch.manual_seed(3)
    return inject(model, LoraConfig(**{"target_modules": ["query", "dense", "word_embeddings"]} | ALIVE | settings))


@pytest.mark.parametrize("offload", [cpu, disk, mixed])
def test_layers_and_files_of_an_offloaded_model(offload: Callable[..., nn.Module], tmp_path):
    base, ids = bert().eval(), token_ids()
    expected, model = injected(copy.deepcopy(base)), injected(offload(copy.deepcopy(base), tmp_path))
    torch.testing.assert_close(logits(model, ids), logits(expected, ids))
    for each in (model.train(), expected.train()):
        logits(each, ids).square().sum().backward()
    factors = {path: factor for path, factor in expected.named_parameters() if ".adapters." in path}
    for path, factor in model.named_parameters():
        if ".adapters." in path:
            assert torch.equal(factor, factors[path])  # on the device that computes, initialised
            torch.testing.assert_close(factor.grad, factors.pop(path).grad)
    assert not factors
    save_adapter(model, tmp_path / "adapter")
    loaded = load_adapter(offload(copy.deepcopy(base), tmp_path / "again"), tmp_path / "adapter")
    torch.testing.assert_close(logits(loaded, ids), logits(expected.eval(), ids))


def test_injected_before_offloading_it_computes_and_does_not_train_silently(tmp_path):
    expected, ids = injected(bert().eval()), token_ids()
    model = cpu(copy.deepcopy(expected), tmp_path)
    with torch.no_grad():
        torch.testing.assert_close(logits(model, ids), logits(expected, ids))
    with pytest.raises(RuntimeError, match="the factors are offloaded, and would get no gradient; inject after you"):
        logits(model.train(), ids)
    with refused(model, RuntimeError, "the weight of 'bert.embeddings.word_embeddings' is offloaded by accelerate"):
        merge(model)
