"""aLoRA: configs, models and calls that are refused, each by name."""

from __future__ import annotations

import json

import pytest
import torch
from support.alora import (
    STARTS,
    adapted,
    config,
    mixed_prompts,
    prompts,
    with_three,
)
from support.models import VOCABULARY, bert, llama, refused
from torch import Tensor, nn
from transformers import T5Config, T5ForConditionalGeneration

from lora_ext import AdapterPool, inject, merge, save_adapter, set_adapter
from lora_ext.adapters import (
    add_weighted_adapter,
    merge_and_unload,
    unload,
)
from lora_ext.checkpoints import merge as merge_checkpoint
from lora_ext.nn.rows.in_force import _current


@pytest.mark.parametrize(
    ("options", "error", "text"),
    [
        ({"task_type": None}, ValueError, 'set task_type="CAUSAL_LM"'),
        ({"task_type": "SEQ_CLS"}, ValueError, 'set task_type="CAUSAL_LM"'),
        ({"bias": "all"}, ValueError, "bias is 'all', which would act before the invocation too"),
        ({"target_parameters": ["w"]}, ValueError, "target_parameters"),
        ({"alora_invocation_tokens": [-1]}, ValueError, "entry -1, want token numbers, at least 0"),
        ({"alora_invocation_tokens": ["a"]}, TypeError, "entry 'a', want token numbers"),
        ({"alora_invocation_tokens": "ab"}, TypeError, "want a list of token numbers"),
        ({"alora_invocation_tokens": {1, 2}}, TypeError, "order matters"),
    ],
    ids=str,
)
def test_bad_configs(options, error, text):
    with pytest.raises(error, match="alora_invocation_tokens|aLoRA") as caught:
        config(**options)
    assert text in str(caught.value)


def test_no_tokens_are_off():
    assert config(alora_invocation_tokens=[]).alora_invocation_tokens is None


def test_bad_models():
    model = llama()
    with refused(model, TypeError, "embed_tokens", "adapts linear layers only"):
        inject(model, config(target_modules=["q_proj", "embed_tokens"]))
    with refused(model, ValueError, "[99], but the model's input embedding has 50"):
        inject(model, config(alora_invocation_tokens=[7, 99]))
    sizes = {"d_model": 16, "d_kv": 8, "d_ff": 24, "num_layers": 1, "num_heads": 2, "vocab_size": 50}
    model = T5ForConditionalGeneration(T5Config(**sizes))
    with refused(model, ValueError, "an encoder and a decoder"):
        inject(model, config(target_modules=["q"]))
    attention = nn.Sequential(nn.MultiheadAttention(8, 2))
    with refused(attention, TypeError, "adapts linear layers only"):
        inject(attention, config(target_modules=["out_proj"]))


def test_merging_is_refused(tmp_path):
    model = adapted()
    for call in (merge, merge_and_unload, lambda m: m.lm_head.merge()):
        with refused(model, ValueError, "'default' acts from its invocation tokens on (aLoRA)", "run it unmerged"):
            call(model)
    save_adapter(model, tmp_path / "adapter")
    unload(model).save_pretrained(tmp_path / "base")
    with pytest.raises(ValueError, match="acts from its alora_invocation_tokens on"):
        merge_checkpoint(tmp_path / "base", [tmp_path / "adapter"], tmp_path / "merged")
    assert not (tmp_path / "merged").exists()


def test_combinations():
    model, (ids, mask) = with_three(), mixed_prompts()
    with refused(model, ValueError, "different tokens", "alora_invocation_tokens"):
        add_weighted_adapter(model, ["alora", "plain"], [1, 1], "both", "cat")
    inject(model, config(r=2), "again")
    add_weighted_adapter(model, ["alora", "again"], [1.0, -1.0], "both", "cat")
    with torch.no_grad():
        both = model(ids, attention_mask=mask).logits
        set_adapter(model, [])
        plain = model(ids, attention_mask=mask).logits
    torch.testing.assert_close(both[0, :2], plain[0, :2])
    assert not torch.allclose(both[0, 2:], plain[0, 2:], atol=1e-4)


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        ({"inputs_embeds": torch.zeros(2, 3, 16)}, "no input_ids [rows, tokens]; pass them, or alora_offsets"),
        ({"alora_offsets": [1]}, "alora_offsets is [1], want a number or None for each of the 2 rows"),
        ({"alora_offsets": [1, -2]}, "alora_offsets has the entry -2"),
        ({"alora_offsets": [1, "a"]}, "alora_offsets has the entry 'a'"),
        ({"position_ids": torch.tensor([[0, 1, 2, 0, 1, 2]] * 2)}, "packed of several sequences"),
        (
            {"position_ids": torch.tensor([[0, 1, 2, 0, 1, 2]] * 2), "attention_mask": torch.ones(2, 6).long()},
            "packed of several sequences",
        ),
        ({"cu_seq_lens_q": torch.tensor([0, 3, 6])}, "packed of several sequences"),
    ],
    ids=str,
)
def test_bad_calls(arguments, text):
    model, ids = adapted(), torch.randint(10, VOCABULARY, (2, 6))
    inputs = {} if "inputs_embeds" in arguments else {"input_ids": ids}
    with refused(model, ValueError, text):
        model(**inputs, **arguments)
    assert _current.get() is None and model._lora_adapters.active.row_calls == 0
    mask, positions = torch.tensor([[0, 0, 1, 1, 1, 1]] * 2), torch.tensor([[1, 1, 0, 1, 2, 3]] * 2)
    assert model(ids, attention_mask=mask, position_ids=positions).logits.isfinite().all()


def test_calls_that_nothing_can_serve():
    model, (ids, mask) = with_three(), mixed_prompts()
    set_adapter(model, ["alora", "plain"])
    with refused(model, ValueError, "['alora', 'plain']", "activate it alone (set_adapter)"):
        model(ids)
    with refused(model, ValueError, "['alora', 'plain']"):
        model.generate(ids)
    set_adapter(model, "alora")
    with refused(model, RuntimeError, "'alora' acts from its invocation tokens on (aLoRA)", "call that"):
        model.model(ids)
    with refused(model, ValueError, "no input_ids"):
        model.generate(inputs_embeds=model.get_input_embeddings()(ids), max_new_tokens=2)
    merge(model, "plain")
    with refused(model, ValueError, "'plain' is merged into", "call unmerge(model) first"):
        model(ids, attention_mask=mask)


@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt])
def test_an_error_ends_the_choice(error):
    model, (ids, _) = adapted(), prompts()
    options = {"max_new_tokens": 2, "do_sample": False, "pad_token_id": 0}
    expected, tokens = model(ids).logits, model.generate(ids[:2], **options)

    def fail(*_):
        raise error("in the middle")

    handle = model.lm_head.register_forward_hook(fail)
    for call in (model, model.generate):
        with pytest.raises(error, match="in the middle"):
            call(ids)
    handle.remove()
    assert torch.equal(model.generate(ids[:2], **options), tokens)
    assert torch.equal(model(ids).logits, expected)
    assert _current.get() is None and model._lora_adapters.active.row_calls == 0


def test_a_layer_that_gets_other_tokens():
    class Halves(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.embed, self.one = nn.Embedding(VOCABULARY, 6), nn.Linear(6, 6)

        def forward(self, input_ids: Tensor, halve: bool = True) -> Tensor:
            x = self.embed(input_ids)
            return self.one(x[:, ::2] if halve else x.flatten(0, 1))

    model, (ids, _) = inject(Halves(), config(target_modules=["one"])), prompts()
    with refused(model, ValueError, "the shape [5, 5, 6], which is no [5, 9, features]", "target_modules"):
        model(ids)
    torch.testing.assert_close(
        model(ids, halve=False),
        model.one.base_layer(model.embed(ids)).flatten(0, 1)
        + (
            torch.stack([(torch.arange(9) >= (9 if s is None else s)) for s in STARTS]).flatten().unsqueeze(1)
            * (model.embed(ids).flatten(0, 1) @ model.one.delta_weight().T)
        ),
    )


@pytest.mark.parametrize("fullgraph", [False, True])
def test_compiled_models_refuse(fullgraph):
    model, (ids, _) = with_three(), mixed_prompts()
    set_adapter(model, "plain")
    plain = model(ids, use_cache=False).logits
    compiled = torch.compile(model, backend="eager", fullgraph=fullgraph)
    torch.testing.assert_close(compiled(ids, use_cache=False).logits, plain)
    set_adapter(model, "alora")
    with pytest.raises((ValueError, RuntimeError), match="aLoRA|refuse_invoked"):
        compiled(ids, use_cache=False)
    set_adapter(model, "plain")
    torch.testing.assert_close(compiled(ids, use_cache=False).logits, plain)
    torch._dynamo.reset()


def test_exported_models_refuse():
    model, (ids, _) = adapted(), prompts()
    with pytest.raises(Exception, match="aLoRA|refuse_invoked"):
        torch.export.export(model, (ids,), {"use_cache": False})


def test_encoders_need_another_config():
    with pytest.raises(ValueError, match="causal language models"):
        inject(bert(), config(target_modules=["query"], task_type="SEQ_CLS"))


def test_pools_refuse_tokens_that_the_model_cannot_have(tmp_path):
    model = llama().eval()
    pool = AdapterPool(model, tmp_path, target_modules=["q_proj"], r=4, max_bytes=2**20)
    source = inject(llama(), config(target_modules=["q_proj"]))
    save_adapter(source, tmp_path / "a")
    values = json.loads((tmp_path / "a/adapter_config.json").read_text())
    values["alora_invocation_tokens"] = [VOCABULARY + 5]
    (tmp_path / "a/adapter_config.json").write_text(json.dumps(values))
    wanted = f"alora_invocation_tokens has .*, but the model's input embedding has {VOCABULARY}"
    with pytest.raises(ValueError, match=wanted):
        model(torch.tensor([[1, 2]]), adapter_names=["a"])
    pool.close()


def test_tokens_without_values():
    model = adapted().to("meta")
    with pytest.raises(ValueError, match="input_ids, which have no values here; pass alora_offsets"):
        model(torch.ones(2, 4, dtype=torch.int64, device="meta"))
