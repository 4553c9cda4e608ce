"""PEFT's layers over quantised weights on our ops: merges from float32, unmerges to the byte."""

import copy
import warnings

import peft
import pytest
import torch
from support.peft_pairs import config, gradients, spread_magnitudes
from support.quantized import QUANTIZE, quantized_copy, stored, unchanged_bytes
from support.versions import needs
from torch import nn

from lora_ext.integrations.peft import accelerate, report, restore
from lora_ext.quantized import quantized_weight

pytestmark = pytest.mark.filterwarnings(
    "ignore:Merge lora module", "ignore:Unmerge lora module", "ignore:.*instantiated"
)
FLAGS = {"int8": "is_loaded_in_8bit"}


def models(format: str, **options) -> tuple[nn.Module, nn.Module]:
    """PEFT's model, and an accelerated copy; in evaluation mode."""
    model = quantized_copy(nn.Sequential(nn.Linear(64, 128), nn.Tanh(), nn.Linear(128, 64)), format)
    model.requires_grad_(False)
    if not format.startswith("torchao"):
        setattr(model, FLAGS.get(format, "is_loaded_in_4bit"), True)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # PEFT's torchao layers cannot merge without Transformers' config
        theirs = peft.get_peft_model(model, config(target_modules=["0", "2"], **options)).eval()
    spread_magnitudes(theirs)
    return theirs, accelerate(copy.deepcopy(theirs))


DORA = [{"use_dora": True, "lora_alpha": 10, "lora_dropout": p} for p in (0.0, 0.3)]
TORCHAO = needs("peft", "0.21", "PEFT adapts no weights of torchao 0.18")
FORMATS = [pytest.param(format, marks=[TORCHAO] * format.startswith("torchao")) for format in QUANTIZE]
CASES = [pytest.param(*format.values, {}, marks=format.marks) for format in FORMATS]
CASES += [
    pytest.param(*format.values, options, marks=format.marks)
    for format in FORMATS
    if format.values[0] in ("nf4", "int8", "torchao-int8")
    for options in DORA
]


@pytest.mark.parametrize(("format", "options"), CASES, ids=str)
def test_forward_and_gradients(format, options):
    theirs, ours = models(format, **options)
    assert all(layer.accelerated and not layer.merge for layer in report(ours))
    x, results = torch.randn(5, 64), []
    for model in (theirs.train(), ours.train()):
        torch.manual_seed(3)  # DoRA's masks are PEFT's
        leaf = x.clone().requires_grad_()
        results.append(gradients(model, lambda model, leaf=leaf: model(leaf)) | {"x": leaf.grad})
    assert results[0].keys() == results[1].keys() and len(results[0]) == (8 if options else 6)
    # bitsandbytes' int8 product rounds its input; with DoRA's dropout PEFT multiplies by the dequantised weight.
    tolerance = 0.02 if format == "int8" and options.get("lora_dropout") else 1e-4
    for name, tensor in results[0].items():
        assert (results[1][name] - tensor).norm() <= tolerance * tensor.norm(), name
    with unchanged_bytes(ours):
        before = stored(ours)
        ours.merge_adapter()
        assert any(not torch.equal(tensor, before[key]) for key, tensor in stored(ours).items())
        ours.unmerge_adapter()


@pytest.mark.parametrize("format", FORMATS)
def test_merging(format):
    theirs, ours = models(format)
    layers = [ours.base_model.model[i] for i in (0, 2)]
    weights = [quantized_weight(layer.get_base_layer()) for layer in layers]
    want = [w.dequantize() + layer.get_delta_weight("default") for w, layer in zip(weights, layers, strict=True)]
    x = torch.randn(5, 64)
    y = ours(x)
    with unchanged_bytes(ours):
        ours.merge_adapter()
        errors = [(w.dequantize() - values).norm() for w, values in zip(weights, want, strict=True)]
        assert max(e / v.norm() for e, v in zip(errors, want, strict=True)) < (0.14 if "4" in format else 0.04)
        if not format.startswith("torchao"):
            theirs.merge_adapter()
            peers = [quantized_weight(theirs.base_model.model[i].get_base_layer()) for i in (0, 2)]
            for error, peer, values in zip(errors, peers, want, strict=True):
                assert error <= (peer.dequantize() - values).norm() * (1 + 1e-3)
        assert not torch.equal(ours(x), y)
        merged = stored(ours)
        ours.unmerge_adapter()
    assert torch.equal(ours(x), y)
    plain = stored(ours.merge_and_unload())
    assert all(map(torch.equal, plain.values(), merged.values()))


def test_bias_and_weight_are_merged_together_or_not_at_all(monkeypatch):
    from lora_ext.integrations.peft import merging

    _, ours = models("nf4", lora_bias=True)
    layer = ours.base_model.model[0]
    with torch.no_grad():
        layer.lora_B["default"].bias.normal_()
    bias = layer.get_base_layer().bias.clone()
    with unchanged_bytes(ours):
        ours.merge_adapter()
        assert not torch.equal(layer.get_base_layer().bias, bias)
        ours.unmerge_adapter()
        assert torch.equal(layer.get_base_layer().bias, bias)

        def fail(*_args, **_kwargs):
            raise MemoryError

        monkeypatch.setattr(merging, "merge_all_", fail)
        with pytest.raises(MemoryError):
            layer.merge()
    assert not layer.merged_adapters


def test_evaluation_between_training_steps():
    """Without accelerate, bitsandbytes packs the weights for the CPU's bfloat16 product, and training ends."""
    _, ours = models("nf4")
    x = torch.randn(5, 64)
    with unchanged_bytes(ours):
        with torch.no_grad():
            ours(x)
        ours.train()(x).sum().backward()
    repacks = restore(ours).base_model.model[0].get_base_layer().support_avx512bf16_for_cpu
    assert repacks == models("nf4")[0].base_model.model[0].get_base_layer().support_avx512bf16_for_cpu
