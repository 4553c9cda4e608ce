"""Layers with DoRA adapters: PEFT's numbers and files, merges that restore every bit, and what is refused."""

import copy
import warnings

import pytest
import torch
from support.partitioned import partition
from support.quantized import quantized_copy, stored
from torch import nn
from transformers.pytorch_utils import Conv1D

from lora_ext import LoraConfig, adapters, inject, merge, unmerge
from lora_ext.nn import DoraAdapter, DoraLinear


def dora(**options) -> LoraConfig:
    return LoraConfig(**{"r": 4, "lora_alpha": 10, "target_modules": ["0"], "use_dora": True} | options)


def make_random(model: nn.Module) -> nn.Module:
    """Gives the factors, and the magnitudes, values of which each changes the output."""
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "magnitude" in name:
                parameter *= torch.linspace(0.4, 2.0, len(parameter))
            elif "lora_B" in name:
                parameter.normal_(std=0.2)
    return model


def layers(dtype: torch.dtype = torch.float32, base: nn.Module | None = None, **options) -> nn.Module:
    model = nn.Sequential(nn.Linear(24, 40) if base is None else base).to(dtype)
    return make_random(inject(model, dora(**options))).eval()


def test_a_new_adapter_changes_nothing_and_random_factors_are_measured():
    base = nn.Linear(24, 40)
    x = torch.randn(5, 24)
    torch.testing.assert_close(inject(nn.Sequential(copy.deepcopy(base)), dora())(x), base(x))
    model = inject(nn.Sequential(copy.deepcopy(base)), dora(init_lora_weights=False))
    adapter = model[0].adapters["default"]
    updated = base.weight + adapter.scaling * adapter.lora_B @ adapter.lora_A
    torch.testing.assert_close(adapter.lora_magnitude_vector, updated.norm(dim=1))
    torch.testing.assert_close(model(x), x @ updated.T + base.bias)


def test_a_merge_rounds_the_update_once():
    for base in (nn.Linear(24, 40), Conv1D(40, 24)):
        model = layers(torch.bfloat16, base)
        weight, eye = model[0].base_layer.weight, torch.eye(24, dtype=torch.float64)
        expected = (copy.deepcopy(model).double()(eye) - base.bias.double()).bfloat16()
        expected = expected if isinstance(base, Conv1D) else expected.T
        merge(model)
        torch.testing.assert_close(weight, expected, rtol=2**-7, atol=2**-7)
        assert adapters.merge_record_bytes(model) >= weight.nbytes


@pytest.mark.parametrize("format", ["nf4", "int8", "torchao-int8"])
def test_quantised_weights(format, tmp_path):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        quantised = quantized_copy(nn.Sequential(nn.Linear(64, 128)), format).requires_grad_(False)
    model = make_random(inject(copy.deepcopy(quantised), dora())).eval()
    x, bytes_before = torch.randn(5, 64), stored(model)
    y = model(x)
    y.sum().backward()
    assert all(p.grad is not None for p in model.parameters() if p.requires_grad)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # rounding hides a part of the update
        merge(model)
        (error,) = adapters.merge_errors(model).values()
        assert 0.0 < error.relative < 0.2 and (model(x) - y).norm() < 0.2 * y.norm()
    unmerge(model)
    assert all(torch.equal(tensor, bytes_before[name]) for name, tensor in stored(model).items())
    assert torch.equal(model(x), y)


def test_one_at_a_time():
    model = layers()
    inject(model, dora(r=2), "second")
    with pytest.raises(ValueError, match=r"'0' has the DoRA adapters \['default', 'second'\]; use only one"):
        adapters.set_adapter(model, ["default", "second"])
    assert adapters.adapter_status(model)[1].active and not adapters.adapter_status(model)[0].active
    model[0].set_active("default", "second")
    with pytest.raises(RuntimeError, match="use one DoRA adapter at a time"):
        model(torch.randn(2, 24))
    with pytest.raises(ValueError, match="a DoRA adapter is merged alone"):
        model[0].merge()
    model[0].set_active("default")
    model[0].merge()
    with pytest.raises(ValueError, match="'default' is merged into it, and a DoRA adapter is merged alone"):
        model[0].merge("second")
    with pytest.raises(RuntimeError, match="call unmerge first"):
        model[0].factors("second")
    model[0].unmerge()


def test_other_layers_may_have_other_adapters():
    base = nn.Sequential(nn.Linear(6, 8), nn.Linear(8, 4))
    x = torch.randn(3, 6)
    model = inject(copy.deepcopy(base), dora(init_lora_weights=False))
    inject(model, LoraConfig(r=2, target_modules=["1"], init_lora_weights=False), "plain")
    adapters.set_adapter(model, ["default", "plain"])
    merged = merge(copy.deepcopy(model).eval())
    torch.testing.assert_close(merged(x), model(x))
    adapter = DoraAdapter(6, 8, 2, 4)
    adapter.lora_magnitude_vector = nn.Parameter(torch.ones(7))
    with pytest.raises(ValueError, match="lora_magnitude_vector has shape"):
        DoraLinear(nn.Linear(6, 8), adapter)


def test_weights_that_zero_3_partitions(monkeypatch):
    model = nn.Sequential(nn.Linear(6, 8))
    partition(model, monkeypatch)
    with pytest.raises(TypeError, match="ZeRO-3 has partitioned its weight, from which use_dora takes the magnitudes"):
        inject(model, dora())
    model = inject(nn.Sequential(nn.Linear(6, 8)), dora())
    partition(model, monkeypatch, engine=True)
    with pytest.raises(RuntimeError, match="ZeRO-3 has partitioned the weight, .* use ZeRO-2"):
        model(torch.randn(2, 6))
