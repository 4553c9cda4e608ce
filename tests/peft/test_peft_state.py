"""load_state_dict of an injected model takes the state of the same model with PEFT's layers."""

from __future__ import annotations

import copy
import functools

import peft
import pytest
import torch
from support.models import bert, gpt2, llama, token_ids

from lora_ext import LoraConfig, inject

CASES = {
    "llama": (llama, {"target_modules": ["q_proj", "down_proj"]}),
    "head": (bert, {"target_modules": ["query"], "modules_to_save": ["classifier"]}),
    "bias": (gpt2, {"target_modules": ["c_attn"], "lora_bias": True, "fan_in_fan_out": True}),
    "embedding": (llama, {"target_modules": ["embed_tokens"]}),
    "tied": (
        functools.partial(llama, tied=True),
        {"target_modules": ["embed_tokens", "lm_head"], "ensure_weight_tying": True},
    ),
    "tokens": (llama, {"target_modules": ["q_proj"], "trainable_token_indices": [3, 1]}),
}


@pytest.mark.parametrize("case", CASES)
def test_state_of_pefts_layers(case):
    make, options = CASES[case]
    base, ids = make().eval(), token_ids()
    theirs = peft.get_peft_model(copy.deepcopy(base), peft.LoraConfig(r=2, init_lora_weights=False, **options)).eval()
    with torch.no_grad():
        for name, parameter in theirs.named_parameters():
            if "modules_to_save" in name or "delta" in name:
                parameter.add_(torch.randn_like(parameter))
    ours = inject(make(), LoraConfig(r=2, **options)).eval()  # other base weights, too
    assert ours.load_state_dict(theirs.base_model.model.state_dict()) == ([], [])
    torch.testing.assert_close(ours(ids).logits, theirs(ids).logits)
