"""Merging into quantised weights: the error, the bytes after unmerging, dequantised models, refusals."""

import copy
import dataclasses
import pickle
import warnings

import pytest
import torch
from support.optional import bitsandbytes
from support.quantized import QUANTIZE, quantized_copy, stored, unchanged_bytes
from torch import nn
from torchao.quantization import Int8Tensor

from lora_ext import LoraConfig, inject, merge, set_adapter, unmerge
from lora_ext.adapters import merge_and_unload, merge_errors, merge_record_bytes
from lora_ext.merging import layers as merging_layers
from lora_ext.quantized import quantized_weight

FORMATS = list(QUANTIZE)
pytestmark = pytest.mark.filterwarnings("ignore:.*were quantised again")


class Net(nn.Module):
    """Two layers of each kind: adapted or not, quantised or not."""

    def __init__(self) -> None:
        super().__init__()
        self.up = nn.Linear(64, 128)
        self.skip = nn.Linear(64, 128)
        self.down = nn.Linear(128, 64)
        self.head = nn.Linear(64, 8)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(self.down(torch.tanh(self.up(x) + self.skip(x))))


TARGETS = ["up", "down", "head"]


def net(format: str, dtype: torch.dtype = torch.float32, **options) -> nn.Module:
    model = quantized_copy(Net().to(dtype), format, skip=("head",))
    config = LoraConfig(**{"r": 4, "target_modules": TARGETS, "init_lora_weights": False} | options)
    inject(model, config, "a")
    return inject(model, dataclasses.replace(config, r=2, lora_alpha=3), "b").eval()


@pytest.mark.parametrize("format", FORMATS)
def test_merging_adds_the_update_and_reports_the_error(format):
    model, x = net(format), torch.randn(9, 64)
    set_adapter(model, ["a", "b"])
    want = {}
    for name in ("up", "down"):
        layer = getattr(model, name)
        update = layer.delta_weight("a") + layer.delta_weight("b")
        want[name] = quantized_weight(layer.base_layer).dequantize() + update.detach(), update.detach()
    y = model(x)
    assert merge_errors(model) == {}
    merge(model)
    errors = merge_errors(model)
    assert errors.keys() == {"up", "down", "head"}
    assert errors.pop("head").kept == pytest.approx(1.0, abs=1e-3)  # float32
    for name, error in errors.items():
        merged = quantized_weight(getattr(model, name).base_layer).dequantize()
        total, update = want[name]
        difference = merged - total
        assert error.largest == pytest.approx(difference.abs().max().item(), rel=1e-4)
        assert error.relative == pytest.approx((difference.norm() / total.norm()).item(), rel=1e-4)
        assert error.of_update == pytest.approx((difference.norm() / update.norm()).item(), rel=1e-3)
        change = merged - (total - update)
        assert error.kept == pytest.approx(((change * update).sum() / update.square().sum()).item(), rel=1e-3)
        assert error.unchanged == pytest.approx((change == 0).float().mean().item(), abs=0.01)
        assert 0 < error.relative < (0.14 if "4" in format else 0.04)
    torch.testing.assert_close(model(x), y, rtol=0, atol=(0.6 if "4" in format else 0.15) * y.abs().max().item())
    assert not torch.equal(model(x), y)


@pytest.mark.parametrize("format", FORMATS)
def test_unmerging_restores_every_byte_in_any_order(format):
    model, x = net(format), torch.randn(9, 64)
    set_adapter(model, ["a", "b"])
    expected = model(x)
    with unchanged_bytes(model):
        merge(model, "b")
        only_b = stored(model)
        merge(model, "a")
        both = stored(model)
        assert merge_record_bytes(model) > sum(tensor.numel() for tensor in both.values()) / 2
        unmerge(model, "a")
        assert all(torch.equal(tensor, only_b[name]) for name, tensor in stored(model).items())
        with torch.no_grad():
            model.up.adapters["b"].lora_A.zero_()  # an adapter counts as it was merged
        merge(model, "a")
        assert all(torch.equal(tensor, both[name]) for name, tensor in stored(model).items())
        copies = [copy.deepcopy(model)]
        if not format.startswith("torchao"):  # whose tensors cannot be pickled
            copies.append(pickle.loads(pickle.dumps(model)))
        y = model(x)
        unmerge(model)
    for other in copies:
        torch.testing.assert_close(other(x), y)
        unmerge(other)
        assert all(torch.equal(a, b) for a, b in zip(stored(other).values(), stored(model).values(), strict=True))
    with torch.no_grad():
        assert not torch.equal(model(x), expected)
    assert merge_record_bytes(model) == 0


@pytest.mark.parametrize("format", FORMATS)
def test_merge_and_unload_leaves_a_quantised_model(format):
    model, x = net(format), torch.randn(9, 64)
    other = copy.deepcopy(model)
    merge(other)
    with pytest.raises(RuntimeError, match="merged into 'up' in the state, where the update would count twice"):
        copy.deepcopy(model).load_state_dict(other.state_dict(), strict=False)
    merge_and_unload(model)
    assert type(model.up) is type(other.up.base_layer)
    assert all(torch.equal(a, b) for a, b in zip(stored(model).values(), stored(other).values(), strict=True))
    near = 1e-5 if format.startswith("torchao") else 0.02  # bitsandbytes computes in another dtype without our layer
    torch.testing.assert_close(model(x), other(x), rtol=0, atol=near * other(x).abs().max().item())


@pytest.mark.parametrize("format", ["nf4", "int8", "torchao-int8"])
def test_lora_biases_are_merged(format):
    model, x = net(format, lora_bias=True, target_modules=["up", "down"]), torch.randn(9, 64)
    with torch.no_grad():
        for layer in (model.up, model.down):
            layer.adapters["b"].lora_bias.normal_()
    bias, y = model.up.base_layer.bias.clone(), model(x)
    with unchanged_bytes(model):
        merge(model)
        assert not torch.equal(model.up.base_layer.bias, bias)
        unmerge(model)
    assert torch.equal(model.up.base_layer.bias, bias) and torch.equal(model(x), y)


# --- all or nothing ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("operation", [merge, merge_and_unload])
@pytest.mark.parametrize("format", FORMATS)
def test_an_update_that_is_not_finite_changes_nothing(format, operation):
    model = net(format)
    with torch.no_grad():
        model.down.adapters["b"].lora_B[3, 1] = torch.nan
    with (
        unchanged_bytes(model),
        pytest.raises(ValueError, match=r"of the weight of 'down' NaN or infinite: the adapter has NaN or infinite"),
    ):
        operation(model)
    assert not model.up.is_merged and not model.down.is_merged and not model.head.is_merged
    set_adapter(model, "a")
    merge(model)


@pytest.mark.pairs
@pytest.mark.parametrize("merged", [(), ("a",)], ids=str)
@pytest.mark.parametrize("failing", ["dense", "quantised"])
@pytest.mark.parametrize("format", ["nf4-double", "int8", "torchao-int8"])
def test_an_error_in_the_middle_restores_everything(format, failing, merged, monkeypatch):
    model, x = net(format), torch.randn(9, 64)
    for name in merged:
        merge(model, name)
    before, y = stored(model), model(x)
    head = model.head.weight.clone()

    def fail(*_args, **_kwargs):
        raise MemoryError("no memory")

    if failing == "dense":
        monkeypatch.setattr(merging_layers, "merge_all_", fail)
    else:
        kind = type(quantized_weight(model.down.base_layer))
        right = kind.quantize
        fails = {id(model.down.base_layer)}
        monkeypatch.setattr(
            kind, "quantize", lambda self, values: fail() if id(self.module) in fails else right(self, values)
        )
    with pytest.raises(MemoryError):
        merge(model, "b")
    assert all(torch.equal(tensor, before[name]) for name, tensor in stored(model).items())
    assert torch.equal(model.head.weight, head) and torch.equal(model(x), y)
    assert model.up.merged_adapters == model.head.merged_adapters == merged
    monkeypatch.undo()
    merge(model, "b")


def test_weights_that_cannot_be_quantised_again_are_refused_before_anything_changes():
    model = net("torchao-int8")
    weight = model.down.base_layer.weight
    scaled = Int8Tensor(
        weight.qdata, weight.scale, weight.block_size, weight.dtype, weight.zero_point, act_pre_scale=torch.ones(128)
    )
    model.down.base_layer.weight = nn.Parameter(scaled, requires_grad=False)
    for run in (merge, merge_and_unload):
        with unchanged_bytes(model), pytest.raises(ValueError, match=r"down: its input is scaled before the product"):
            run(model)

    model = net("nf4")
    model.down.base_layer = bitsandbytes.nn.Linear4bit(128, 64)
    with pytest.raises(ValueError, match=r"down: it is not quantised yet; move the model to its device first"):
        merge(model)
    assert not model.up.is_merged

    model = net("nf4")
    model.up.base_layer.register_forward_hook(lambda *_: None)
    with unchanged_bytes(model), pytest.raises(ValueError, match="up: its hooks may change what it computes"):
        merge(model)


def test_a_weight_that_was_quantised_again_while_merged_is_not_unmerged():
    model = net("nf4")
    merge(model)
    model.up.base_layer = QUANTIZE["fp4"](nn.Linear(64, 256))
    with pytest.raises(RuntimeError, match="converted or quantised in another way while merged"):
        unmerge(model)
    model.up.base_layer = nn.Linear(64, 128)
    with pytest.raises(RuntimeError, match="converted or quantised in another way while merged"):
        unmerge(model)


def test_large_errors_warn_and_small_ones_do_not():
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        merge(net("torchao-int8"))
        assert not [w for w in caught if "quantised again" in str(w.message)]
        model = net("nf4")
        with torch.no_grad():
            for layer in (model.up, model.down):
                layer.adapters["b"].lora_B.mul_(1e-3)
        merge(model)
    (warning,) = [w for w in caught if "quantised again" in str(w.message)]
    assert "load the adapter into the dequantised model" in str(warning.message) and warning.filename == __file__
    errors = merge_errors(model)
    assert errors["up"].of_update > 0.9 < errors["down"].of_update  # rounding hides so small an update
