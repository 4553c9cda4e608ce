"""Files and configs of PEFT that are not what ``save_pretrained`` writes of a new LoRA adapter."""

from __future__ import annotations

import copy
import json
from pathlib import Path

import peft
import pytest
import torch
from peft.tuners.lora.config import EvaConfig, LoraGAConfig
from safetensors.torch import save_file
from support.models import Net, llama, refused, shaken
from torch import Tensor, nn

from lora_ext import LoraConfig, inject, load_adapter, save_adapter

TARGETS = ["q_proj", "v_proj"]


def logits(model: nn.Module, ids: Tensor) -> Tensor:
    with torch.no_grad():
        return model(input_ids=ids).logits


def trained(model: nn.Module) -> nn.Module:
    """Adds noise to the trained parameters, in place of training."""
    return shaken(model).eval()


def adapted(base: nn.Module, **settings) -> peft.PeftModel:
    """A copy of ``base``, adapted by PEFT and trained."""
    config = peft.LoraConfig(r=4, target_modules=TARGETS, **settings)
    return trained(peft.get_peft_model(copy.deepcopy(base), config))


def edit(directory: Path, **values) -> None:
    file = directory / "adapter_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | values))


def saved(base: nn.Module, directory: Path, **values) -> Tensor:
    """Saves an adapter with these values in its config; returns the logits of PEFT's model for tokens 0 to 6."""
    model = adapted(base)
    model.save_pretrained(directory)
    edit(directory, **values)
    return logits(model, IDS)


IDS = torch.arange(7)[None]

# --- initialisations --------------------------------------------------------------------------------------------------


@pytest.mark.filterwarnings("ignore:lora with eva initialization", "ignore:`eva_config` specified")
@pytest.mark.parametrize("options", [{"init_lora_weights": "mica"}, {"init_lora_weights": "eva"}])
def test_an_initialisation_that_keeps_the_base_does_not_matter(options, tmp_path):
    base, is_eva = llama().eval(), options["init_lora_weights"] == "eva"
    if is_eva:
        options |= {"eva_config": EvaConfig(), "rank_pattern": {"layers.0.self_attn.q_proj": 2}}
    theirs = adapted(base, **options)
    theirs.save_pretrained(tmp_path / "theirs")
    ours = load_adapter(copy.deepcopy(base), tmp_path / "theirs")
    torch.testing.assert_close(logits(ours, IDS), logits(theirs, IDS))
    save_adapter(ours, tmp_path / "ours")
    read = peft.PeftModel.from_pretrained(copy.deepcopy(base), tmp_path / "ours")
    torch.testing.assert_close(logits(read, IDS), logits(theirs, IDS))
    if not is_eva:
        with refused(base, ValueError, 'init_lora_weights is "mica"', "lora_A only", '"init_lora_weights": true'):
            load_adapter(base, tmp_path / "theirs", trainable=True)


@pytest.mark.filterwarnings("ignore:PiSSA changes the base weights")
def test_a_converted_adapter_loads_and_another_is_refused(tmp_path):
    base, kept = llama().eval(), tmp_path / "as_it_is"
    config = peft.LoraConfig(r=4, target_modules=TARGETS, init_lora_weights="pissa")
    theirs = peft.get_peft_model(copy.deepcopy(base), config)
    theirs.save_pretrained(tmp_path / "initial")
    trained(theirs)
    theirs.save_pretrained(kept)
    expected = logits(theirs, IDS)
    converted = tmp_path / "converted"
    theirs.save_pretrained(converted, path_initial_model_for_weight_conversion=str(tmp_path / "initial"))
    ours = load_adapter(copy.deepcopy(base), converted)
    torch.testing.assert_close(logits(ours, IDS), expected, rtol=1e-4, atol=1e-5)
    remedies = "base weights", "path_initial_model_for_weight_conversion", '"init_lora_weights": true'
    for init in ("pissa", "olora", "pissa_niter_4", "corda", "lora_ga", "loftq"):
        edit(kept, init_lora_weights=init)
        with refused(base, ValueError, f"init_lora_weights is '{init}'", *remedies):
            load_adapter(base, kept)
    # What the message says: the base model as the initialisation has changed it, and a plain config.
    edit(kept, init_lora_weights=True)
    torch.testing.assert_close(logits(load_adapter(theirs.unload(), kept), IDS), expected)


# --- alphas and other keys --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("values", [{"lora_alpha": -6}, {"alpha_pattern": {"v_proj": -3}}])
def test_negative_alphas_are_refused(values, tmp_path):
    base = llama().eval()
    saved(base, tmp_path, **values)
    with refused(base, ValueError, f"{tmp_path / 'adapter_config.json'}: ", "want a positive finite number"):
        load_adapter(base, tmp_path)


def test_remarks_are_read_and_kept(tmp_path):
    base = llama().eval()
    remarks = {"note": "for the demo", "_comment": ["by hand"], "training_comments": "three epochs", "author": "N. N."}
    remarks |= {"tags": ["demo"], "created_at": "2026-11-27", "transformers_version": "5", "model_commit_hash": "0123"}
    expected = saved(base, tmp_path / "theirs", **remarks)
    ours = load_adapter(copy.deepcopy(base), tmp_path / "theirs")
    torch.testing.assert_close(logits(ours, IDS), expected)
    save_adapter(ours, tmp_path / "ours")
    assert json.loads((tmp_path / "ours" / "adapter_config.json").read_text()).items() >= remarks.items()


@pytest.mark.parametrize("key", ["lora_magnitude", "use_later_variant", "lora_version", "denoted", "tagged_layers"])
def test_keys_that_may_change_the_result_are_refused_with_the_remedy(key, tmp_path):
    base = llama().eval()
    saved(base, tmp_path, **{key: "x"})
    with refused(base, ValueError, f"{key}='x' not supported", "If it is only a remark, remove it"):
        load_adapter(base, tmp_path)


def test_tied_adapters_are_refused(tmp_path):
    base = llama(tied=True).eval()
    saved(base, tmp_path, ensure_weight_tying=True)
    with refused(base, ValueError, "ensure_weight_tying=True not supported", "lora_ext.integrations.peft.accelerate"):
        load_adapter(base, tmp_path)


# --- PEFT's config objects --------------------------------------------------------------------------------------------


def test_inject_takes_pefts_config():
    settings = {"r": 4, "lora_alpha": 6, "target_modules": TARGETS, "rank_pattern": {"v_proj": 2}, "bias": "lora_only"}
    settings |= {"exclude_modules": ["layers.0.self_attn.q_proj"], "trainable_token_indices": [1, 2]}
    model, twin = (inject(llama(), kind(**settings)) for kind in (peft.LoraConfig, LoraConfig))
    shapes = [{name: p.shape for name, p in one.named_parameters()} for one in (model, twin)]
    assert shapes[0] == shapes[1]
    assert LoraConfig.from_peft(peft.LoraConfig(**settings)) == LoraConfig(**settings)


UNSUPPORTED = [
    ({"use_qalora": True}, ["use_qalora=True not supported", "can be used here"]),
    ({"init_lora_weights": "eva", "eva_config": EvaConfig()}, ["init_lora_weights is 'eva', want"]),
    ({"init_lora_weights": "lora_ga", "lora_ga_config": LoraGAConfig()}, ["init_lora_weights is 'lora_ga', want"]),
]


@pytest.mark.parametrize(("options", "words"), UNSUPPORTED)
def test_pefts_configs_that_we_do_not_support_are_refused_by_name(options, words):
    model = llama()
    with refused(model, ValueError, *words):
        inject(model, peft.LoraConfig(target_modules=TARGETS, **options))


def test_other_objects_are_no_config():
    model = llama()
    with refused(model, ValueError, "peft_type is 'IA3', want 'LORA'"):
        inject(model, peft.IA3Config(target_modules=TARGETS, feedforward_modules=[]))
    config = peft.LoraConfig(target_modules=TARGETS)
    config._register_custom_module({nn.Linear: nn.Linear})
    with refused(model, ValueError, "custom modules"):
        inject(model, config)
    with refused(model, TypeError, "inject: config is", "want a LoraConfig"):
        inject(model, {"target_modules": TARGETS})


@pytest.mark.parametrize("task", [None, "CAUSAL_LM"])
def test_pefts_auto_classes_find_the_base_model(task, tmp_path):
    base = llama().eval()
    base.save_pretrained(tmp_path / "base")
    model = trained(
        inject(type(base).from_pretrained(tmp_path / "base"), LoraConfig(target_modules=TARGETS, task_type=task))
    )
    save_adapter(model, tmp_path / "adapter")
    kinds = [peft.AutoPeftModelForCausalLM, *([peft.AutoPeftModel] if task is None else [])]
    for kind in kinds:
        read = kind.from_pretrained(tmp_path / "adapter").eval()
        torch.testing.assert_close(logits(read, IDS), logits(model, IDS))


# The config of a file of PEFT 0.10, which left out the biases of bias="lora_only".
PEFT_0_10 = {
    **{"alpha_pattern": {}, "rank_pattern": {}, "bias": "lora_only", "fan_in_fan_out": False, "inference_mode": True},
    **{"auto_mapping": {"base_model_class": "Net", "parent_library": "__main__"}, "base_model_name_or_path": None},
    **{"init_lora_weights": False, "layer_replication": None, "layers_pattern": None, "layers_to_transform": None},
    **{"loftq_config": {}, "lora_alpha": 8, "lora_dropout": 0.0, "megatron_config": None, "revision": None, "r": 2},
    **{"megatron_core": "megatron.core", "modules_to_save": None, "peft_type": "LORA", "target_modules": ["up"]},
    **{"task_type": None, "use_dora": False, "use_rslora": False},
}


def test_a_file_of_peft_0_10(tmp_path):
    tensors = {}
    for i in range(2):
        tensors[f"base_model.model.blocks.{i}.up.lora_A.weight"] = torch.randn(2, 6)
        tensors[f"base_model.model.blocks.{i}.up.lora_B.weight"] = torch.randn(10, 2)
    save_file(tensors, tmp_path / "adapter_model.safetensors")
    (tmp_path / "adapter_config.json").write_text(json.dumps(PEFT_0_10))
    model = Net().eval()
    with refused(model, ValueError, "missing key: base_model.model.blocks.0.up.base_layer.bias"):
        load_adapter(model, tmp_path)
    edit(tmp_path, bias="none")
    load_adapter(model, tmp_path)
    expected = 4 * tensors["base_model.model.blocks.0.up.lora_B.weight"]
    torch.testing.assert_close(
        model.blocks[0].up.delta_weight(), expected @ tensors["base_model.model.blocks.0.up.lora_A.weight"]
    )
