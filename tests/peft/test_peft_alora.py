"""PEFT's aLoRA on our ops: the calls of the op, decoding, mixed batches, and what stays PEFT's."""

from __future__ import annotations

import peft
import pytest
import torch
from support.groups import watch_calls
from support.peft_pairs import alora_prompts, config, gradients, model_pair
from torch import Tensor, nn

from lora_ext.integrations.peft import accelerate

INVOKED = {"alora_invocation_tokens": [7, 8], "task_type": "CAUSAL_LM"}
NAMES = ["1", "default", "__base__", "2", "1"]
GENERATE = {"max_new_tokens": 4, "do_sample": False, "pad_token_id": 0}


@pytest.fixture
def calls(monkeypatch) -> list[tuple[int, ...]]:
    """The shapes of the groups that the calls of the op had."""
    shapes: list[tuple[int, ...]] = []
    watch_calls(monkeypatch, lambda call: shapes.append(tuple(call["group_of_row"].shape)))
    return shapes


@torch.no_grad()
def logits(models: tuple[nn.Module, nn.Module], ids: Tensor, mask: Tensor, **more) -> list[Tensor]:
    return [model(input_ids=ids, attention_mask=mask, **more).logits for model in models]


def tokens(models: tuple[nn.Module, nn.Module], ids: Tensor, mask: Tensor, **more) -> list[Tensor]:
    return [model.generate(input_ids=ids, attention_mask=mask, **GENERATE, **more) for model in models]


def test_the_op_is_called_with_a_group_for_each_token(calls):
    """With one row without an invocation, too."""
    models, (ids, mask) = model_pair("llama", **INVOKED), alora_prompts()
    for rows, masks in ((ids, mask), (ids[3:4], mask[3:4])):
        calls.clear()
        expected, actual = logits(models, rows, masks)
        torch.testing.assert_close(actual, expected)
        assert set(calls) == {(len(rows), 9)}
    with torch.autocast("cpu", torch.bfloat16):
        expected, actual = logits(models, ids, mask)
    torch.testing.assert_close(actual, expected, rtol=0.05, atol=0.03)


def test_decoding_runs_the_usual_forward(calls):
    models, (ids, mask) = model_pair("llama", **INVOKED), alora_prompts()
    assert torch.equal(*tokens(models, ids, mask)) and set(calls) == {(5, 9), (5, 1)}  # a row has no invocation
    calls.clear()
    rows, mask = ids[[0, 1, 2, 4]], mask[[0, 1, 2, 4]]
    assert torch.equal(*tokens(models, rows, mask)) and set(calls) == {(4, 9)}
    with pytest.raises(ValueError, match="Beam search not yet supported for aLoRA"):
        models[1].generate(input_ids=rows, num_beams=2, **GENERATE)


def test_mixed_batches(calls):
    models, (ids, mask) = model_pair("llama", **INVOKED), alora_prompts()
    for model in models:
        torch.manual_seed(3)
        model.add_adapter("1", config(target_modules=["q_proj", "up_proj"]))
        other = {"alora_invocation_tokens": [9, 7], "task_type": "CAUSAL_LM", "target_modules": ["v_proj"]}
        model.add_adapter("2", config(**other))
        model.eval()
    accelerate(models[1])
    ids[3, 4:6] = torch.tensor([9, 7])
    expected, actual = logits(models, ids, mask, adapter_names=NAMES)
    torch.testing.assert_close(actual, expected)
    assert (5, 9) in calls and (5,) in calls
    assert torch.equal(*tokens(models, ids, mask, adapter_names=NAMES))
    for model in models:
        model.base_model.set_adapter(["1", "default"])
    expected, actual = logits(models, ids, mask)
    torch.testing.assert_close(actual, expected)


@pytest.mark.parametrize("reentrant", [False, True])
def test_checkpointing(reentrant):
    (_, model), (ids, mask) = model_pair("llama", **INVOKED), alora_prompts()
    model.train().enable_input_require_grads()
    expected = gradients(model, lambda model: model(input_ids=ids, attention_mask=mask).logits)
    model.gradient_checkpointing_enable({"use_reentrant": reentrant})
    found = gradients(model, lambda model: model(input_ids=ids, attention_mask=mask).logits)
    torch.testing.assert_close(found, expected)


def test_what_stays_pefts():
    theirs, ours = model_pair("llama", **INVOKED)
    with pytest.raises(NotImplementedError, match="aLoRA does not support"):
        ours.merge_adapter()
    invoked = config(target_modules=["0"], alora_invocation_tokens=[1])
    plain = peft.get_peft_model(nn.Sequential(nn.Linear(4, 4)), invoked)
    x = torch.randn(2, 3, 4)
    torch.testing.assert_close(accelerate(plain)(x), plain.base_model.model[0].base_layer(x))  # nothing finds tokens
    embedded = ours.get_input_embeddings()(alora_prompts()[0])
    with pytest.warns(UserWarning, match="Disabling aLoRA"):
        torch.testing.assert_close(*(model(inputs_embeds=embedded).logits for model in (ours, theirs)))
