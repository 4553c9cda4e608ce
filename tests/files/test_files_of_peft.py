"""Files and configs of PEFT that are not what ``save_pretrained`` writes of a new LoRA adapter today."""

from __future__ import annotations

import copy
import json

import peft
import pytest
import torch
from peft.tuners.lora.config import EvaConfig
from safetensors.torch import load_file, save_file
from support.checkpoint_files import edit_config, peft_adapter
from support.layers import delta_of
from support.models import Net, answer, llama, refused, shaken
from torch import Tensor, nn

from lora_ext import LoraConfig, inject, load_adapter, save_adapter
from lora_ext.adapters import lora_modules

TARGETS = ["q_proj", "v_proj"]


EVA = {"init_lora_weights": "eva", "eva_config": EvaConfig(), "rank_pattern": {"layers.0.self_attn.q_proj": 2}}


@pytest.mark.filterwarnings("ignore:lora with eva initialization", "ignore:`eva_config` specified")
@pytest.mark.parametrize("options", [{"init_lora_weights": "mica"}, EVA])
def test_an_initialisation_that_keeps_the_base_does_not_matter(options, tmp_path):
    base = llama().eval()
    theirs = peft_adapter(base, tmp_path / "theirs", target_modules=TARGETS, **options)
    ours = load_adapter(copy.deepcopy(base), tmp_path / "theirs")
    torch.testing.assert_close(answer(ours), answer(theirs))
    save_adapter(ours, tmp_path / "ours")
    read = peft.PeftModel.from_pretrained(copy.deepcopy(base), tmp_path / "ours")
    torch.testing.assert_close(answer(read), answer(theirs))
    if options["init_lora_weights"] == "mica":  # which trains one factor
        with refused(base, ValueError, f"{tmp_path}/theirs/adapter_config.json: ", '"init_lora_weights": true'):
            load_adapter(base, tmp_path / "theirs", trainable=True)


@pytest.mark.filterwarnings("ignore:PiSSA changes the base weights")
def test_a_converted_adapter_loads_and_another_is_refused(tmp_path):
    base, kept = llama().eval(), tmp_path / "as_it_is"
    config = peft.LoraConfig(r=4, target_modules=TARGETS, init_lora_weights="pissa")
    theirs = peft.get_peft_model(copy.deepcopy(base), config)
    theirs.save_pretrained(tmp_path / "initial")
    shaken(theirs).eval()
    theirs.save_pretrained(kept)
    expected = answer(theirs)
    converted = tmp_path / "converted"
    theirs.save_pretrained(converted, path_initial_model_for_weight_conversion=str(tmp_path / "initial"))
    ours = load_adapter(copy.deepcopy(base), converted)
    torch.testing.assert_close(answer(ours), expected, rtol=1e-4, atol=1e-5)
    remedies = "base weights", "path_initial_model_for_weight_conversion", '"init_lora_weights": true'
    for init in ("pissa", "olora", "pissa_niter_4", "corda", "lora_ga", "loftq"):
        edit_config(kept, init_lora_weights=init)
        with refused(base, ValueError, f"init_lora_weights is '{init}'", *remedies):
            load_adapter(base, kept)
    # What the message says: the base model as the initialisation has changed it, and a plain config.
    edit_config(kept, init_lora_weights=True)
    torch.testing.assert_close(answer(load_adapter(theirs.unload(), kept)), expected)


def test_remarks_are_read_and_kept(tmp_path):
    base = llama().eval()
    remarks = {"_comment": ["by hand"], "training_comments": "three epochs", "author": "N. N."}
    remarks |= {"tags": ["demo"], "created_at": "2026-11-27", "transformers_version": "5", "model_commit_hash": "0123"}
    remarks["note"] = {"files": ["\u00e9\u6f22\U0001f600", "\\ud800"], "rows": 10**99, "scale": float("inf"), "": [[]]}
    theirs = peft_adapter(base, tmp_path / "theirs", target_modules=TARGETS)
    edit_config(tmp_path / "theirs", **remarks)
    ours = load_adapter(copy.deepcopy(base), tmp_path / "theirs")
    torch.testing.assert_close(answer(ours), answer(theirs))
    save_adapter(ours, tmp_path / "ours")
    save_adapter(load_adapter(base, tmp_path / "ours"), tmp_path / "again")
    for name in ("ours", "again"):
        assert json.loads((tmp_path / name / "adapter_config.json").read_text()).items() >= remarks.items()


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
    shaken(inject(model, LoraConfig(target_modules=TARGETS, task_type=task))).eval()
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
    edit_config(tmp_path, bias="none")
    load_adapter(model, tmp_path)
    for block, (A, B) in zip(model.blocks, factors, strict=True):
        torch.testing.assert_close(block.up.delta_weight(), 4 * B @ A)


# --- stacked experts, before and after PEFT changed their layout ------------------------------------------------------


R, NUM_EXPERTS, SCALING = 2, 3, 1.5


class Experts(nn.Module):
    def __init__(self, transposed: bool, sizes: tuple[tuple[int, int], ...]) -> None:
        super().__init__()
        self.is_transposed = transposed
        for name, (rows, columns) in zip(("up", "down"), sizes, strict=False):
            self.register_parameter(name, nn.Parameter(torch.zeros(NUM_EXPERTS, rows, columns, dtype=torch.float64)))

    def forward(self) -> list[Tensor]:
        return [parameter * 1.0 for parameter in (self.up, getattr(self, "down", None)) if parameter is not None]


def base(transposed: bool, *sizes: tuple[int, int]) -> nn.Module:
    return nn.ModuleDict({"experts": Experts(transposed, sizes)})


def write_experts(directory, model: nn.Module, version: str | None, is_exchanged: bool) -> dict[str, Tensor]:
    """Writes an adapter as PEFT does; returns the updates by parameter.

    ``is_exchanged``: the sizes ``[num_experts, in, out]`` are read off the parameter, as PEFT 0.17 to 0.18 do; the
    formulas are those of PEFT's get_delta_weight.
    """
    tensors, updates = {}, {}
    parameters = dict(model["experts"].named_parameters())
    for level, (name, parameter) in enumerate(parameters.items()):
        _, first, last = parameter.shape
        sizes = (first, last) if is_exchanged else (last, first)
        A = torch.randn(R * NUM_EXPERTS, sizes[0], dtype=torch.float64)
        B = torch.randn(sizes[1], R * NUM_EXPERTS, dtype=torch.float64)
        formula = "o r e, e r i -> e i o" if is_exchanged else "o r e, e r i -> e o i"
        updates[name] = SCALING * torch.einsum(formula, B.reshape(len(B), R, -1), A.reshape(NUM_EXPERTS, R, -1))
        path = "base_model.model.experts." + "base_layer." * (len(parameters) - 1 - level)
        tensors |= {f"{path}lora_A.weight": A, f"{path}lora_B.weight": B}
    config = LoraConfig(r=R, lora_alpha=3, target_modules=[], target_parameters=[f"experts.{n}" for n in parameters])
    values = config.to_dict() | ({"peft_version": version} if version else {})
    directory.mkdir()
    (directory / "adapter_config.json").write_text(json.dumps(values))
    save_file(tensors, directory / "adapter_model.safetensors")
    return updates


RECTANGULAR, SQUARE = ((8, 5), (4, 8)), ((6, 6),)
# (version, the sizes are read as [experts, in, out]) for parameters [experts, out, in], then for [experts, in, out]
PRESENT = [(False, "0.19.1", False), (False, "0.21.2", False), (True, "0.19.1", True), (True, "0.21.2@main", True)]
OLD = [(True, None, True), (True, "0.18.1", True)]  # the same layout, and so read if the shapes say it
EXCHANGED = [(False, None, True), (False, "0.18.1", True), (False, "0.19.0", True), (False, "0.19.1.dev0", True)]
EXCHANGED += [(True, "0.19.0", False), (True, "0.19.1.dev0", False)]


@pytest.mark.parametrize(
    ("transposed", "version", "is_exchanged", "sizes"),
    [*((*case, SQUARE) for case in PRESENT), *((*case, RECTANGULAR) for case in PRESENT + OLD)],
)
def test_the_present_layout_is_read(transposed, version, is_exchanged, sizes, tmp_path):
    model = base(transposed, *sizes)
    updates = write_experts(tmp_path / "file", model, version, is_exchanged)
    load_adapter(model, tmp_path / "file")
    for found, update in zip(model["experts"](), updates.values(), strict=True):
        torch.testing.assert_close(found, update)
    for _, layer in lora_modules(model):
        torch.testing.assert_close(delta_of(layer), updates[layer.parameter_name])

    save_adapter(model, tmp_path / "again")
    config = json.loads((tmp_path / "again" / "adapter_config.json").read_text())
    assert config["peft_version"] == (version if version in ("0.21.2", "0.21.2@main") else "0.19.1")
    again = load_adapter(base(transposed, *sizes), tmp_path / "again")
    assert all(torch.equal(*pair) for pair in zip(again["experts"](), model["experts"](), strict=True))


@pytest.mark.parametrize(("transposed", "version", "is_exchanged"), EXCHANGED + OLD)
def test_square_experts_of_an_old_peft_are_refused_and_shapes_tell_others(transposed, version, is_exchanged, tmp_path):
    model = base(transposed, *SQUARE)
    write_experts(tmp_path / "square", model, version, is_exchanged)
    words = "square experts", f"peft_version in adapter_config.json is {version!r}"
    with refused(model, ValueError, "load_adapter: ", *words):
        load_adapter(model, tmp_path / "square")
    if (transposed, version, is_exchanged) in EXCHANGED:
        model = base(transposed, *RECTANGULAR)
        write_experts(tmp_path / "file", model, version, is_exchanged)
        with refused(model, ValueError, "shape of base_model.model.experts.base_layer.lora_A.weight: [6, "):
            load_adapter(model, tmp_path / "file")


def test_one_adapter_for_each_expert_is_refused(tmp_path):
    model = base(False, *RECTANGULAR)
    write_experts(tmp_path / "each", model, None, False)
    file = tmp_path / "each" / "adapter_model.safetensors"
    save_file({key.replace("experts.", "experts.0."): value for key, value in load_file(file).items()}, file)
    with refused(model, ValueError, "one adapter for each expert. PEFT converts"):
        load_adapter(model, tmp_path / "each")
