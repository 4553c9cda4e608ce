"""Prefixes train in 16-bit models and with gradient checkpointing."""

from __future__ import annotations

import pytest
import torch
from support.models import token_ids
from test_methods import model_of

from lora_ext.methods import apply_method, new_method


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("name", ["prefix-embed", "prefix-layer"])
def test_parameters_stay_float32_in_16_bit_models(name, dtype):
    for family in ("bert", "llama", "gpt2"):
        model = apply_method(model_of(family).to(dtype), new_method(name, prefix_length=2))
        new = [p for path, p in model.named_parameters() if "special_tokens" in path or "prefix_states" in path]
        assert new and all(p.dtype == torch.float32 for p in new)
        output = model(token_ids(1, 5)).logits
        assert output.dtype == dtype
        output.sum().backward()
        assert all(p.grad.abs().sum() > 0 for p in new)


@pytest.mark.parametrize("name", ["prefix-embed", "prefix-layer"])
@pytest.mark.parametrize("family", ["bert", "gpt2", "llama"])
@pytest.mark.parametrize("reentrant", [False, True])
def test_gradient_checkpointing(family, name, reentrant):
    gradients = []
    for checkpointing in (False, True):
        model = apply_method(model_of(family).double(), new_method(name, prefix_length=2)).train()
        if checkpointing:
            model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": reentrant})
            model.enable_input_require_grads()
        torch.manual_seed(1)
        model(token_ids(2, 6), attention_mask=torch.ones(2, 6).long(), use_cache=False).logits.sum().backward()
        gradients.append({path: p.grad for path, p in model.named_parameters() if p.requires_grad})
    assert gradients[0].keys() == gradients[1].keys()
    for path, gradient in gradients[0].items():
        torch.testing.assert_close(gradients[1][path], gradient)
