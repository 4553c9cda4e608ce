"""accelerate(), restore() and report(): accepted and refused models, and the reasons for every kind of layer."""

import copy

import peft
import pytest
import torch
from contracts.kinds import Accelerated, input_of, of_kinds
from peft.tuners.tuners_utils import BaseTuner
from support.models import llama, logits, token_ids
from support.peft_pairs import TARGETS, config, pair
from torch import nn

from lora_ext.integrations.peft import LayerReport, accelerate, report, restore
from lora_ext.integrations.peft import layers as ours_layers


@pytest.fixture
def accelerated_from_now_on():
    inject_adapter = BaseTuner.inject_adapter
    accelerate()
    yield
    restore()
    assert BaseTuner.inject_adapter is inject_adapter


def adapted(**options) -> peft.PeftModel:
    return peft.get_peft_model(llama(), config(target_modules=TARGETS["llama"], **options))


def one_layer(**options) -> nn.Module:
    return accelerate(peft.get_peft_model(nn.Sequential(nn.Linear(6, 10)), config(target_modules=["0"], **options)))


def layer_of(model: nn.Module) -> nn.Module:
    return model.base_model.model[0]


# --- accelerate and restore -------------------------------------------------------------------------------------------


def test_injected_layers_are_accelerated_too():
    model = peft.inject_adapter_in_model(config(target_modules=["0"]), nn.Sequential(nn.Linear(6, 10)))
    assert type(accelerate(model)[0]) is ours_layers.Linear
    assert accelerate(model[0]) is model[0]


@of_kinds(Accelerated)
def test_restore_returns_pefts_model(kind):
    theirs, ours = pair(nn.Sequential(kind.make()), config(**kind.options))
    assert repr(ours) == repr(theirs) and list(ours.state_dict()) == list(theirs.state_dict())
    x = input_of(kind, torch.float32)
    ours(x)
    assert restore(ours) is ours and restore(ours) is ours
    for one, other in zip(theirs.modules(), ours.modules(), strict=True):
        assert type(one) is type(other) and vars(one).keys() == vars(other).keys()
    assert torch.equal(ours(x), theirs(x))


def _lora_layers(model):
    return [(path, module) for path, module in model.named_modules() if isinstance(module, peft.tuners.lora.LoraLayer)]


def test_models_created_afterwards(accelerated_from_now_on):
    accelerate()  # a second call changes nothing
    model = adapted()
    assert all(layer.accelerated for layer in report(model)) and len(report(model)) == 6
    model.add_adapter("more", config(target_modules=["up_proj"]))
    model.set_adapter("more")
    kinds = {layer.path.rsplit(".")[-1]: layer.accelerated for layer in report(model)}
    assert kinds == {"q_proj": False, "v_proj": False, "down_proj": False, "up_proj": True}
    injected = peft.inject_adapter_in_model(config(target_modules=["0"]), nn.Sequential(nn.Conv2d(3, 4, 1)))
    assert type(injected[0]) is ours_layers.Conv2d
    for share_inputs in (True, False):
        accelerate(share_inputs=share_inputs)
        model_of_groups = peft.get_peft_model(llama(), config(target_modules=["q_proj", "k_proj"]))
        logits(model_of_groups, token_ids())
        assert bool(report(model_of_groups).groups.together) == share_inputs
    restore()
    assert not any(layer.accelerated for layer in report(adapted()))
    restore()
    assert all(
        type(layer).__module__.startswith("lora_ext") for _, layer in _lora_layers(model)
    )  # until it is restored


def test_other_methods_that_derive_from_lora_do_not_change(accelerated_from_now_on):
    options = {"target_modules": ["0"], "total_step": 10}
    model = peft.get_peft_model(nn.Sequential(nn.Linear(6, 10)), peft.AdaLoraConfig(**options))
    (layer,) = report(model)
    assert "lora_ext has no counterpart of peft.tuners.adalora.layer.SVDLinear" in layer.forward
    model(torch.randn(2, 6)).sum().backward()


# --- reasons ----------------------------------------------------------------------------------------------------------


def test_a_layer_on_the_ops():
    assert report(one_layer()).layers == (LayerReport("base_model.model.0", "Linear", "", ""),)


def other_factor(model, layer):
    torch.manual_seed(0)
    layer.lora_B["default"] = nn.utils.parametrizations.weight_norm(nn.Linear(4, 10, bias=False))


CHANGES = {
    "now: the adapters are disabled, so only": lambda model, layer: model.base_model.disable_adapter_layers(),
    "now: adapters are merged, so only the base": lambda model, layer: model.merge_adapter(),
    "now: the layer has none of the active adap": lambda model, layer: layer.set_adapter([]),
    "now: PEFT is told not to cast inputs (": lambda model, layer: setattr(layer, "cast_input_dtype_enabled", False),
    "lora_A of adapter 'default' has hooks or a replaced forward": lambda model, layer: (
        layer.lora_A.default.register_forward_hook(lambda *_: None)
    ),
    "lora_B of adapter 'default' is a ParametrizedLinear, not an nn.Linear": other_factor,
    "the layer's forward was replaced on the instance": lambda model, layer: setattr(
        layer, "forward", layer.base_layer.forward
    ),
    "lora_A and lora_B of adapter 'default' are torch.float64 and": lambda model, layer: layer.lora_A.default.double(),
    "the scaling of adapter 'default' is nan": lambda model, layer: layer.scaling.update(default=float("nan")),
    "the dropout of adapter 'default' is Dropout(p=1.0": lambda model, layer: layer.lora_dropout.update(
        {"default": nn.Dropout(1.0)}
    ),
    "accelerate() was not called since PEFT made the layer": lambda model, layer: restore(model),
}


@pytest.mark.parametrize("reason", CHANGES)
def test_reasons_of_linear_layers(reason):
    model = one_layer()
    theirs = restore(copy.deepcopy(model))
    for one in (model, theirs):
        CHANGES[reason](one, layer_of(one))
    (layer,) = report(model)
    assert not layer.accelerated and layer.forward.startswith(reason)
    assert f"1 in PEFT's code: {reason}" in str(report(model))
    x = torch.randn(2, 6)
    try:
        expected = theirs(x)
    except RuntimeError as error:
        with pytest.raises(RuntimeError, match=str(error)):
            model(x)
    else:
        torch.testing.assert_close(model(x), expected, equal_nan=True)


def test_variants():
    (layer,) = report(one_layer(use_bdlora=peft.BdLoraConfig(target_modules_bd_a=["0"], nblocks=2)))
    assert (
        layer.forward == layer.merge and layer.merge == "adapter 'default' is a variant of LoRA (BdLoraLinearVariant)"
    )
    (layer,) = report(one_layer(use_dora=True))
    assert not layer.forward and not layer.merge


def test_kinds_without_a_counterpart():
    attention = nn.Sequential(nn.MultiheadAttention(8, 2))
    model = accelerate(peft.get_peft_model(attention, config(target_modules=["0"])))
    outer, inner = report(model)
    assert outer.kind == "MultiheadAttention" and "merges before and unmerges after each forward" in outer.forward
    assert inner.kind == "Linear" and "reads the weight and does not call the layer" in inner.forward
    parameters = peft.get_peft_model(nn.Sequential(nn.Linear(6, 10)), config(target_parameters=["0.weight"]))
    (layer,) = report(accelerate(parameters))
    assert layer.kind == "ParamWrapper" and layer.forward == "" and "(target_parameters)" in layer.merge


def test_scaled_embeddings():
    class Scaled(nn.Embedding):
        embed_scale = torch.tensor(3.0)

        def forward(self, ids):
            return super().forward(ids) * self.embed_scale

    theirs, ours = pair(nn.Sequential(Scaled(9, 6)), config(target_modules=["0"]))
    assert [layer.forward for layer in report(ours)] == ["a Scaled scales what it looks up"]
    ids = torch.arange(9)
    assert torch.equal(ours(ids), theirs(ids))


def test_a_long_report_names_the_first_layers_of_each_reason():
    text = str(report(adapted()))
    assert text.startswith("forward and backward: 0 of 6 LoRA layers on lora_ext's ops\n")
    assert str(report(llama())) == "no PEFT LoRA layers"
    assert text.count("q_proj (Linear)") == 4 and text.count("    and 2 more") == 2
    assert "\nmerge and unmerge: 0 of 6 LoRA layers" in text and "with adapter_names" in text
