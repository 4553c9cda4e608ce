"""Every kind of layer computes, trains, merges and saves what PEFT does, injected and accelerated."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import pytest
import torch
from support.attention import E, encoder
from support.mixtures import FAMILIES, IMPLEMENTATIONS, mixture
from support.models import Net, bert, gpt2, llama, token_ids
from support.peft_pairs import TARGETS, alora_prompts
from support.small_nets import CONVOLUTIONS, ConvNet, TextNet, input_of
from torch import Tensor, nn

from contracts.compare import compare

pytestmark = pytest.mark.cpu_only("makes its inputs on the CPU")


class Case(NamedTuple):
    """Options of the config and of ``compare`` for a model; ``known``: checks that differ, for the reason given."""

    make: Callable[[], nn.Module]
    options: dict[str, Any]
    x: Callable[[], Tensor | dict[str, Tensor]]
    known: str = ""
    dtype: torch.dtype = torch.float64


TOKENS = [7, 0, 31]  # not sorted; 0 is the padding


def ids() -> Tensor:
    ids = token_ids(3, 9)
    ids[:, ::3] = torch.tensor(TOKENS)
    return ids


def mlp(bias: bool = True) -> nn.Sequential:
    return nn.Sequential(nn.Linear(12, 20, bias), nn.Tanh(), nn.Linear(20, 8, bias))


def of_mlp(bias: bool = True, known: str = "", **options: Any) -> Case:
    options = {"target_modules": ["0", "2"]} | options
    return Case(lambda: mlp(bias), options, lambda: torch.randn(2, 5, 12).double(), known)


def of_convolution(name: str, **more: Any) -> Case:
    mergeable = "grouped" not in name and not (more and "bias" in CONVOLUTIONS[name][1])
    options = {"target_modules": ["conv", "head"]} | more
    return Case(lambda: ConvNet(name), options, lambda: input_of(name), "" if mergeable else "merge")


def of_tokens(tied: bool, indices: Any, known: str = "", **more: Any) -> Case:
    options = {"target_modules": ["q_proj"], "trainable_token_indices": indices} | more
    return Case(lambda: llama(tied), options, ids, known)


def of_model(make: Callable[[], nn.Module], known: str = "", **options: Any) -> Case:
    return Case(make, {"target_modules": TARGETS.get(make.__name__)} | options, ids, known)


def of_tied_weight(whole: str) -> Case:
    return of_model(lambda: llama(tied=True), target_modules=["q_proj"], modules_to_save=[whole])


def of_mica() -> Case:
    options = {"init_lora_weights": "mica", "target_modules": ["q_proj", "embed_tokens"], "doors": "accelerate"}
    return of_model(llama, "outputs", **options)._replace(dtype=torch.float32)  # it begins at zero


def of_alora(make: Callable[[], nn.Module], **more: Any) -> Case:
    invoked = {"alora_invocation_tokens": [7, 8], "task_type": "CAUSAL_LM", "doors": "accelerate"}
    case = of_model(make, "merge", **invoked | more)  # PEFT has no merge
    return case._replace(x=lambda: dict(zip(("input_ids", "attention_mask"), alora_prompts(), strict=True)))


def of_experts(family: str, *parameters: str, implementation: str = "eager", **more: Any) -> Case:
    pattern = {"rank_pattern": {"layers.1.mlp.experts.down_proj": 3}, "target_modules": ["q_proj"]}
    options = pattern | {"target_parameters": list(parameters)} | more
    # PyTorch has no grouped product in float64.
    dtype = torch.float32 if implementation == "grouped_mm" else torch.float64
    return Case(lambda: mixture(family, implementation), options, token_ids, dtype=dtype)


def of_attention(*targets: str) -> Case:
    options = {"target_modules": list(targets), "rank_pattern": {"layers.1.self_attn": 4}}
    # PyTorch's encoder in evaluation mode reads the weights. PEFT adds out_proj twice, and is not accelerated.
    options |= {"trains": True, "doors": "inject"}
    return Case(
        lambda: nn.Sequential(encoder(), nn.Linear(E, 3)),
        options,
        lambda: torch.randn(2, 5, E).double(),
        "training",
    )


EXPERTS = ["experts.down_proj", "experts.gate_up_proj"]
STATISTICS = {"target_modules": ["up", "down"], "modules_to_save": ["norm", "head"]}
TEXT = {"target_modules": ["tokens", "positions", "kinds"]}
RANKS = {"use_rslora": True, "rank_pattern": {"conv|positions": 2}, "r": 4}
DORA = {"use_dora": True, "lora_alpha": 10}
CASES = {
    "llama": of_model(llama),
    "gpt2": of_model(gpt2, fan_in_fan_out=True),
    "bert": of_model(bert),
    "embedding and head": of_model(llama, target_modules=["embed_tokens", "lm_head", "q_proj"]),
    "tied embedding": of_model(gpt2, "merge", target_modules=["wte", "c_attn"], fan_in_fan_out=True),  # refused here
    "rslora": of_mlp(use_rslora=True),
    "bias of the adapter": of_mlp(lora_bias=True),
    "no bias of the base": of_mlp(False, "merge", lora_bias=True),
    "negative alpha": of_mlp(doors="accelerate", lora_alpha=-3, lora_bias=True),
    "patterns": of_mlp(r=21, rank_pattern={"2": 1}, alpha_pattern={"0": 50}),
    "biases": of_mlp(bias="all"),
    "modules to save": of_mlp(modules_to_save=["2"], target_modules=["0"]),
    "statistics to save": Case(Net, STATISTICS, lambda: torch.randn(4, 6).double()),
    **{name: of_convolution(name) for name in CONVOLUTIONS},
    **{f"{name} with bias": of_convolution(name, lora_bias=True, **RANKS) for name in CONVOLUTIONS},
    "embedding": Case(TextNet, TEXT, ids),
    "embedding, ranks": Case(TextNet, TEXT | RANKS, ids),
    "embedding without dropout": Case(TextNet, TEXT | {"lora_dropout": 0.5, "trains": True}, ids),
    "dora": of_mlp(**DORA),
    "dora without biases": of_mlp(False, lora_dropout=0.3, trains=True, **DORA),
    "dora, dropout": of_model(llama, lora_dropout=0.3, trains=True, **DORA),  # PEFT's masks
    "dora, llama": of_model(llama, **DORA),
    "dora, gpt2": of_model(gpt2, fan_in_fan_out=True, **DORA),
    "dora, bert": of_model(bert, **DORA),
    "mica": of_mica(),
    "alora": of_alora(llama),
    "alora, gpt2": of_alora(gpt2, fan_in_fan_out=True, lora_bias=True, use_rslora=True),
    **{
        f"{family} {implementation}": of_experts(family, *EXPERTS, implementation=implementation)
        for family in FAMILIES
        for implementation in IMPLEMENTATIONS
    },
    "routers": of_experts("gpt_oss", *EXPERTS, "router.weight"),
    "gates": of_experts("mixtral", *EXPERTS, "gate.weight"),
    "one parameter": of_experts("mixtral", "experts.gate_up_proj"),
    "all-linear mixtral": of_experts("mixtral", target_modules="all-linear", target_parameters=None),
    "all-linear qwen3": of_experts("qwen3", target_modules="all-linear", target_parameters=None),
    "tied head in full": of_tied_weight("lm_head"),
    "tied embedding in full": of_tied_weight("embed_tokens"),
    "attention": of_attention("self_attn"),
    "attention and linear": of_attention("self_attn", "linear1"),
    "tokens": of_tokens(False, TOKENS),
    "tied tokens": of_tokens(True, TOKENS),
    "named tokens": of_tokens(True, {"embed_tokens": TOKENS}),
    "tokens of both": of_tokens(False, {"embed_tokens": [1, 2], "lm_head": [2, 5]}),
    # PEFT merges rows of a head into the embedding tied to it, too; and an update of the head is not merged here.
    "tokens of a tied head": of_tokens(True, {"lm_head": [3]}, "merge"),
    "tokens of both, tied": of_tokens(True, {"lm_head": [3], "embed_tokens": [4]}, "merge"),
    "tokens under a layer": of_tokens(True, TOKENS, "merge", target_modules=["q_proj", "lm_head"]),
}


# Cases that are much like another one, which make test-quick leaves out.
LIKE_OTHERS = {name for name in CASES if name.startswith(("qwen2", "deepseek_v2"))} | {"dora, bert", "dora, llama"}
LIKE_OTHERS |= {f"{family} {how}" for family in ("qwen3", "deepseek_v3") for how in IMPLEMENTATIONS[1:]}
LIKE_OTHERS |= {f"{name} with bias" for name in CONVOLUTIONS if name not in ("1d same", "2d", "3d", "2d grouped")}


@pytest.mark.full(but=3)
@pytest.mark.parametrize("name", [pytest.param(n, marks=[pytest.mark.full] * (n in LIKE_OTHERS)) for n in CASES])
def test_equal_to_peft(name):
    case = CASES[name]
    torch.manual_seed(0)
    differences = compare(case.make().to(case.dtype).eval(), case.x(), **case.options)
    assert differences.keys() == set(case.known.split()), differences
