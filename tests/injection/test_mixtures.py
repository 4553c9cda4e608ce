"""``target_modules="all-linear"`` in mixtures of experts: the parts that PEFT adapts, and a word on the others."""

from __future__ import annotations

import copy
import dataclasses
import warnings
from collections.abc import Callable
from pathlib import Path

import peft
import pytest
import torch
import transformers
from support.models import VOCABULARY, bert, llama, refused, token_ids
from support.versions import needs
from torch import Tensor, nn

from lora_ext import LoraConfig, inject, load_adapter, merge, save_adapter, unmerge
from lora_ext.adapters import lora_modules, trainable_parameter_counts

SIZES = {
    "vocab_size": VOCABULARY,
    "hidden_size": 16,
    "intermediate_size": 12,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "max_position_embeddings": 32,
    "num_experts_per_tok": 2,
    "experts_implementation": "eager",
    "eos_token_id": None,
    "pad_token_id": None,
}
LATENT = {"kv_lora_rank": 4, "q_lora_rank": 4, "qk_rope_head_dim": 4, "qk_nope_head_dim": 4, "v_head_dim": 8}
DEEPSEEK = {"n_routed_experts": 4, "n_group": 1, "topk_group": 1, "n_shared_experts": 1, "first_k_dense_replace": 1}
SETTINGS = {"r": 2, "lora_alpha": 3, "target_modules": "all-linear"}


def mixtral() -> nn.Module:
    config = transformers.MixtralConfig(**SIZES, num_local_experts=4)
    return transformers.MixtralForCausalLM(config).eval()


def qwen3() -> nn.Module:
    config = transformers.Qwen3MoeConfig(**SIZES, head_dim=8, num_experts=4, moe_intermediate_size=8)
    return transformers.Qwen3MoeForCausalLM(config).eval()


def olmoe() -> nn.Module:
    return transformers.OlmoeForCausalLM(transformers.OlmoeConfig(**SIZES, num_experts=4)).eval()


def deepseek() -> nn.Module:
    config = transformers.DeepseekV3Config(**SIZES, **LATENT, **DEEPSEEK, moe_intermediate_size=8)
    return transformers.DeepseekV3ForCausalLM(config).eval()


def gpt_oss() -> nn.Module:
    config = transformers.GptOssConfig(**SIZES, head_dim=8, num_local_experts=4, layer_types=["full_attention"] * 2)
    return transformers.GptOssForCausalLM(config).eval()


def qwen2() -> nn.Module:
    sizes = {"num_experts": 4, "moe_intermediate_size": 8, "shared_expert_intermediate_size": 8}
    return transformers.Qwen2MoeForCausalLM(transformers.Qwen2MoeConfig(**SIZES, **sizes)).eval()


BIAS = needs("transformers", "5.13", "the model asks PEFT's layer around the router for its bias, which it lacks")
MIXTURES = [mixtral, qwen3, olmoe, pytest.param(deepseek, marks=BIAS)]


@pytest.fixture(params=MIXTURES, ids=lambda make: make.__name__)
def mixture(request) -> nn.Module:
    return request.param()


def pair(model: nn.Module, **settings) -> tuple[peft.PeftModel, nn.Module]:
    """Returns the model adapted by PEFT, and by us."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        theirs = peft.get_peft_model(copy.deepcopy(model), peft.LoraConfig(**SETTINGS | settings)).eval()
        return theirs, inject(model, LoraConfig(**SETTINGS | settings))


def logits(model: nn.Module, ids: Tensor) -> Tensor:
    return model(input_ids=ids, use_cache=False).logits


def ours_from_file(model: nn.Module, directory, **options) -> nn.Module:
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # every name in the file matches
        return load_adapter(model, directory, **options)


def test_the_trained_parameters_are_pefts(mixture):
    theirs, ours = pair(mixture)
    assert trainable_parameter_counts(ours)[0] == theirs.get_nb_trainable_parameters()[0]
    kinds = {
        type(layer.module if hasattr(layer, "module") else layer.base_layer).__name__ for _, layer in lora_modules(ours)
    }
    assert any(kind.endswith("Experts") for kind in kinds), kinds
    assert any("router" in kind.lower() for kind in kinds), kinds


def test_we_load_pefts_file_and_peft_loads_ours(mixture, tmp_path):
    base = copy.deepcopy(mixture)
    theirs, ours = pair(mixture, init_lora_weights=False)
    ids = token_ids()
    theirs.save_pretrained(tmp_path / "theirs")
    loaded = ours_from_file(copy.deepcopy(base), tmp_path / "theirs")
    torch.testing.assert_close(logits(loaded, ids), logits(theirs, ids))
    assert not torch.allclose(logits(base, ids), logits(theirs, ids))

    save_adapter(ours, tmp_path / "ours")
    read = peft.PeftModel.from_pretrained(copy.deepcopy(base), tmp_path / "ours").eval()
    torch.testing.assert_close(logits(read, ids), logits(ours, ids))


def test_a_training_step_is_pefts(mixture, tmp_path):
    base = copy.deepcopy(mixture.double())
    theirs, _ = pair(mixture, init_lora_weights=False)
    theirs.save_pretrained(tmp_path)
    ours = ours_from_file(base, tmp_path, trainable=True)
    ids, losses = token_ids(), {}
    for name, model in (("theirs", theirs), ("ours", ours)):
        optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.01)
        for step in range(2):
            loss = model(input_ids=ids, labels=ids, use_cache=False).loss
            optimizer.zero_grad()
            loss.backward()
            assert all(p.grad is not None for p in model.parameters() if p.requires_grad)
            optimizer.step()
            losses[name, step] = loss.detach()
    torch.testing.assert_close(losses["ours", 0], losses["theirs", 0])
    torch.testing.assert_close(losses["ours", 1], losses["theirs", 1])
    assert losses["ours", 1] != losses["ours", 0]
    torch.testing.assert_close(logits(ours, ids), logits(theirs, ids))


def test_ranks_and_scaling_of_fused_projections_are_pefts():
    _, ours = pair(mixtral(), use_rslora=True)
    experts = {
        layer.parameter_name: layer.adapters["default"] for _, layer in lora_modules(ours) if hasattr(layer, "module")
    }
    assert experts["gate_up_proj"].r == 4 and experts["down_proj"].r == 2 and experts["weight"].r == 2
    assert experts["gate_up_proj"].scaling == pytest.approx(6 / 4**0.5)


def test_linear_layers_that_peft_leaves_out_are_named():
    """PEFT takes the names of DeepSeek's dense and shared projections for those of the experts."""
    with pytest.warns(UserWarning) as caught:
        inject(deepseek(), LoraConfig(**SETTINGS))
    (message,) = [str(warning.message) for warning in caught]
    assert "all-linear" in message and "as PEFT does" in message and "target_modules" in message
    for path in ("model.layers.*.mlp.gate_proj", "model.layers.*.mlp.shared_experts.down_proj"):
        assert path in message
    for make in (mixtral, qwen3, olmoe):
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            inject(make(), LoraConfig(**SETTINGS))


@pytest.mark.parametrize(
    ("make", "router"), [(gpt_oss, "router.weight"), (qwen2, "gate.weight")], ids=["gpt_oss", "qwen2"]
)
def test_experts_that_peft_leaves_out_are_named(make, router):
    model = make()
    theirs = peft.get_peft_model(copy.deepcopy(model), peft.LoraConfig(**SETTINGS))
    with pytest.warns(UserWarning) as caught:
        inject(model, LoraConfig(**SETTINGS))
    assert trainable_parameter_counts(model)[0] == theirs.get_nb_trainable_parameters()[0]
    (message,) = [str(warning.message) for warning in caught]
    named = ["mlp.experts.gate_up_proj", "mlp.experts.down_proj", f"mlp.{router}"]
    assert "target_parameters" in message and all(f"model.layers.*.{name}" in message for name in named)

    with warnings.catch_warnings():
        warnings.simplefilter("error")  # the option that the warning names silences it
        inject(make(), LoraConfig(**SETTINGS, target_parameters=named))


def test_excluded_experts_stay_as_they_are():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        model = inject(mixtral(), LoraConfig(**SETTINGS, exclude_modules=["experts", "o_proj"]))
    adapted = {path.rpartition(".")[2] for path, _ in lora_modules(model)}
    assert adapted == {"q_proj", "k_proj", "v_proj", "gate"}
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        model = inject(mixtral(), LoraConfig(**SETTINGS, modules_to_save=["layers.0.mlp"]))
    assert {path for path, _ in lora_modules(model) if "mlp" in path} == {
        "model.layers.1.mlp.gate",
        "model.layers.1.mlp.experts",
        "model.layers.1.mlp.experts.base_layer",
    }


@pytest.mark.parametrize(
    "setting", [{"lora_dropout": 0.1}, {"lora_bias": True}], ids=lambda setting: next(iter(setting))
)
def test_options_that_experts_cannot_have_are_refused_as_by_peft(setting):
    (key,) = setting
    with pytest.raises(ValueError, match=key):
        peft.get_peft_model(mixtral(), peft.LoraConfig(**SETTINGS, **setting))
    model = mixtral()
    with refused(
        model, ValueError, f"inject: {key} is ", '"all-linear"', f"set {key} to ", "exclude_modules=['experts', 'gate']"
    ):
        inject(model, LoraConfig(**SETTINGS, **setting))
    inject(model, LoraConfig(**SETTINGS, **setting, exclude_modules=["experts", "gate"]))


def test_a_second_adapter_takes_the_same_parts():
    model = inject(mixtral(), LoraConfig(**SETTINGS))
    count = trainable_parameter_counts(model)[0]
    inject(model, LoraConfig(**SETTINGS), "second")
    assert trainable_parameter_counts(model)[0] == count


@pytest.mark.parametrize("make", [mixtral, qwen3, bert, llama])
def test_all_linear_in_a_list_with_other_layers(make: Callable[[], nn.Module], tmp_path: Path):
    base = make().eval()
    name = "word_embeddings" if make is bert else "embed_tokens"
    config = {"r": 2, "lora_alpha": 3, "init_lora_weights": False}
    rule = inject(copy.deepcopy(base), LoraConfig(target_modules="all-linear", **config))
    model = inject(copy.deepcopy(base), LoraConfig(target_modules=["all-linear", name], **config))
    parts = {path for path, _ in lora_modules(rule)}
    more = {path for path, _ in lora_modules(model)} - parts
    assert len(more) == 1 and more.pop().endswith(name) and parts <= {path for path, _ in lora_modules(model)}

    save_adapter(model, tmp_path)  # the layers, not the rule: PEFT takes the word alone
    ids = token_ids()
    output = model(ids).logits
    theirs = peft.PeftModel.from_pretrained(copy.deepcopy(base), tmp_path)
    torch.testing.assert_close(theirs(ids).logits, output, rtol=1e-4, atol=1e-5)
    again = load_adapter(copy.deepcopy(base), tmp_path)
    torch.testing.assert_close(again(ids).logits, output)


def test_a_list_with_all_linear_leaves_out_what_is_excluded_or_trained_in_full():
    config = LoraConfig(r=2, target_modules=["all-linear", "embed_tokens"], exclude_modules=["o_proj"])
    model = inject(llama(), dataclasses.replace(config, modules_to_save=["down_proj"]))
    names = {path.rpartition(".")[2] for path, _ in lora_modules(model)}
    assert names == {"q_proj", "k_proj", "v_proj", "gate_proj", "up_proj", "embed_tokens"}


def llama4() -> nn.Module:
    sizes = {"num_local_experts": 4, "head_dim": 8, "intermediate_size_mlp": 12, "interleave_moe_layer_step": 1}
    return transformers.Llama4ForCausalLM(transformers.Llama4TextConfig(**SIZES | {"num_experts_per_tok": 1}, **sizes))


def phimoe() -> nn.Module:
    return transformers.PhimoeForCausalLM(transformers.PhimoeConfig(**SIZES, num_local_experts=4))


@pytest.mark.parametrize("make", [llama4, phimoe])
def test_routers_that_return_more_than_a_tensor_are_left_out(make):
    """PEFT adapts them, and fails in the forward: a router is an nn.Linear by its class."""
    base = make().eval()
    with pytest.raises(AttributeError, match="tuple"):
        peft.get_peft_model(copy.deepcopy(base), peft.LoraConfig(target_modules="all-linear"))(token_ids())
    with pytest.warns(UserWarning, match=r"leaves out \['model.layers.\*.*router'\].*router.weight.*target_parameters"):
        model = inject(copy.deepcopy(base), LoraConfig(**SETTINGS, init_lora_weights=False))
    adapted = {path for path, _ in lora_modules(model)}
    assert len(adapted) >= 8 and not [path for path in adapted if path.endswith("router")]
    ids = token_ids()
    output = model(ids).logits
    assert not torch.allclose(output, base(ids).logits)
    output.square().sum().backward()
    assert all(p.grad is not None for p in model.parameters() if p.requires_grad)
    torch.testing.assert_close(merge(model)(ids).logits, output, rtol=1e-4, atol=1e-5)
    unmerge(model)

    config = LoraConfig(r=2, target_modules=["q_proj"], target_parameters=["router.weight"], init_lora_weights=False)
    model = inject(copy.deepcopy(base), config)  # as the warning says
    assert not torch.allclose(model(ids).logits, inject(base, LoraConfig(r=2, target_modules=["q_proj"]))(ids).logits)
