"""PEFT's aLoRA on our ops: PEFT's numbers, from its own search for the invocation tokens."""

from __future__ import annotations

from collections.abc import Callable

import peft
import pytest
import torch
from support.groups import watch_calls
from support.models import VOCABULARY
from support.peft_pairs import config, gradients, model_pair
from torch import Tensor, nn

from lora_ext.integrations.peft import accelerate, report, restore

TOKENS = [7, 8]
NAMES = ["1", "default", "__base__", "2", "1"]


@pytest.fixture
def calls(monkeypatch) -> list[tuple[int, ...]]:
    """The shapes of the groups that the calls of the op had."""
    shapes: list[tuple[int, ...]] = []
    watch_calls(monkeypatch, lambda call: shapes.append(tuple(call["group_of_row"].shape)))
    return shapes


def prompts() -> tuple[Tensor, Tensor]:
    ids, mask = torch.randint(10, VOCABULARY, (5, 9)), torch.ones(5, 9, dtype=torch.int64)
    for row, places in enumerate(([2], [4], [1, 5], [], [7])):
        for place in places:
            ids[row, place : place + 2] = torch.tensor(TOKENS)
    ids[1, :3] = mask[1, :3] = 0
    return ids, mask


def models(name: str = "llama", **options) -> tuple[nn.Module, nn.Module]:
    return model_pair(name, **{"alora_invocation_tokens": TOKENS, "task_type": "CAUSAL_LM"} | options)


def logits_of(ids: Tensor, mask: Tensor) -> Callable[[nn.Module], Tensor]:
    return lambda model: model(input_ids=ids, attention_mask=mask).logits


@pytest.mark.parametrize("options", [{}, {"lora_bias": True, "use_rslora": True}], ids=str)
@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_forward_and_gradients(name, options, calls):
    theirs, ours = models(name, **options)
    ids, mask = prompts()
    assert all(layer.accelerated for layer in report(ours)), report(ours)
    for rows in (ids, ids[3:4]):  # the second has no invocation
        expected = gradients(theirs, logits_of(rows, mask[: len(rows)]))
        assert not calls
        actual = gradients(ours, logits_of(rows, mask[: len(rows)]))
        assert set(calls) == {(len(rows), 9)}
        calls.clear()
        assert expected.keys() == actual.keys()
        for key, tensor in expected.items():
            torch.testing.assert_close(actual[key], tensor, rtol=1e-4, atol=2e-5 * tensor.abs().max().item())
    if not options:
        with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
            logits = [logits_of(ids, mask)(model) for model in (theirs, ours)]
        torch.testing.assert_close(logits[1], logits[0], rtol=0.05, atol=0.03)
    for reentrant in (True, False) if name == "llama" and not options else ():
        for model in (theirs, ours):
            model.train().gradient_checkpointing_enable({"use_reentrant": reentrant})
            model.enable_input_require_grads()
        expected, actual = (gradients(model, logits_of(ids, mask)) for model in (theirs, ours))
        for key, tensor in expected.items():
            torch.testing.assert_close(actual[key], tensor, rtol=1e-4, atol=2e-5 * tensor.abs().max().item())
    torch.testing.assert_close(restore(ours)(input_ids=ids).logits, theirs(input_ids=ids).logits)


def test_decoding_runs_the_usual_forward(calls):
    theirs, ours = models()
    ids, mask = prompts()
    options = {"max_new_tokens": 4, "do_sample": False, "pad_token_id": 0}
    tokens = [model.generate(input_ids=ids, attention_mask=mask, **options) for model in (theirs, ours)]
    assert torch.equal(*tokens) and set(calls) == {(5, 9), (5, 1)}  # a row has no invocation
    calls.clear()
    rows = ids[[0, 1, 2, 4]]
    tokens = [model.generate(input_ids=rows, attention_mask=mask[:4], **options) for model in (theirs, ours)]
    assert torch.equal(*tokens) and set(calls) == {(4, 9)}
    with pytest.raises(ValueError, match="Beam search not yet supported for aLoRA"):
        ours.generate(input_ids=rows, num_beams=2, **options)


def test_mixed_batches(calls):
    theirs, ours = models()
    for model in (theirs, ours):
        torch.manual_seed(3)
        model.add_adapter("1", config(target_modules=["q_proj", "up_proj"]))
        other = {"alora_invocation_tokens": [9, 7], "task_type": "CAUSAL_LM", "target_modules": ["v_proj"]}
        model.add_adapter("2", config(**other))
        model.eval()
    ours, (ids, mask) = accelerate(ours), prompts()
    ids[3, 4:6] = torch.tensor([9, 7])
    with torch.no_grad():
        logits = [model(input_ids=ids, attention_mask=mask, adapter_names=NAMES).logits for model in (theirs, ours)]
    torch.testing.assert_close(logits[1], logits[0])
    assert (5, 9) in calls and (5,) in calls
    options = {"max_new_tokens": 3, "do_sample": False, "pad_token_id": 0, "adapter_names": NAMES}
    assert torch.equal(*[model.generate(input_ids=ids, attention_mask=mask, **options) for model in (theirs, ours)])
    for model in (theirs, ours):
        model.base_model.set_adapter(["1", "default"])
    logits = [model(input_ids=ids, attention_mask=mask).logits for model in (theirs, ours)]
    torch.testing.assert_close(logits[1], logits[0])


def test_what_stays_pefts():
    theirs, ours = models()
    ids, _ = prompts()
    with pytest.raises(NotImplementedError, match="aLoRA does not support"):
        ours.merge_adapter()
    invoked = config(target_modules=["0"], alora_invocation_tokens=[1])
    plain = peft.get_peft_model(nn.Sequential(nn.Linear(4, 4)), invoked)
    x = torch.randn(2, 3, 4)
    torch.testing.assert_close(accelerate(plain)(x), plain.base_model.model[0].base_layer(x))  # nothing finds tokens
    embedded = ours.get_input_embeddings()(ids)
    with pytest.warns(UserWarning, match="Disabling aLoRA"):
        torch.testing.assert_close(*(model(inputs_embeds=embedded).logits for model in (ours, theirs)))
