"""Replacing an adapter's values under compiled code."""

from __future__ import annotations

import copy

import peft
import pytest
import torch
from support.models import Net, bert, llama, refused, token_ids

from lora_ext import LoraConfig, inject, load_adapter, save_adapter
from lora_ext.adapters import lora_modules
from lora_ext.adapters.hotswap import hotswap_adapter, prepare_hotswap

ALIVE = {"init_lora_weights": False}


def saved(directory, base, **settings):
    """Saves an adapter of ``base``; returns the directory and the model's output with it."""
    model = inject(
        copy.deepcopy(base), LoraConfig(**{"target_modules": ["up", "down"], "lora_alpha": 5} | ALIVE | settings)
    )
    save_adapter(model, directory)
    return directory, model.eval()


OTHERS = [
    {"r": 2},
    {"r": 7, "use_rslora": True},
    {"r": 8, "lora_alpha": 3},
    {"r": 3, "target_modules": ["down"]},
    {"r": 2, "rank_pattern": {"up": 5}, "alpha_pattern": {r"blocks\.0\.down": 9}},
]


def test_swapping_under_compiled_code_never_recompiles(tmp_path):
    base, x = Net().eval(), torch.randn(5, 6)
    model = inject(copy.deepcopy(base), LoraConfig(r=4, target_modules=["up", "down"], lora_alpha=8, **ALIVE))
    before = model(x)
    assert prepare_hotswap(model, 8) is model
    torch.testing.assert_close(model(x), before)
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    with torch.no_grad():
        torch.testing.assert_close(compiled(x), before)
        parameters = [parameter.data_ptr() for parameter in model.parameters()]
        with torch.compiler.set_stance("fail_on_recompile"):
            for i, settings in enumerate([*OTHERS, *OTHERS[::-1]]):
                directory, other = saved(tmp_path / str(i), base, **settings)
                assert hotswap_adapter(compiled, directory) is compiled
                torch.testing.assert_close(compiled(x), other(x))
                torch.testing.assert_close(model(x), other(x))
    assert [parameter.data_ptr() for parameter in model.parameters()] == parameters


def test_a_padded_adapter_trains_and_its_file_computes_the_same(tmp_path):
    base, x = Net().eval().double(), torch.randn(5, 6, dtype=torch.float64)
    config = LoraConfig(r=2, target_modules=["up", "down"], rank_pattern={"down": 3}, alpha_pattern={"up": 5}, **ALIVE)
    plain, padded = inject(copy.deepcopy(base), config), None
    padded = prepare_hotswap(copy.deepcopy(plain), 6)
    for model in (plain, padded):
        optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=0.1)
        for _ in range(3):
            optimizer.zero_grad()
            model(x).square().sum().backward()
            optimizer.step()
    torch.testing.assert_close(padded(x), plain(x))
    for _, layer in lora_modules(padded):
        rank = 3 if layer.in_features == 10 else 2
        assert not layer.adapters.default.lora_A[rank:].any() and not layer.adapters.default.lora_B[:, rank:].any()
    save_adapter(padded, tmp_path)
    torch.testing.assert_close(load_adapter(copy.deepcopy(base), tmp_path)(x), plain(x))
    torch.testing.assert_close(peft.PeftModel.from_pretrained(copy.deepcopy(base), tmp_path).eval()(x), plain(x))


@pytest.mark.parametrize(
    "settings", [{"target_modules": ["word_embeddings", "dense"]}, {"target_modules": ["query"], "lora_bias": True}]
)
def test_files_of_peft_are_swapped(settings, tmp_path):
    base, ids = bert().double().eval(), token_ids()
    theirs = peft.get_peft_model(copy.deepcopy(base), peft.LoraConfig(r=3, lora_alpha=7, **settings, **ALIVE)).eval()
    with torch.no_grad():
        for parameter in theirs.parameters():
            if parameter.requires_grad:
                parameter.add_(0.1)
    theirs.save_pretrained(tmp_path)
    ours = inject(copy.deepcopy(base), LoraConfig(r=3, lora_alpha=3, **settings))
    hotswap_adapter(ours, tmp_path)
    torch.testing.assert_close(ours(input_ids=ids).logits, theirs(input_ids=ids).logits)


# --- bad input --------------------------------------------------------------------------------------------------------


@pytest.mark.filterwarnings("ignore:Setting `save_embedding_layers`")
def test_the_base_layer_in_a_file_of_peft_must_be_the_model_s(tmp_path):
    """PEFT saves the head below its adapter, too; a swap does not load it."""
    base, ids = llama().eval(), token_ids()
    config = LoraConfig(r=2, target_modules=["q_proj", "lm_head"], **ALIVE)
    theirs = peft.get_peft_model(copy.deepcopy(base), peft.LoraConfig(**config.to_dict())).eval()
    theirs.save_pretrained(tmp_path / "same")
    model = hotswap_adapter(inject(copy.deepcopy(base), config).eval(), tmp_path / "same")
    torch.testing.assert_close(model(ids).logits, theirs(ids).logits)
    with torch.no_grad():
        theirs.base_model.model.lm_head.base_layer.weight[3] += 1
    theirs.save_pretrained(tmp_path / "other")
    with refused(model, ValueError, "base layer base_model.model.lm_head.base_layer.weight: not the model's"):
        hotswap_adapter(model, tmp_path / "other")
    torch.testing.assert_close(load_adapter(model, tmp_path / "other")(ids).logits, theirs(ids).logits)
