"""Files and configs of PEFT that are not what ``save_pretrained`` writes of a new LoRA adapter."""

from __future__ import annotations

import copy
import json
from pathlib import Path

import peft
import pytest
import torch
from peft.tuners.lora.config import EvaConfig
from safetensors.torch import save_file
from support.models import Net, answer, llama, refused, shaken
from torch import Tensor, nn

from lora_ext import LoraConfig, inject, load_adapter, save_adapter

TARGETS = ["q_proj", "v_proj"]


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
    return answer(model)


# --- initialisations --------------------------------------------------------------------------------------------------


EVA = {"init_lora_weights": "eva", "eva_config": EvaConfig(), "rank_pattern": {"layers.0.self_attn.q_proj": 2}}


@pytest.mark.filterwarnings("ignore:lora with eva initialization", "ignore:`eva_config` specified")
@pytest.mark.parametrize("options", [{"init_lora_weights": "mica"}, EVA])
def test_an_initialisation_that_keeps_the_base_does_not_matter(options, tmp_path):
    base = llama().eval()
    theirs = adapted(base, **options)
    theirs.save_pretrained(tmp_path / "theirs")
    ours = load_adapter(copy.deepcopy(base), tmp_path / "theirs")
    torch.testing.assert_close(answer(ours), answer(theirs))
    save_adapter(ours, tmp_path / "ours")
    read = peft.PeftModel.from_pretrained(copy.deepcopy(base), tmp_path / "ours")
    torch.testing.assert_close(answer(read), answer(theirs))


@pytest.mark.filterwarnings("ignore:PiSSA changes the base weights")
def test_a_converted_adapter_loads_and_another_is_refused(tmp_path):
    base, kept = llama().eval(), tmp_path / "as_it_is"
    config = peft.LoraConfig(r=4, target_modules=TARGETS, init_lora_weights="pissa")
    theirs = peft.get_peft_model(copy.deepcopy(base), config)
    theirs.save_pretrained(tmp_path / "initial")
    trained(theirs)
    theirs.save_pretrained(kept)
    expected = answer(theirs)
    converted = tmp_path / "converted"
    theirs.save_pretrained(converted, path_initial_model_for_weight_conversion=str(tmp_path / "initial"))
    ours = load_adapter(copy.deepcopy(base), converted)
    torch.testing.assert_close(answer(ours), expected, rtol=1e-4, atol=1e-5)
    remedies = "base weights", "path_initial_model_for_weight_conversion", '"init_lora_weights": true'
    for init in ("pissa", "olora", "pissa_niter_4", "corda", "lora_ga", "loftq"):
        edit(kept, init_lora_weights=init)
        with refused(base, ValueError, f"init_lora_weights is '{init}'", *remedies):
            load_adapter(base, kept)
    # What the message says: the base model as the initialisation has changed it, and a plain config.
    edit(kept, init_lora_weights=True)
    torch.testing.assert_close(answer(load_adapter(theirs.unload(), kept)), expected)


# --- alphas and other keys --------------------------------------------------------------------------------------------


def test_remarks_are_read_and_kept(tmp_path):
    base = llama().eval()
    remarks = {"note": "for the demo", "_comment": ["by hand"], "training_comments": "three epochs", "author": "N. N."}
    remarks |= {"tags": ["demo"], "created_at": "2026-11-27", "transformers_version": "5", "model_commit_hash": "0123"}
    expected = saved(base, tmp_path / "theirs", **remarks)
    ours = load_adapter(copy.deepcopy(base), tmp_path / "theirs")
    torch.testing.assert_close(answer(ours), expected)
    save_adapter(ours, tmp_path / "ours")
    assert json.loads((tmp_path / "ours" / "adapter_config.json").read_text()).items() >= remarks.items()


REFUSED = [
    ({"alpha_pattern": {"v_proj": -3}}, "want a positive finite number"),
    ({"ensure_weight_tying": True}, "lora_ext.integrations.peft.accelerate"),
    ({"init_lora_weights": "mica"}, '"init_lora_weights": true'),
    *(({key: "x"}, "if it is only a remark, remove it") for key in ("lora_magnitude", "use_later_variant", "tagged_l")),
]


@pytest.mark.parametrize(("values", "remedy"), REFUSED)
def test_a_config_that_may_change_the_result_is_refused_with_the_remedy(values, remedy, tmp_path):
    base = llama().eval()
    saved(base, tmp_path, **values)
    with refused(base, ValueError, f"{tmp_path / 'adapter_config.json'}: ", *values, remedy):
        load_adapter(base, tmp_path, trainable=True)


# --- PEFT's config objects --------------------------------------------------------------------------------------------


def test_inject_takes_pefts_config():
    settings = {"r": 4, "lora_alpha": 6, "target_modules": TARGETS, "rank_pattern": {"v_proj": 2}, "bias": "lora_only"}
    settings |= {"exclude_modules": ["layers.0.self_attn.q_proj"], "trainable_token_indices": [1, 2]}
    model, twin = (inject(llama(), kind(**settings)) for kind in (peft.LoraConfig, LoraConfig))
    shapes = [{name: p.shape for name, p in one.named_parameters()} for one in (model, twin)]
    assert shapes[0] == shapes[1]
    assert LoraConfig.from_peft(peft.LoraConfig(**settings)) == LoraConfig(**settings)


def test_configs_that_are_not_ours_are_refused():
    model, config = llama(), peft.LoraConfig(target_modules=TARGETS)
    config._register_custom_module({nn.Linear: nn.Linear})
    theirs = peft.IA3Config(target_modules=TARGETS, feedforward_modules=[])
    for wrong, words in ((theirs, "peft_type is 'IA3', want 'LORA'"), (config, "custom modules")):
        with refused(model, ValueError, words):
            inject(model, wrong)


@pytest.mark.parametrize("task", [None, "CAUSAL_LM"])
def test_pefts_auto_classes_find_the_base_model(task, tmp_path):
    base = llama().eval()
    base.save_pretrained(tmp_path / "base")
    model = type(base).from_pretrained(tmp_path / "base")
    trained(inject(model, LoraConfig(target_modules=TARGETS, task_type=task)))
    save_adapter(model, tmp_path / "adapter")
    kinds = [peft.AutoPeftModelForCausalLM, *([peft.AutoPeftModel] if task is None else [])]
    for kind in kinds:
        read = kind.from_pretrained(tmp_path / "adapter").eval()
        torch.testing.assert_close(answer(read), answer(model))


def test_a_file_of_peft_0_10(tmp_path):
    """It lacks keys that came later, and has no biases for bias="lora_only"."""
    config = {"bias": "lora_only", "init_lora_weights": False, "layer_replication": None, "layers_pattern": None}
    config |= {"loftq_config": {}, "lora_alpha": 8, "megatron_config": None, "megatron_core": "megatron.core", "r": 2}
    config |= {"peft_type": "LORA", "target_modules": ["up"], "use_dora": False, "use_rslora": False}
    (tmp_path / "adapter_config.json").write_text(json.dumps(config))
    factors = [(torch.randn(2, 6), torch.randn(10, 2)) for _ in range(2)]
    key = "base_model.model.blocks.{}.up.lora_{}.weight".format
    tensors = {key(i, name): factor for i, pair in enumerate(factors) for name, factor in zip("AB", pair, strict=True)}
    save_file(tensors, tmp_path / "adapter_model.safetensors")
    model = Net().eval()
    with refused(model, ValueError, "missing key: base_model.model.blocks.0.up.base_layer.bias"):
        load_adapter(model, tmp_path)
    edit(tmp_path, bias="none")
    load_adapter(model, tmp_path)
    for block, (A, B) in zip(model.blocks, factors, strict=True):
        torch.testing.assert_close(block.up.delta_weight(), 4 * B @ A)
