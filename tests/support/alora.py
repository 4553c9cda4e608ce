"""Models with adapters that act from an invocation on (aLoRA), prompts for them, and PEFT's counterparts."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path

import peft
import torch
from support.models import VOCABULARY, gpt2, llama, shaken
from torch import Tensor, nn

from lora_ext import LoraConfig, inject, save_adapter
from lora_ext.adapters import (
    unload,
)

TOKENS = [7, 8]
OTHERS = [9, 7, 9]
TARGETS = {"llama": ["q_proj", "k_proj", "v_proj", "down_proj", "lm_head"], "gpt2": ["c_attn", "c_proj"]}
MODELS: dict[str, Callable[[], nn.Module]] = {"llama": llama, "gpt2": gpt2}


def config(name: str = "llama", **options) -> LoraConfig:
    always = {"r": 4, "lora_alpha": 6, "target_modules": TARGETS[name], "init_lora_weights": False}
    always |= {"alora_invocation_tokens": TOKENS, "task_type": "CAUSAL_LM", "fan_in_fan_out": name == "gpt2"}
    return LoraConfig(**always | options)


def prompts(length: int = 9) -> tuple[Tensor, Tensor]:
    """Five rows and their mask: invocations early, late, twice, none, and at the very end; two rows are padded left."""
    ids, mask = torch.randint(10, VOCABULARY, (5, length)), torch.ones(5, length, dtype=torch.int64)
    for row, places in enumerate(([2], [4], [1, 5], [], [length - 2])):
        for place in places:
            ids[row, place : place + 2] = torch.tensor(TOKENS)
    ids[1, :3] = ids[3, :2] = mask[1, :3] = mask[3, :2] = 0
    return ids, mask


STARTS = [2, 4, 5, None, 7]


def theirs_of(model: nn.Module, directory: Path, *names: str) -> peft.PeftModel:
    """The same model with PEFT's adapters, read from our files."""
    base = unload(copy.deepcopy(model))
    for name in names:
        save_adapter(model, directory / name, name)
    theirs = peft.PeftModel.from_pretrained(base, directory / names[0], names[0], is_trainable=True)
    for name in names[1:]:
        theirs.load_adapter(directory / name, name)
    return theirs.eval()


def adapted(name: str = "llama", **options) -> nn.Module:
    return inject(MODELS[name](), config(name, **options)).eval()


def gradients(model: nn.Module, loss: Tensor) -> dict[str, Tensor]:
    """The gradients of the factors, by path and factor."""
    model.zero_grad(set_to_none=True)
    loss.backward()
    found = {}
    for path, parameter in model.named_parameters():
        if parameter.requires_grad:
            path = path.replace("base_model.model.", "").replace("adapters.default.", "").replace(".default.weight", "")
            found[path.replace(".default.bias", ".bias").replace("lora_bias", "lora_B.bias")] = parameter.grad
    return found


def assert_same(actual: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    assert actual.keys() == expected.keys() and len(expected) > 3
    for name, tensor in expected.items():
        torch.testing.assert_close(actual[name], tensor, rtol=1e-4, atol=2e-6, msg=name)


def generated(model: nn.Module, ids: Tensor, mask: Tensor, **options) -> tuple[Tensor, Tensor]:
    """The tokens and the logits of each step."""
    always = {"attention_mask": mask, "max_new_tokens": 4, "do_sample": False, "pad_token_id": 0}
    always |= {"output_logits": True, "return_dict_in_generate": True}
    result = model.generate(input_ids=ids, **always | options)
    return result.sequences, torch.stack(result.logits)


NAMES = ["alora", "other", "plain", "__base__", "alora"]


def with_three(**options) -> nn.Module:
    """An adapter for all tokens and two with different invocations."""
    model = inject(llama(), config(**options), "alora")
    inject(model, config(r=3, target_modules=["q_proj", "up_proj"], alora_invocation_tokens=OTHERS, **options), "other")
    everywhere = {"target_modules": ["v_proj", "embed_tokens"], "alora_invocation_tokens": None, "task_type": None}
    inject(model, config(r=2, **everywhere | options), "plain")
    return shaken(model).eval()


def mixed_prompts() -> tuple[Tensor, Tensor]:
    ids, mask = prompts()
    ids[1, 4:7] = torch.tensor(OTHERS)
    ids[2, 1:3], ids[2, 5:7] = 11, 12
    return ids, mask
