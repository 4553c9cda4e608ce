"""``target_modules="all-linear"`` in mixtures of experts: the parts that PEFT adapts, and a word on the others."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable

import peft
import pytest
import torch
from support.mixtures import ROUTERS_RETURN_TUPLES, mixture
from support.models import llama, refused, token_ids
from torch import Tensor, nn

from lora_ext import LoraConfig, inject, load_adapter, merge, save_adapter
from lora_ext.adapters import lora_modules, trainable_parameter_counts

SETTINGS = {"r": 2, "lora_alpha": 3, "target_modules": "all-linear"}


def quietly(call: Callable[..., nn.Module], *args, **options) -> nn.Module:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        return call(*args, **options)


def logits(model: nn.Module, ids: Tensor) -> Tensor:
    return model(input_ids=ids, use_cache=False).logits


@pytest.mark.parametrize(
    ("family", "key", "named"),
    [
        # PEFT takes the names of DeepSeek's dense and shared projections for those of the experts.
        ("deepseek_v3", "target_modules", ["mlp.gate_proj", "mlp.shared_experts.down_proj"]),
        ("gpt_oss", "target_parameters", ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"]),
        ("qwen2", "target_parameters", ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"]),
    ],
)
def test_parts_that_peft_leaves_out_are_named(family, key, named, tmp_path):
    dense = {"first_k_dense_replace": 1} if family == "deepseek_v3" else {}
    model = mixture(family, **dense)
    theirs = peft.get_peft_model(copy.deepcopy(model), peft.LoraConfig(**SETTINGS))
    with pytest.warns(
        UserWarning, match="all-linear.* leaves out .*; name them in target_modules or target_p"
    ) as caught:
        inject(model, LoraConfig(**SETTINGS))
    assert len(caught) == 1 and all(f"model.layers.*.{name}" in str(caught[0].message) for name in named)
    assert trainable_parameter_counts(model)[0] == theirs.get_nb_trainable_parameters()[0]
    if key == "target_parameters":  # the option that the warning names silences it
        model = quietly(inject, mixture(family), LoraConfig(**SETTINGS, target_parameters=named))
        save_adapter(model, tmp_path)
        quietly(load_adapter, mixture(family), tmp_path)


def test_excluded_layers_stay_as_they_are_and_a_second_adapter_takes_the_same_parts():
    options = {"target_modules": "all-linear", "modules_to_save": ["down_proj"], "r": 2}
    model = inject(llama(), LoraConfig(**options, exclude_modules=["o_proj"]))
    names = {path.rpartition(".")[2] for path, _ in lora_modules(model)}
    assert names == {"q_proj", "k_proj", "v_proj", "gate_proj", "up_proj"}
    model = quietly(inject, mixture("mixtral"), LoraConfig(**SETTINGS, exclude_modules=["experts", "o_proj"]))
    adapted = {path.rpartition(".")[2] for path, _ in lora_modules(model)}
    assert adapted == {"q_proj", "k_proj", "v_proj", "gate"}
    model = quietly(inject, mixture("mixtral"), LoraConfig(**SETTINGS, modules_to_save=["layers.0.mlp"]))
    assert {path for path, _ in lora_modules(model) if "mlp" in path} == {
        "model.layers.1.mlp.gate",
        "model.layers.1.mlp.experts",
        "model.layers.1.mlp.experts.base_layer",
    }
    count = trainable_parameter_counts(model)[0]
    inject(model, LoraConfig(**SETTINGS, modules_to_save=["layers.0.mlp"]), "second")
    assert trainable_parameter_counts(model)[0] == count


@pytest.mark.parametrize("setting", [{"lora_dropout": 0.1}, {"lora_bias": True}], ids=str)
def test_options_that_experts_cannot_have_are_refused_as_by_peft(setting):
    (key,) = setting
    with pytest.raises(ValueError, match=key):
        peft.get_peft_model(mixture("mixtral"), peft.LoraConfig(**SETTINGS, **setting))
    model = mixture("mixtral")
    with refused(
        model, ValueError, f"inject: {key} is ", f"leave {key} at its default", "exclude_modules=['experts', 'gate']"
    ):
        inject(model, LoraConfig(**SETTINGS, **setting))
    inject(model, LoraConfig(**SETTINGS, **setting, exclude_modules=["experts", "gate"]))


@pytest.mark.parametrize("family", ROUTERS_RETURN_TUPLES)
def test_routers_that_return_more_than_a_tensor_are_left_out(family):
    """PEFT adapts them, and fails in the forward: a router is an nn.Linear by its class."""
    base, ids = mixture(family), token_ids()
    with pytest.raises(AttributeError, match="tuple"):
        peft.get_peft_model(copy.deepcopy(base), peft.LoraConfig(target_modules="all-linear"))(ids)
    with pytest.warns(UserWarning, match=r"leaves out .*model.layers.\*.*router.weight"):
        model = inject(copy.deepcopy(base), LoraConfig(**SETTINGS, init_lora_weights=False))
    adapted = {path for path, _ in lora_modules(model)}
    assert len(adapted) >= 8 and not [path for path in adapted if path.endswith("router")]
    output = model(ids).logits
    output.square().sum().backward()
    assert all(p.grad is not None for p in model.parameters() if p.requires_grad)
    torch.testing.assert_close(merge(model)(ids).logits, output, rtol=1e-4, atol=1e-5)

    config = LoraConfig(r=2, target_modules=["q_proj"], target_parameters=["router.weight"], init_lora_weights=False)
    model = inject(copy.deepcopy(base), config)  # as the warning says
    assert not torch.allclose(model(ids).logits, inject(base, LoraConfig(r=2, target_modules=["q_proj"]))(ids).logits)
