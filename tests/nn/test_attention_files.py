"""Files and combinations of adapters of an attention, against PEFT."""

from __future__ import annotations

import copy
import warnings

import peft
import pytest
import torch
from safetensors.torch import load_file
from support.attention import ALIVE, E, L, N, Wrapper, adapted, assert_same, encoder, inputs, merged_copy
from support.models import refused

from lora_ext import load_adapter, save_adapter, set_adapter
from lora_ext.adapters import add_weighted_adapter, disable_adapters
from lora_ext.adapters.hotswap import hotswap_adapter


@pytest.mark.parametrize("targets", [["self_attn"], ["self_attn", "linear1"]])
def test_files_both_ways_with_peft(targets, tmp_path):
    base = encoder().eval()
    x = torch.randn(N, L, E, dtype=torch.float64)
    ours = adapted(copy.deepcopy(base), targets, rank_pattern={"layers.1.self_attn": 4})
    save_adapter(ours, tmp_path / "ours")
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message=".*(missing|unexpected|adapter|key).*")
        theirs = peft.PeftModel.from_pretrained(copy.deepcopy(base), tmp_path / "ours").train()
    torch.testing.assert_close(theirs(x), ours(x))  # though PEFT adds the update of out_proj twice

    theirs.save_pretrained(tmp_path / "theirs")
    files = [load_file(tmp_path / name / "adapter_model.safetensors") for name in ("ours", "theirs")]
    assert files[0].keys() == files[1].keys()
    assert "base_model.model.layers.0.self_attn.base_layer.out_proj.lora_A.weight" in files[0]
    again = load_adapter(copy.deepcopy(base), tmp_path / "theirs")
    torch.testing.assert_close(again(x), ours(x))
    other = adapted(copy.deepcopy(base), targets, rank_pattern={"layers.1.self_attn": 4})
    torch.testing.assert_close(hotswap_adapter(other, tmp_path / "theirs")(x), ours(x))
    assert torch.equal(
        again.layers[0].self_attn.base_layer.out_proj.adapters.default.lora_B,
        ours.layers[0].self_attn.base_layer.out_proj.adapters.default.lora_B,
    )


@pytest.mark.parametrize("targets", [["out_proj"], "all-linear"])
def test_files_of_out_proj_alone_have_pefts_keys(targets, tmp_path):
    """PEFT never calls such an adapter, but saves it under these keys."""
    base = encoder().eval()
    theirs = peft.get_peft_model(copy.deepcopy(base), peft.LoraConfig(target_modules=targets, **ALIVE))
    theirs.save_pretrained(tmp_path / "theirs")
    ours = load_adapter(copy.deepcopy(base), tmp_path / "theirs")
    save_adapter(ours, tmp_path / "ours")
    files = [load_file(tmp_path / name / "adapter_model.safetensors") for name in ("ours", "theirs")]
    torch.testing.assert_close(*files, rtol=0, atol=0)
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message=".*(missing|unexpected|adapter|key).*")
        peft.PeftModel.from_pretrained(copy.deepcopy(base), tmp_path / "ours")


@pytest.mark.parametrize("targets", [["self_attn"], ["linear1"]])
@pytest.mark.parametrize("bias", ["all", "lora_only"])
def test_trained_biases_are_pefts(bias, targets, tmp_path):
    base, x = encoder().train(), torch.randn(N, L, E, dtype=torch.float64)
    theirs = peft.get_peft_model(copy.deepcopy(base), peft.LoraConfig(target_modules=targets, bias=bias, **ALIVE))
    ours = adapted(copy.deepcopy(base), targets, bias=bias)
    trained = [
        {n.rpartition("layers.")[2].replace("base_layer.", "") for n, p in model.named_parameters() if p.requires_grad}
        for model in (ours, theirs)
    ]
    biases = [{name for name in names if "bias" in name} for names in trained]
    assert biases[0] == biases[1] != set()  # without in_proj_bias, which has another name
    theirs.save_pretrained(tmp_path / "theirs")
    again = load_adapter(copy.deepcopy(base), tmp_path / "theirs", trainable=True)
    again(x).sum().backward()
    with torch.no_grad():
        for name, parameter in again.named_parameters():
            if parameter.requires_grad and "bias" in name:
                assert parameter.grad.abs().max() > 0, name
                parameter.sub_(parameter.grad)
    save_adapter(again, tmp_path / "ours")
    files = [load_file(tmp_path / name / "adapter_model.safetensors") for name in ("ours", "theirs")]
    assert files[0].keys() == files[1].keys()
    with disable_adapters(again):
        torch.testing.assert_close(again(x), base(x))


@pytest.mark.parametrize("settings", [{}, {"kdim": 7, "vdim": 5}])
def test_files_do_not_depend_on_other_adapters(settings, tmp_path):
    base = Wrapper(**settings)
    model = adapted(copy.deepcopy(base), name="first")
    adapted(model, ["out_proj"], name="second")
    tensors = inputs("all" if settings else "self", False, True, *(settings.values() or (E, E)))
    for name in ("first", "second"):
        set_adapter(model, name)
        save_adapter(model, tmp_path / name, name)
        torch.testing.assert_close(load_adapter(copy.deepcopy(base), tmp_path / name)(*tensors), model(*tensors))
    assert set(load_file(tmp_path / "second" / "adapter_model.safetensors")) == {
        f"base_model.model.attention.out_proj.lora_{factor}.weight" for factor in "AB"
    }
    if settings:
        keys = load_file(tmp_path / "first" / "adapter_model.safetensors").keys()
        assert "base_model.model.attention.k_proj_weight.lora_B.weight" in keys and len(keys) == 8
    # Load into a model that has the other adapter, and replace an adapter of the same name.
    other = load_adapter(copy.deepcopy(base), tmp_path / "second", adapter_name="b")
    load_adapter(other, tmp_path / "first", activate=True)
    set_adapter(model, "first")
    torch.testing.assert_close(other(*tensors), model(*tensors))
    load_adapter(other, tmp_path / "first")
    torch.testing.assert_close(other(*tensors), model(*tensors))


@pytest.mark.parametrize("kind", ["linear", "cat"])
@pytest.mark.parametrize("settings", [{}, {"kdim": 7, "vdim": 5}])
def test_weighted_combination(settings, kind, tmp_path):
    base = Wrapper(**settings)
    model = adapted(adapted(copy.deepcopy(base), name="a", lora_bias=True), name="b", lora_bias=True)
    set_adapter(add_weighted_adapter(model, ["a", "b"], [0.5, 2.0], "c", kind), "c")
    tensors = inputs("all" if settings else "self", False, True, *(settings.values() or (E, E)))
    assert_same(model, merged_copy(model), tensors)
    save_adapter(model, tmp_path, "c")
    torch.testing.assert_close(load_adapter(base, tmp_path)(*tensors), model(*tensors))


def test_a_combination_whose_ranks_a_config_cannot_express():
    model = adapted(adapted(Wrapper(), name="a"), ["out_proj"], "b")
    with refused(model, ValueError, "'attention.out_proj' would have rank 4, but a layer adapted along with it rank 2"):
        add_weighted_adapter(model, ["a", "b"], [1.0, 1.0], "c", "cat")


def test_hot_swap_scales_out_proj_like_its_attention(tmp_path):
    base, x = encoder().eval(), torch.randn(N, L, E, dtype=torch.float64)
    swapped_in = adapted(copy.deepcopy(base), ["self_attn"], alpha_pattern={"layers.1.self_attn": 9})
    save_adapter(swapped_in, tmp_path)
    model = adapted(copy.deepcopy(base), ["self_attn"])
    hotswap_adapter(model, tmp_path)
    torch.testing.assert_close(model(x), swapped_in(x))
