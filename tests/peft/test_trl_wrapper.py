"""Tests ``for_trl``: every function takes its model, PeftModel's methods work, and saved files load."""

from __future__ import annotations

import copy
import inspect
import pickle
import types
from pathlib import Path

import peft
import pytest
import torch
import transformers
from peft.optimizers import create_lorafa_optimizer, create_riemannian_optimizer
from support.models import VOCABULARY, llama, shaken
from support.public_calls import Call, call
from support.refusals import CALLS
from torch import Tensor, nn

from lora_ext import LoraConfig, inject, load_adapter, merge, save_adapter, set_adapter
from lora_ext.adapters import adapter_names, adapter_status, input_groups, merge_and_unload
from lora_ext.integrations.trl import InjectedModel, for_trl
from lora_ext.model.adapter_set import adapter_set

TARGETS = ["q_proj", "v_proj"]
CONFIG = LoraConfig(r=2, target_modules=TARGETS, init_lora_weights=False)
IDS = torch.arange(14).view(2, 7) * 3 % VOCABULARY
ADAPTER_FILES = ["adapter_config.json", "adapter_model.safetensors"]


def wrapped() -> InjectedModel:
    torch.manual_seed(0)
    return for_trl(inject(llama(), CONFIG))


def peft_model() -> peft.PeftModel:
    torch.manual_seed(0)
    config = peft.LoraConfig(r=2, target_modules=TARGETS, init_lora_weights=False)
    return peft.get_peft_model(llama(), config)


def logits(model: nn.Module) -> Tensor:
    with torch.no_grad():
        return model.eval()(input_ids=IDS).logits


def files(directory: Path) -> list[str]:
    return sorted(path.relative_to(directory).as_posix() for path in directory.rglob("*") if path.is_file())


def saved(model: nn.Module, directory: Path, **options) -> list[str]:
    model.save_pretrained(directory, **options)
    return files(directory)


def reloaded(directory: Path) -> nn.Module:
    return transformers.LlamaForCausalLM.from_pretrained(directory)


# --- the functions of lora_ext ----------------------------------------------------------------------------------------


def takes_an_injected_model(public: Call, directory: Path) -> bool:
    model = public.arguments(directory).get("model")
    return isinstance(model, nn.Module) and adapter_set(model) is not None


@pytest.mark.parametrize(
    "public",
    [public for public in CALLS if "model" in inspect.signature(public.function).parameters],
    ids=lambda public: public.function.__name__,
)
def test_every_public_function_takes_the_wrapper(public, tmp_path):
    if not takes_an_injected_model(public, tmp_path / "look"):
        return
    after = []
    for name in ("plain", "wrapped"):
        torch.manual_seed(0)
        arguments = public.arguments(tmp_path / name)
        model = arguments["model"]
        given = InjectedModel(model) if name == "wrapped" else model
        call(public.function, arguments | {"model": given})
        names = adapter_names(given) if adapter_set(model) is not None else []
        after.append((names, adapter_status(given), model.state_dict(), files(tmp_path / name)))
    plain, through = after
    assert through[:2] == plain[:2] and through[3] == plain[3]
    torch.testing.assert_close(through[2], plain[2], rtol=0, atol=0, equal_nan=True)


def test_another_adapter_comes_by_inject_and_load(tmp_path):
    model = wrapped()
    save_adapter(model, tmp_path)
    inject(model, CONFIG, "other")
    load_adapter(model, tmp_path, adapter_name="third")
    assert adapter_names(model) == ["default", "other", "third"] and model.active_adapter == "other"
    set_adapter(model, "default")
    assert all(path.startswith("model.layers.") for group in input_groups(model).groups for path in group.paths)
    with pytest.raises(ValueError, match=r"set_adapter.*DistributedDataParallel|DataParallel"):
        set_adapter(torch.nn.DataParallel(model), "other")


def test_trainer_resumes_with_all_adapters_of_a_checkpoint(tmp_path):
    """Before version 5.23 it loads those in subdirectories only; "default" would silently keep its values."""
    model = wrapped()
    inject(model, CONFIG, "ref")
    set_adapter(model, "default")
    model.save_pretrained(tmp_path)
    expected, trained = copy.deepcopy(model.state_dict()), trainable(model)
    shaken(model)
    resume(model, tmp_path)
    assert any(not torch.equal(value, expected[key]) for key, value in model.state_dict().items())
    types.FunctionType(resume.__code__, {"__name__": "transformers.trainer"})(model, tmp_path)
    assert all(torch.equal(value, expected[key]) for key, value in model.state_dict().items())
    assert trainable(model) == trained and model.active_adapter == "default"


def resume(model: nn.Module, checkpoint: Path) -> None:
    model.load_adapter(str(checkpoint / "ref"), "ref", is_trainable=False)


def trainable(model: nn.Module) -> set[str]:
    return {name for name, parameter in model.named_parameters() if parameter.requires_grad}


def test_copies_and_pickles_are_wrappers_of_copies():
    model = wrapped()
    for twin in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        expected = logits(model)
        merge(twin)
        assert not model.get_model_status().merged_adapters and twin.get_model_status().merged_adapters
        torch.testing.assert_close(logits(twin), expected)


# --- what is saved ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("unload", ["function", "method", "merged first"])
def test_a_merged_and_unloaded_model_saves_itself(unload, tmp_path):
    model = wrapped()
    expected = logits(model)
    if unload == "merged first":
        model.merge_adapter()
    plain = model.merge_and_unload() if unload == "method" else merge_and_unload(model)
    assert (plain is model.get_base_model()) == (unload == "method")
    assert "model.safetensors" in saved(plain, tmp_path / "out") and "config.json" in files(tmp_path / "out")
    assert not {*ADAPTER_FILES} & {*files(tmp_path / "out")}
    torch.testing.assert_close(logits(reloaded(tmp_path / "out")), expected)


@pytest.mark.parametrize("given", [False, True])
def test_a_merged_model_saves_itself(given, tmp_path):
    model = wrapped()
    model.add_adapter("ref", model.peft_config["default"])  # as TRL does
    expected = logits(model)
    merge(model)
    options = {"state_dict": model.state_dict()} if given else {}  # Trainer passes one under FSDP
    assert "model.safetensors" in saved(model, tmp_path, **options)
    torch.testing.assert_close(logits(reloaded(tmp_path)), expected)
    named = saved(model, tmp_path / "named", selected_adapters=["default"])
    assert named == ADAPTER_FILES
    model.unmerge_adapter()
    again = saved(model, tmp_path / "adapters")
    assert again == [*ADAPTER_FILES, *(f"ref/{name}" for name in ADAPTER_FILES)]


def test_nothing_is_not_saved_silently(tmp_path):
    model = wrapped()
    with pytest.raises(ValueError, match=r"selected_adapters is empty; the adapters are \['default'\]"):
        model.save_pretrained(tmp_path, selected_adapters=[])
    with pytest.raises(KeyError, match="'other'"):
        model.save_pretrained(tmp_path, selected_adapters=["other"])
    with pytest.raises(NotImplementedError, match="path_initial_model_for_weight_conversion"):
        model.save_pretrained(tmp_path, path_initial_model_for_weight_conversion="x")
    assert not files(tmp_path)


def test_unload_gives_the_base_model_back(tmp_path):
    model, base = wrapped(), logits(reloaded_base())
    plain = model.unload()
    assert plain is model.get_base_model()
    torch.testing.assert_close(logits(plain), base)
    assert "model.safetensors" in saved(model, tmp_path)


def reloaded_base() -> nn.Module:
    torch.manual_seed(0)
    return llama()


# --- the methods of PeftModel -----------------------------------------------------------------------------------------


def test_merging_and_taking_out_restores_every_bit():
    model = wrapped()
    base = model.get_base_model().model.layers[0].self_attn.q_proj.base_layer.weight
    before, expected = base.clone(), logits(model)
    model.merge_adapter(["default"], safe_merge=True)
    assert not torch.equal(base, before)
    torch.testing.assert_close(logits(model), expected)
    model.unmerge_adapter()
    assert torch.equal(base, before)
    model.base_model.merge_adapter()  # PEFT's tuner has the methods
    model.base_model.unmerge_adapter()
    with pytest.raises(RuntimeError, match="not merged"):
        model.unmerge_adapter()


def test_trl_is_refused_when_it_merges_for_vllm():
    model = wrapped()
    code = compile("model.merge_adapter()", "vllm_generation.py", "exec")
    with pytest.raises(NotImplementedError, match="use_vllm=False"):
        exec(code, {"__name__": "trl.generation.vllm_generation", "model": model})
    assert not model.get_model_status().merged_adapters


@pytest.mark.parametrize("kind", ["svd", "cat", "linear"])
def test_combining_leaves_the_active_adapter_active_as_in_peft(kind):
    ours, theirs = wrapped(), peft_model()
    for model, config in ((ours, CONFIG), (theirs, theirs.peft_config["default"])):
        torch.manual_seed(1)
        model.add_adapter("other", config)
        model.set_adapter("default")
        before = logits(model)
        model.add_weighted_adapter(["default", "other"], [0.75, 0.25], "both", kind)
        torch.testing.assert_close(logits(model), before)  # the active adapter stays active
        model.set_adapter("both")
        assert not torch.allclose(logits(model), before)
    assert ours.peft_config["both"].r == theirs.peft_config["both"].r


def test_the_status_is_pefts():
    ours, theirs = wrapped(), peft_model()
    for model in (ours, theirs):
        model.add_adapter("other", model.peft_config["default"])
        model.set_adapter("default")
        model.merge_adapter()
        model.base_model.set_requires_grad("default", False)
    for layer, expected in zip(ours.get_layer_status(), theirs.get_layer_status(), strict=True):
        assert type(layer) is type(expected)
        assert layer.module_type == "lora_ext.LoraLinear" and expected.module_type == "lora.Linear"
        layer.module_type, expected.module_type = "", ""
        layer.requires_grad.pop("other"), expected.requires_grad.pop("other")  # PEFT's inactive adapters train
        assert layer == expected
    status, expected = ours.get_model_status(), theirs.get_model_status()
    assert status.adapter_model_type == "_Tuner" and status.requires_grad["default"] is False
    for of_both in (status, expected):
        of_both.adapter_model_type, of_both.requires_grad, of_both.trainable_params = "", {}, 0
    assert status == expected


def test_gradients_are_switched():
    model = wrapped()
    model.set_requires_grad("default", False)
    assert not any(parameter.requires_grad for parameter in model.parameters())
    model.set_requires_grad(["default"])
    assert any(parameter.requires_grad for parameter in model.parameters())
    model.set_adapter("default", inference_mode=True)
    assert not any(parameter.requires_grad for parameter in model.parameters())
    with pytest.raises(NotImplementedError, match=r"set_requires_grad\(\['other'\]\).*set_adapter"):
        model.set_requires_grad("other")


REFUSED = {
    "disable_adapter_layers": (lambda model: model.disable_adapter_layers(), "with model.disable_adapter"),
    "enable_adapter_layers": (lambda model: model.enable_adapter_layers(), "with model.disable_adapter"),
    "get_peft_model_state_dict": (peft.get_peft_model_state_dict, "save_adapter"),
    "set_peft_model_state_dict": (lambda model: peft.set_peft_model_state_dict(model, {}), "load_adapter"),
    "create_lorafa_optimizer": (lambda model: create_lorafa_optimizer(model, 2, 8, lr=1e-2), r"peft\.accelerate"),
    "create_riemannian_optimizer": (
        lambda model: create_riemannian_optimizer(model, torch.optim.AdamW, lr=1e-2),
        r"peft\.accelerate",
    ),
    "from_pretrained": (lambda model: type(model).from_pretrained(llama(), "x"), r"for_trl\(load_adapter"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_the_wrapper_cannot_do_is_refused_with_the_remedy(name):
    do, remedy = REFUSED[name]
    model = wrapped()
    trained = {key for key, parameter in model.named_parameters() if parameter.requires_grad}
    with pytest.raises(NotImplementedError, match=rf"{name}.*{remedy}"):
        do(model)
    assert trained == {key for key, parameter in model.named_parameters() if parameter.requires_grad}
