"""What an adapter's file changes, read from its keys and its config."""

from __future__ import annotations

from pathlib import Path

import pytest
from support.checkpoint_files import EVERY_LAYER, EveryLayer, edit_config, peft_adapter
from support.models import llama

from lora_ext.checkpoints import open_adapter

pytestmark = pytest.mark.cpu_only("is about files, which hold CPU tensors")


@pytest.fixture
def directory(tmp_path: Path) -> Path:
    peft_adapter(EveryLayer(), tmp_path / "adapter", **EVERY_LAYER)
    return tmp_path / "adapter"


def test_the_keys_identify_every_layer_type(directory: Path):
    contents = open_adapter(directory)
    kinds = sorted((update.path, update.kind) for update in contents.updates)
    assert kinds == [
        ("conv1d", "conv"),
        ("conv2d", "conv"),
        ("conv3d", "conv"),
        ("embed", "embedding"),
        ("experts", "parameter"),
        ("experts", "parameter"),
        ("lin", "linear"),
        ("single", "parameter"),
        ("square", "linear"),
    ]
    assert sorted(contents.replaced) == ["head.bias", "head.weight"]
    named = [key for update in contents.updates for key in (update.lora_A, update.lora_B)]
    assert sorted([*named, *contents.replaced.values()]) == sorted(contents.file.tensors)


def test_biases_tokens_and_copies_of_the_base(tmp_path: Path):
    peft_adapter(EveryLayer(), tmp_path / "a", target_modules=["lin", "conv1d"], bias="all", modules_to_save=["head"])
    contents = open_adapter(tmp_path / "a")
    assert {"lin.bias", "norm.bias", "attn.out_proj.bias", "head.bias"} <= contents.replaced.keys()
    settings = {"target_modules": ["lm_head"], "trainable_token_indices": {"embed_tokens": [3, 1]}}
    peft_adapter(llama(), tmp_path / "b", **settings)
    contents = open_adapter(tmp_path / "b")
    assert [(rows.path, rows.indices) for rows in contents.tokens] == [("model.embed_tokens", (3, 1))]
    peft_adapter(llama(), tmp_path / "c", target_modules=["lm_head"])
    assert list(open_adapter(tmp_path / "c").replaced) == ["lm_head.weight"]


@pytest.mark.parametrize("use_rslora", [False, True])
def test_ranks_and_scalings_equal_those_of_peft(tmp_path: Path, use_rslora: bool):
    adapted = peft_adapter(
        llama(),
        tmp_path,
        target_modules="all-linear",
        use_rslora=use_rslora,
        rank_pattern={"q_proj": 4, "model.layers.1.mlp.(gate|down).*": 3, r"layers\.\d\.mlp\.up_proj": 5},
        alpha_pattern={"^model.layers.0.self_attn.k_proj": 7, "layers.1.self_attn.v_proj": 0.5},
    )
    updates = open_adapter(tmp_path).updates
    assert len({update.r for update in updates}) == 4
    for update in updates:
        layer = adapted.base_model.model.get_submodule(update.path)
        assert (update.r, update.scaling) == (layer.r["default"], layer.scaling["default"]), update.path


def test_unsupported_configs_are_refused(directory: Path):
    for values, message in (
        ({"peft_type": "LOHA"}, "peft_type is 'LOHA', want 'LORA'"),
        ({"use_qalora": True}, "use_qalora=True not supported"),
        ({"r": 3}, "the config gives it r=3"),
    ):
        edit_config(directory, **{"peft_type": "LORA", "use_qalora": False} | values)
        with pytest.raises(ValueError, match=message):
            open_adapter(directory)
