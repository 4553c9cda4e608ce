"""Adapters with their scaling folded into the factors: save_adapter(normalise=True), normalise, inspect's notes."""

from __future__ import annotations

import copy
import json
from pathlib import Path

import peft
import pytest
import torch
from safetensors.torch import load_file
from support.checkpoint_files import EVERY_LAYER, EveryLayer, edit_config, merged_by_peft, peft_adapter
from support.models import Net, gpt2, llama, refused, shaken, token_ids
from torch import Tensor, nn

from lora_ext import LoraConfig, inject, load_adapter, save_adapter
from lora_ext.checkpoints import inspect, normalise, open_adapter

pytestmark = pytest.mark.cpu_only("is about files, which hold CPU tensors")

PATTERNS = {"rank_pattern": {"lin": 5, "conv2d": 3}, "alpha_pattern": {"square": 7}, "use_rslora": True}


def config_of(directory: Path) -> dict:
    return json.loads((directory / "adapter_config.json").read_text())


def readings(directory: Path, path: str) -> list[Tensor]:
    """The update of a linear layer as vLLM, llama.cpp and diffusers (without metadata) compute it from the files."""
    config, tensors = config_of(directory), load_file(directory / "adapter_model.safetensors")
    A, B = (tensors[f"base_model.model.{path}.lora_{side}.weight"] for side in "AB")
    return [B @ A * scale for scale in (config["lora_alpha"] / config["r"], config["lora_alpha"] / B.shape[1], 1.0)]


@pytest.mark.parametrize("patterns", [{}, PATTERNS], ids=["plain", "patterns"])
def test_every_reading_computes_what_peft_does(patterns, tmp_path):
    torch.manual_seed(0)
    model = EveryLayer()
    adapted = peft_adapter(model, tmp_path / "adapter", **EVERY_LAYER, **patterns)
    normalise(tmp_path / "adapter", tmp_path / "normal")
    config, rank = config_of(tmp_path / "normal"), 5 if patterns else 2
    expected = config_of(tmp_path / "adapter") | {"rank_pattern": {}, "alpha_pattern": {}, "use_rslora": False}
    assert config == expected | {"r": rank, "lora_alpha": rank}
    expected = merged_by_peft(adapted)
    loaded = peft.PeftModel.from_pretrained(copy.deepcopy(model), tmp_path / "normal")
    torch.testing.assert_close(merged_by_peft(loaded), expected)
    for path in ("lin", "square"):
        update = expected[f"{path}.weight"] - model.get_parameter(f"{path}.weight")
        assert not all(torch.allclose(one, update, 1e-3) for one in readings(tmp_path / "adapter", path))
        for one in readings(tmp_path / "normal", path):
            torch.testing.assert_close(one, update, rtol=1e-4, atol=1e-5)
    assert {(update.r, update.scaling) for update in open_adapter(tmp_path / "normal").updates} == {(rank, 1.0)}


SAVED = {
    "patterns": (
        llama,
        {"target_modules": "all-linear", "rank_pattern": {"q_proj": 5}, "alpha_pattern": {"up_proj": 1}},
    ),
    "bias": (llama, {"target_modules": ["q_proj"], "lora_bias": True, "use_rslora": True}),
    "dora": (llama, {"target_modules": ["q_proj", "down_proj"], "use_dora": True, "rank_pattern": {"down_proj": 2}}),
    "packed": (gpt2, {"target_modules": ["c_attn", "c_proj"], "enable_lora": {"c_attn": (True, False, True)}}),
    "tokens": (llama, {"target_modules": ["q_proj", "embed_tokens"], "trainable_token_indices": None}),
}


@pytest.mark.parametrize("name", SAVED)
def test_a_saved_adapter_computes_the_same_in_both_libraries(name, tmp_path):
    make, settings = SAVED[name]
    model = make().eval()
    plain = copy.deepcopy(model)
    shaken(inject(model, LoraConfig(r=4, lora_alpha=10, **settings))).eval()
    save_adapter(model, tmp_path, normalise=True)
    config = config_of(tmp_path)
    assert config["r"] == config["lora_alpha"] and not (config["rank_pattern"] or config["alpha_pattern"])
    ids = token_ids(2)
    with torch.no_grad():
        expected = model(ids).logits
        ours = load_adapter(copy.deepcopy(plain), tmp_path)
        theirs = peft.PeftModel.from_pretrained(plain, tmp_path)
        for other in (ours, theirs):
            torch.testing.assert_close(other(ids).logits, expected, rtol=1e-4, atol=1e-5)


def test_a_product_that_the_dtype_cannot_hold_is_refused(tmp_path):
    model = inject(Net().half(), LoraConfig(r=2, lora_alpha=2, target_modules=["up"]))
    with torch.no_grad():
        for layer in model.modules():
            if hasattr(layer, "adapters"):
                layer.adapters.half()
                layer.adapters["default"].lora_B.fill_(6e4)
    save_adapter(model, tmp_path / "adapter")
    edit_config(tmp_path / "adapter", lora_alpha=8)
    with refused(tmp_path, ValueError, "normalise: ", "lora_B", "scaling 4 is too large for torch.float16"):
        normalise(tmp_path / "adapter", tmp_path / "out")
    with refused(tmp_path, FileNotFoundError, "adapter_config.json is missing"):
        normalise(tmp_path / "nowhere", tmp_path / "out")


def notes(directory: Path) -> str:
    return "\n".join(inspect(directory)["misreadings"])


def test_inspect_notes_what_others_read_in_another_way(tmp_path):
    torch.manual_seed(0)
    model = nn.ModuleDict({"lin": nn.Linear(8, 12), "square": nn.Linear(8, 8)})
    peft_adapter(model, tmp_path / "adapter", target_modules=["lin", "square"], **PATTERNS)
    said = notes(tmp_path / "adapter")
    for fragment in (
        "differ by layer",
        "use_rslora: llama.cpp",
        "lora_alpha is not r: diffusers",
        "lora-ext normalise",
    ):
        assert fragment in said
    normalise(tmp_path / "adapter", tmp_path / "normal")
    assert notes(tmp_path / "normal") == "base_model_name_or_path is empty: llama.cpp's converter needs --base"
    edit_config(tmp_path / "normal", base_model_name_or_path="some/model")
    assert notes(tmp_path / "normal") == ""
    peft_adapter(model, tmp_path / "more", target_modules=["lin"], use_dora=True, modules_to_save=["square"])
    assert "use_dora" in notes(tmp_path / "more") and "saved in full" in notes(tmp_path / "more")
