"""PEFT's mixed batches (``adapter_names``) and aLoRA on our ops: its numbers, the calls of the op.

``make peft-conformance`` has PEFT's refusals, and batches of models with disabled adapters or DoRA.
"""

from __future__ import annotations

import peft
import pytest
import torch
from support.groups import watch_calls
from support.models import logits, token_ids
from support.peft_pairs import alora_prompts, assert_same_step, config, model_pair
from torch import Tensor, nn

from lora_ext.integrations.peft import accelerate, restore

NAMES = ["1", "default", "__base__", "2", "1"]


@pytest.fixture
def rows_added(monkeypatch) -> list[int]:
    """The numbers of adapters that the calls of the op had."""
    calls: list[int] = []
    watch_calls(monkeypatch, lambda call: calls.append(len(call["lora_As"])))
    return calls


def model_with_adapters(name: str, **options) -> tuple[nn.Module, nn.Module]:
    theirs, ours = model_pair(name, **options)
    first = theirs.peft_config["default"]
    for model in (theirs, ours):
        torch.manual_seed(3)
        more = {"target_modules": first.target_modules, "fan_in_fan_out": first.fan_in_fan_out} | options
        model.add_adapter("1", config(**more | {"r": 7, "lora_alpha": 3}))
        model.add_adapter("2", config(**more | {"r": 2, "target_modules": sorted(first.target_modules)[:1]}))
        model.eval()
    return theirs, accelerate(ours)


@pytest.mark.parametrize("name", ["llama", "gpt2", "bert"])
@pytest.mark.parametrize("options", [{}, {"lora_dropout": 0.3, "lora_bias": True}], ids=str)
def test_the_same_numbers(name, options, rows_added):
    theirs, ours = model_with_adapters(name, **options)
    ids = token_ids(5)
    assert_same_step(theirs, ours, lambda model: model(input_ids=ids, adapter_names=NAMES).logits)
    assert rows_added and set(rows_added) <= {2, 3}  # one call for each layer
    torch.testing.assert_close(logits(restore(ours), ids), logits(theirs, ids))


# --- aLoRA ------------------------------------------------------------------------------------------------------------


INVOKED = {"alora_invocation_tokens": [7, 8], "task_type": "CAUSAL_LM"}
GENERATE = {"max_new_tokens": 4, "do_sample": False, "pad_token_id": 0}


@pytest.fixture
def calls(monkeypatch) -> list[tuple[int, ...]]:
    """The shapes of the groups that the calls of the op had."""
    shapes: list[tuple[int, ...]] = []
    watch_calls(monkeypatch, lambda call: shapes.append(tuple(call["group_of_row"].shape)))
    return shapes


@torch.no_grad()
def both_logits(models: tuple[nn.Module, nn.Module], ids: Tensor, mask: Tensor, **more) -> list[Tensor]:
    return [model(input_ids=ids, attention_mask=mask, **more).logits for model in models]


def both_tokens(models: tuple[nn.Module, nn.Module], ids: Tensor, mask: Tensor, **more) -> list[Tensor]:
    return [model.generate(input_ids=ids, attention_mask=mask, **GENERATE, **more) for model in models]


def test_the_op_is_called_with_a_group_for_each_token(calls):
    """With one row without an invocation, too."""
    models, (ids, mask) = model_pair("llama", **INVOKED), alora_prompts()
    for rows, masks in ((ids, mask), (ids[3:4], mask[3:4])):
        calls.clear()
        expected, actual = both_logits(models, rows, masks)
        torch.testing.assert_close(actual, expected)
        assert set(calls) == {(len(rows), 9)}
    with torch.autocast("cpu", torch.bfloat16):
        expected, actual = both_logits(models, ids, mask)
    torch.testing.assert_close(actual, expected, rtol=0.05, atol=0.03)


def test_decoding_runs_the_usual_forward(calls):
    models, (ids, mask) = model_pair("llama", **INVOKED), alora_prompts()
    assert torch.equal(*both_tokens(models, ids, mask)) and set(calls) == {(5, 9), (5, 1)}  # a row has no invocation
    calls.clear()
    rows, mask = ids[[0, 1, 2, 4]], mask[[0, 1, 2, 4]]
    assert torch.equal(*both_tokens(models, rows, mask)) and set(calls) == {(4, 9)}
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
    expected, actual = both_logits(models, ids, mask, adapter_names=NAMES)
    torch.testing.assert_close(actual, expected)
    assert (5, 9) in calls and (5,) in calls
    assert torch.equal(*both_tokens(models, ids, mask, adapter_names=NAMES))
    for model in models:
        model.base_model.set_adapter(["1", "default"])
    expected, actual = both_logits(models, ids, mask)
    torch.testing.assert_close(actual, expected)


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
