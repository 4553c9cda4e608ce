"""What PEFT computes from our files, and we from PEFT's, for each kind of layer: outputs, gradients, merged weights."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import peft
import pytest
import torch
from safetensors.torch import load_file
from support.attention import E, encoder
from support.mixtures import mixture
from support.models import bert, gpt2, llama, token_ids
from support.small_nets import CONVOLUTIONS, ConvNet, TextNet, input_of
from torch import Tensor, nn

from lora_ext import LoraConfig, inject, load_adapter, merge, save_adapter

ALIVE = {"r": 4, "lora_alpha": 6, "init_lora_weights": False}


class Case(NamedTuple):
    make: Callable[[], nn.Module]
    options: dict[str, Any]
    x: Callable[[], Tensor]
    merges: bool = True  # into weights that PEFT merges into, too
    has_gradients: bool = True  # that are PEFT's


TOKENS = [7, 0, 31]  # not sorted; 0 is the padding


def ids() -> Tensor:
    ids = token_ids(3, 9)
    ids[:, ::3] = torch.tensor(TOKENS)
    return ids


def of_convolution(name: str, **more: Any) -> Case:
    mergeable = "grouped" not in name and not (more and "bias" in CONVOLUTIONS[name][1])
    options = {"target_modules": ["conv", "head"]} | more
    return Case(lambda: ConvNet(name), options, lambda: input_of(name), mergeable)


def of_tokens(tied: bool, indices: Any, **more: Any) -> Case:
    options = {"target_modules": ["q_proj"], "trainable_token_indices": indices} | more
    return Case(lambda: llama(tied), options, ids, False)


def of_dora(make: Callable[[], nn.Module], targets: list[str], **more: Any) -> Case:
    return Case(make, {"target_modules": targets, "use_dora": True} | more, ids)


def of_experts(family: str, *parameters: str) -> Case:
    pattern = {"rank_pattern": {"layers.1.mlp.experts.down_proj": 3}, "target_modules": ["q_proj"]}
    return Case(lambda: mixture(family), pattern | {"target_parameters": list(parameters)}, token_ids, False)


def of_attention(*targets: str) -> Case:
    options = {"target_modules": list(targets), "rank_pattern": {"layers.1.self_attn": 4}, "r": 2}
    return Case(encoder, options, lambda: torch.randn(2, 5, E).double(), False, False)  # PEFT adds out_proj twice


TEXT = {"target_modules": ["tokens", "positions", "kinds"]}
RANKS = {"use_rslora": True, "rank_pattern": {"conv|positions": 2}}
CASES = {
    **{name: of_convolution(name) for name in CONVOLUTIONS},
    **{f"{name} with bias": of_convolution(name, lora_bias=True, **RANKS) for name in CONVOLUTIONS},
    "embedding": Case(TextNet, TEXT, ids),
    "embedding, ranks": Case(TextNet, TEXT | RANKS, ids),
    "embedding, dropout": Case(TextNet, TEXT | {"lora_dropout": 0.5}, ids),  # which embeddings ignore, as in PEFT
    "dora llama": of_dora(llama, ["q_proj", "v_proj", "down_proj"]),
    "dora gpt2": of_dora(gpt2, ["c_attn", "c_proj"]),
    "dora, dropout": of_dora(llama, ["q_proj", "down_proj"], lora_dropout=0.3),
    "dora bert": of_dora(bert, ["query", "dense"]),
    "mixtral": of_experts("mixtral", "experts.down_proj", "experts.gate_up_proj", "gate.weight"),
    "gpt_oss": of_experts("gpt_oss", "experts.down_proj", "experts.gate_up_proj", "router.weight"),
    "one parameter": of_experts("mixtral", "experts.gate_up_proj"),
    "attention": of_attention("self_attn"),
    "attention and linear": of_attention("self_attn", "linear1"),
    "tokens": of_tokens(False, TOKENS),
    "tied tokens": of_tokens(True, TOKENS),
    "named tokens": of_tokens(True, {"embed_tokens": TOKENS}),
    "tokens of both": of_tokens(False, {"embed_tokens": [1, 2], "lm_head": [2, 5]}),
    "tokens of a tied head": of_tokens(True, {"lm_head": [3]}),
    "tokens of both, tied": of_tokens(True, {"lm_head": [3], "embed_tokens": [4]}),
    "tokens under a layer": of_tokens(True, TOKENS, target_modules=["q_proj", "lm_head"]),
}


def with_settings_that_peft_drops(model: nn.Module) -> nn.Module:
    for layer in model.modules():
        if hasattr(layer, "lora_A") and isinstance(getattr(layer, "base_layer", None), nn.modules.conv._ConvNd):
            for convolution in layer.lora_A.values():
                for setting in ("dilation", "padding_mode", "_reversed_padding_repeated_twice"):
                    setattr(convolution, setting, getattr(layer.base_layer, setting))
    return model


def output(model: nn.Module, x: Tensor) -> Tensor:
    torch.manual_seed(3)
    y = model(x)
    return getattr(y, "logits", y)


def file_of(directory: Path) -> dict[str, Tensor]:
    return load_file(directory / "adapter_model.safetensors")


def with_gradients_as_values(model: nn.Module, y: Tensor) -> nn.Module:
    y.pow(3).mean().backward()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.copy_(parameter.grad)
    return model


def frozen_weights(model: nn.Module) -> dict[str, Tensor]:
    state = {key.removeprefix("base_model.model."): value for key, value in model.state_dict().items()}
    return {key: value for key, value in state.items() if ".base_layer." in key}


@pytest.mark.parametrize("name", CASES)
def test_files_outputs_gradients_and_merged_weights_are_pefts(name, tmp_path):
    case = CASES[name]
    base, x = case.make().double(), case.x()
    ours = inject(copy.deepcopy(base), LoraConfig(**ALIVE | case.options))
    with torch.no_grad():
        for path, parameter in ours.named_parameters():
            if path.endswith(("lora_bias", "rows", "magnitude_vector")):  # that have the values of the base layer
                parameter.add_(torch.randn_like(parameter) / 3)
    save_adapter(ours, tmp_path / "ours")
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message=".*(missing|unexpected|adapter key).*")
        warnings.filterwarnings("ignore", message=".*(groups > 1|has no bias).*")
        theirs = peft.PeftModel.from_pretrained(copy.deepcopy(base), tmp_path / "ours", is_trainable=True)
    with_settings_that_peft_drops(theirs)
    outputs = [output(model.train(), x) for model in (ours, theirs)]
    torch.testing.assert_close(*outputs)
    assert (outputs[0] - output(base.train(), x)).abs().max() > 1e-3

    theirs.save_pretrained(tmp_path / "theirs")
    files = [file_of(tmp_path / which) for which in ("ours", "theirs")]
    torch.testing.assert_close(*files, rtol=0, atol=0)
    again = load_adapter(copy.deepcopy(base), tmp_path / "theirs").train()
    torch.testing.assert_close(output(again, x), outputs[0])
    if case.merges:
        merge(again.eval())
        merged = copy.deepcopy(theirs)
        merged.merge_adapter()
        torch.testing.assert_close(frozen_weights(again), frozen_weights(merged))

    if case.has_gradients:
        save_adapter(with_gradients_as_values(ours, outputs[0]), tmp_path / "ours")
        with_gradients_as_values(theirs, outputs[1]).save_pretrained(tmp_path / "theirs")
        files = [file_of(tmp_path / which) for which in ("ours", "theirs")]
        torch.testing.assert_close(*files)
        assert all(gradient.any() for key, gradient in files[0].items() if "token_adapter" not in key)
