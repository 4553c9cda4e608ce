"""PEFT's DoRA adapters on our ops: PEFT's outputs and gradients, and no tensor of the weight's size."""

import copy
import warnings

import peft
import pytest
import torch
from support.peft_pairs import assert_same_step, config, gradients, model_pair, pair, set_active
from support.quantized import quantized_copy, stored
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from lora_ext.integrations.peft import accelerate, report


def dora(**options) -> peft.LoraConfig:
    return config(use_dora=True, **{"target_modules": ["0"], "lora_alpha": 10} | options)


def spread_magnitudes(*models: nn.Module) -> None:
    """Makes the magnitudes differ from the norms, so that each feature has a factor of its own."""
    for model in models:
        for name, parameter in model.named_parameters():
            if "magnitude" in name:
                with torch.no_grad():
                    parameter *= torch.linspace(0.4, 2.0, len(parameter))


def layers(dtype: torch.dtype = torch.float32, bias: bool = True, **options) -> tuple[nn.Module, nn.Module]:
    theirs, ours = pair(nn.Sequential(nn.Linear(24, 40, bias=bias)).to(dtype), dora(**options))
    spread_magnitudes(theirs, ours)
    return theirs, ours


@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("options", [{}, {"bias": False}, {"lora_dropout": 0.3}, {"lora_dropout": 0.3, "bias": False}])
def test_outputs_and_gradients(options, training):
    theirs, ours = layers(**options)
    x = torch.randn(2, 7, 24)

    def output(model):
        torch.manual_seed(3)  # PEFT's masks are ours
        return model.train(training)(x)

    assert_same_step(theirs, ours, output)


@pytest.mark.parametrize("shape", [(24,), (1, 24), (0, 24), (2, 3, 4, 24)])
def test_gradient_of_the_input(shape):
    results = []
    for model in layers():
        leaf = torch.linspace(-1, 1, torch.Size(shape).numel()).view(shape).requires_grad_()
        model(leaf).square().sum().backward()
        results.append(leaf.grad)
    torch.testing.assert_close(results[1], results[0], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("dropout", [0.0, 0.3])
def test_16_bits(dtype, dropout):
    """Compares with float32 on the same values; the norm of all roundings is below one rounding of every element."""
    theirs, ours = layers(dtype, lora_dropout=dropout)
    assert next(p for n, p in ours.named_parameters() if "magnitude" in n).dtype is torch.float32
    exact, x = copy.deepcopy(theirs).float(), torch.randn(50, 24).to(dtype)
    results = {}
    for name, model, given in (("exact", exact, x.float()), ("ours", ours, x)):
        torch.manual_seed(3)
        results[name] = gradients(model.train(), lambda model, given=given: model(given))
    assert results["ours"]["output"].dtype is dtype
    for name, expected in results["exact"].items():
        error = results["ours"][name].float() - expected
        assert error.norm() <= torch.finfo(dtype).eps / 2 * expected.norm(), name


@pytest.mark.parametrize("name", ["llama", "gpt2", "bert"])
def test_models_and_autocast(name):
    theirs, ours = model_pair(name, use_dora=True)
    spread_magnitudes(theirs, ours)
    ids = torch.arange(12).view(2, 6)
    assert all(layer.accelerated for layer in report(ours))
    if name == "llama":
        for model in (theirs, ours):
            model.train().gradient_checkpointing_enable({"use_reentrant": False})
    assert_same_step(theirs, ours, lambda model: model(input_ids=ids)[0])

    def output(model):
        with torch.autocast("cpu", torch.bfloat16):
            return model(input_ids=ids)[0]

    expected, actual = gradients(theirs, output), gradients(ours, output)
    for key, tensor in expected.items():
        assert (actual[key] - tensor).norm() <= 0.05 * tensor.norm(), key


@pytest.mark.parametrize("format", ["nf4", "int8", "torchao-int8"])
@pytest.mark.parametrize("dropout", [0.0, 0.3])
def test_quantised_weights(format, dropout):
    model = quantized_copy(nn.Sequential(nn.Linear(64, 128)), format).requires_grad_(False)
    model.is_loaded_in_8bit, model.is_loaded_in_4bit = format == "int8", format == "nf4"
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # PEFT's torchao layers cannot merge without Transformers' config
        theirs = peft.get_peft_model(model, dora(lora_dropout=dropout))
    ours = accelerate(copy.deepcopy(theirs))
    spread_magnitudes(theirs, ours)
    (layer,) = report(ours)
    assert layer.accelerated and not layer.merge
    before = stored(ours)
    ours.merge_adapter()
    assert any(not torch.equal(tensor, before[key]) for key, tensor in stored(ours).items())
    ours.unmerge_adapter()
    assert all(torch.equal(tensor, before[key]) for key, tensor in stored(ours).items())
    x = torch.randn(5, 64)
    results = {}
    for name, model in (("theirs", theirs), ("ours", ours)):
        torch.manual_seed(3)
        leaf = x.clone().requires_grad_()
        results[name] = gradients(model.train(), lambda model, leaf=leaf: model(leaf)) | {"x": leaf.grad}
    # bitsandbytes' int8 product rounds its input; with dropout PEFT multiplies by the dequantised weight in its place.
    tolerance = 0.02 if format == "int8" and dropout else 1e-4
    for name, tensor in results["theirs"].items():
        assert (results["ours"][name] - tensor).norm() <= tolerance * tensor.norm(), name


def test_a_row_of_zeros_stays_zero():
    """PEFT divides by its norm and returns NaN."""
    model = nn.Sequential(nn.Linear(24, 40))
    with torch.no_grad():
        model[0].weight[3] = 0.0
    theirs, ours = pair(model, dora(init_lora_weights=True))
    x = torch.randn(5, 24)
    assert theirs(x)[:, 3].isnan().all()
    y = ours(x)
    torch.testing.assert_close(y[:, 3], model[0].bias[3].expand(5))
    y.square().sum().backward()
    assert all(p.grad.isfinite().all() for p in ours.parameters() if p.requires_grad)


def test_adapters_next_to_it():
    theirs, ours = pair(nn.Sequential(nn.Linear(24, 40)), dora(), config(target_modules=["0"]), dora(r=2))
    spread_magnitudes(theirs, ours)
    x = torch.randn(5, 24)
    for names, reason in (
        (["2"], ""),
        (["1"], ""),
        (["default", "1"], "now: adapter 'default' is DoRA, and is one of 2 active adapters"),
        (["default"], ""),
    ):
        set_active((theirs, ours), *names)
        (layer,) = report(ours)
        assert layer.forward == reason
        torch.testing.assert_close(ours(x), theirs(x))
    with theirs.disable_adapter(), ours.disable_adapter():
        torch.testing.assert_close(ours(x), theirs(x))
    for model in (theirs, ours):
        model.merge_adapter()
    torch.testing.assert_close(ours(x), theirs(x))
    for model in (theirs, ours):
        model.unmerge_adapter()
    torch.testing.assert_close(ours(x), theirs(x))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_merging_equals_pefts_and_unmerging_restores_every_bit(name, dtype):
    theirs, ours = model_pair(name, dtype, use_dora=True)
    spread_magnitudes(theirs, ours)
    before = {key: tensor.clone() for key, tensor in ours.state_dict().items()}
    ids = torch.arange(12).view(2, 6)
    y = ours(input_ids=ids)[0]
    assert not any(layer.merge for layer in report(ours))
    for model in (theirs, ours):
        model.merge_adapter()
    eps = torch.finfo(dtype).eps
    for key, tensor in theirs.state_dict().items():
        torch.testing.assert_close(ours.state_dict()[key], tensor, rtol=4 * eps, atol=eps)
    assert (ours(input_ids=ids)[0] - y).float().norm() <= 8 * eps * y.float().norm()
    ours.unmerge_adapter()
    assert all(torch.equal(tensor, before[key]) for key, tensor in ours.state_dict().items())
    assert torch.equal(ours(input_ids=ids)[0], y)
    merged = ours.merge_and_unload()
    assert (merged(input_ids=ids)[0] - y).float().norm() <= 8 * eps * y.float().norm()


def test_a_merged_weight_that_was_changed():
    """PEFT unmerges the present weight, which needs the norms at the merge."""
    theirs, ours = layers()
    for model in (theirs, ours):
        model.merge_adapter()
        with torch.no_grad():
            model.base_model.model[0].base_layer.weight += 1.0
    theirs.unmerge_adapter()
    with pytest.warns(UserWarning, match="has been replaced or changed since"):
        ours.unmerge_adapter()
    torch.testing.assert_close(ours.state_dict(), theirs.state_dict())


@pytest.mark.parametrize("change", ["hook", "float magnitude"])
def test_what_peft_computes(change):
    theirs, ours = layers()
    for model in (theirs, ours):
        layer = model.base_model.model[0]
        if change == "hook":
            layer.base_layer.register_forward_hook(lambda _module, _args, y: y * 2)
        else:
            holder = layer.lora_magnitude_vector["default"]
            holder.weight = nn.Parameter(holder.weight.detach()[:])
            holder.register_forward_hook(lambda _module, _args, y: y * 2)
    x = torch.randn(5, 24)
    torch.testing.assert_close(ours(x), theirs(x))


def test_no_tensor_of_the_weights_size_is_made():
    class LargestResult(TorchDispatchMode):
        numel = 0

        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            result = func(*args, **(kwargs or {}))
            for tensor in result if isinstance(result, (tuple, list)) else (result,):
                if isinstance(tensor, torch.Tensor) and not func.is_view:
                    self.numel = max(self.numel, tensor.numel())
            return result

    theirs, ours = pair(nn.Sequential(nn.Linear(512, 640)), dora())
    largest = {}
    for name, model in (("theirs", theirs), ("ours", ours)):
        with LargestResult() as seen:
            model(torch.randn(3, 512)).sum().backward()
        largest[name] = seen.numel
    assert largest["theirs"] >= 512 * 640 and largest["ours"] <= 640 * 4 * 4


def test_compiled_without_breaks_and_under_transforms():
    theirs, ours = layers(lora_dropout=0.3)
    x = torch.randn(5, 24)
    torch._dynamo.reset()
    compiled = torch.compile(ours, fullgraph=True)
    torch.testing.assert_close(torch.func.jacrev(ours)(x), torch.func.jacrev(theirs)(x))
    expected, actual = (gradients(model, lambda model: model(x)) for model in (theirs, compiled))
    for key, tensor in expected.items():
        torch.testing.assert_close(actual[f"_orig_mod.{key}" if key != "output" else key], tensor, rtol=1e-4, atol=1e-4)
