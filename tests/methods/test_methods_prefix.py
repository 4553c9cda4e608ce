"""Trained tokens and activations, compared with bare models that get them explicitly, and with PEFT."""

from __future__ import annotations

import copy

import peft
import pytest
import torch
from support.models import VOCABULARY, refused, shaken, token_ids
from test_methods import CONFIGS, D_MODEL, LAYERS, model_of
from torch import Tensor, nn
from transformers import (
    AutoModelForCausalLM,
    BertModel,
    GPT2LMHeadModel,
    LlamaForCausalLM,
    MistralForCausalLM,
    PreTrainedModel,
    RobertaModel,
    StaticCache,
)
from transformers.models.llama.modeling_llama import apply_rotary_pos_emb

from lora_ext.adapters import merge_and_unload
from lora_ext.methods import apply_method, new_method
from lora_ext.methods.architectures import architecture_of, base_model, layers_of
from lora_ext.methods.base import remove_inserted

BASES = {"bert": BertModel, "roberta": RobertaModel}
LANGUAGE_MODELS = {"gpt2": GPT2LMHeadModel, "llama": LlamaForCausalLM, "mistral": MistralForCausalLM}
EVERY = {**BASES, **LANGUAGE_MODELS}
NUM_PREFIX, NUM_INFIX = 2, 3


def new_model(family: str, implementation: str = "sdpa", **options) -> PreTrainedModel:
    """A model without a new head, in float64, so that the order of summation makes no difference."""
    torch.manual_seed(0)
    config = copy.deepcopy(CONFIGS[family])
    config._attn_implementation = implementation
    for name, value in options.items():
        setattr(config, name, value)
    return EVERY[family](config).double().eval()


def adapted(family: str, name: str, prefix_length: int, infix_length: int = 0, **options) -> PreTrainedModel:
    method = new_method(name, prefix_length=prefix_length, infix_length=infix_length)
    model = apply_method(new_model(family, **options), method)
    with torch.no_grad():  # large enough that all of them matter
        for path, parameter in model.named_parameters():
            if parameter.requires_grad:
                assert "special_tokens" in path or "prefix_states" in path, path
                parameter.normal_()
    return model


def padded(side: str) -> tuple[Tensor, Tensor]:
    """Three rows of seven tokens, the last two with padding."""
    ids, mask = token_ids(3, 7).clamp_min(2), torch.ones(3, 7, dtype=torch.long)
    for row, number in ((1, 2), (2, 4)):
        where = slice(0, number) if side == "left" else slice(7 - number, 7)
        ids[row, where], mask[row, where] = 1, 0
    return ids, mask


def output_of(model: nn.Module, **inputs) -> Tensor:
    with torch.no_grad():
        output = model(**inputs)
    return output.logits if "logits" in output else output.last_hidden_state


def cache_of(output):
    return output.cache if "cache" in output else output.past_key_values


def by_hand(model: PreTrainedModel, ids: Tensor, special: Tensor, num_prefix: int) -> Tensor:
    """Runs a bare model on one unpadded row with ``special`` inserted; returns the output without special positions.

    In an encoder the special tokens follow the first token, here also in memory.
    """
    front = 1 if "bert" in model.config.model_type else 0
    tokens = model.get_input_embeddings()(ids)
    parts = [tokens[:front], special[:num_prefix], tokens[front:], special[num_prefix:]]
    hidden = output_of(model, inputs_embeds=torch.cat(parts)[None])[0]
    text = torch.cat([hidden[:front], hidden[front + num_prefix : len(ids) + num_prefix]])
    if front == 0 and len(special) > num_prefix:
        text = torch.cat([text[:-1], hidden[-1:]])  # the last token's output comes from the end of the infix
    return text


@pytest.mark.pairs
@pytest.mark.parametrize("lengths", [(NUM_PREFIX, 0), (0, NUM_INFIX), (NUM_PREFIX, NUM_INFIX)])
@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("family", EVERY)
def test_embeddings_equal_those_inserted_by_hand(family, side, lengths):
    model, bare = adapted(family, "prefix-embed", *lengths), new_model(family)
    ids, mask = padded(side)
    special = base_model(model).special_tokens.weight
    assert special.shape == (sum(lengths), D_MODEL)
    outputs = output_of(model, input_ids=ids, attention_mask=mask)
    assert outputs.shape[:2] == ids.shape
    for row, real, output in zip(ids, mask.bool(), outputs, strict=True):
        torch.testing.assert_close(output[real], by_hand(bare, row[real], special.detach(), lengths[0]))


@pytest.mark.parametrize("family", EVERY)
def test_embeddings_with_all_forms_of_input(family):
    model = adapted(family, "prefix-embed", NUM_PREFIX, NUM_INFIX)
    ids = token_ids(2, 6).clamp_min(2)
    expected = output_of(model, input_ids=ids, attention_mask=torch.ones_like(ids))
    first = 2 if family == "roberta" else 0
    for inputs in (
        {"input_ids": ids},
        {"inputs_embeds": model.get_input_embeddings()(ids)},
        {"input_ids": ids, "position_ids": torch.arange(first, 6 + first)[None]},
        {"input_ids": ids, "attention_mask": torch.ones(2, 6, dtype=torch.bool)},
        {"input_ids": ids, "output_hidden_states": True},
    ):
        torch.testing.assert_close(output_of(model, **inputs), expected)
    with torch.no_grad():
        torch.testing.assert_close(model(ids)[0], expected)
        tuples = model(ids, return_dict=False, output_hidden_states=True)
        named = model(ids, output_hidden_states=True)
    torch.testing.assert_close(tuples[0], expected)
    assert [h.shape for h in named.hidden_states] == [(2, 6, D_MODEL)] * (LAYERS + 1)
    assert [h.shape for h in tuples[-1]] == [(2, 6, D_MODEL)] * (LAYERS + 1)


GENERATING = [("prefix-embed", 2, 0), ("prefix-embed", 0, 3), ("prefix-embed", 2, 3), ("prefix-layer", 2, 0)]


@pytest.mark.parametrize(("name", "num_prefix", "num_infix"), GENERATING)
@pytest.mark.parametrize("family", LANGUAGE_MODELS)
def test_generation_with_a_cache_equals_that_without(family, name, num_prefix, num_infix):
    """With an infix the results differ: a cache holds it between prompt and answer, without a cache it follows both.

    Then the cached run is compared with a bare model that gets the tokens in that order.
    """
    model, (ids, mask) = adapted(family, name, num_prefix, num_infix), padded("left")
    options = {"max_new_tokens": 5, "do_sample": False, "pad_token_id": 1, "eos_token_id": None}
    options |= {"output_logits": True, "return_dict_in_generate": True}
    cached = model.generate(input_ids=ids, attention_mask=mask, use_cache=True, **options)
    if num_infix == 0:
        plain = model.generate(input_ids=ids, attention_mask=mask, use_cache=False, **options)
        assert torch.equal(plain.sequences, cached.sequences)
        torch.testing.assert_close(torch.stack(cached.logits), torch.stack(plain.logits))
        return
    bare, special = new_model(family), base_model(model).special_tokens.weight.detach()
    for row, real, sequence, logits in zip(
        ids, mask.bool(), cached.sequences, torch.stack(cached.logits, 1), strict=True
    ):
        embed = bare.get_input_embeddings()
        parts = [special[:num_prefix], embed(row[real]), special[num_prefix:], embed(sequence[7:-1])]
        expected = output_of(bare, inputs_embeds=torch.cat(parts)[None])[0, -5:]
        torch.testing.assert_close(expected.float(), logits)  # generate returns float32


@pytest.mark.parametrize(
    ("family", "name", "num_prefix", "num_infix"),
    [("gpt2", *case) for case in GENERATING[:-1]] + [("llama", *case) for case in GENERATING],
)  # without positions GPT-2 counts padding as tokens, and prefix-layer does not change that
def test_continuing_from_a_cache_without_positions(family, name, num_prefix, num_infix):
    model, (ids, mask) = adapted(family, name, num_prefix, num_infix), padded("left")
    more = token_ids(3, 2).clamp_min(2)
    longer = torch.cat([mask, torch.ones_like(more)], 1)
    with torch.no_grad():
        first = model(input_ids=ids, attention_mask=mask, use_cache=True)
        second = model(input_ids=more, attention_mask=longer, past_key_values=cache_of(first)).logits
        alone = []
        for row, real, rest in zip(ids, mask.bool(), more, strict=True):
            first = model(input_ids=row[real][None], use_cache=True)
            alone.append(model(input_ids=rest[None], past_key_values=cache_of(first)).logits[0])
    torch.testing.assert_close(second, torch.stack(alone))


def with_activations(model: PreTrainedModel, ids: Tensor, states: list[Tensor]) -> Tensor:
    """Runs a bare model on one unpadded row after tokens whose input to every layer is given by ``states``."""
    number = len(states[0])
    embeds = nn.functional.pad(model.get_input_embeddings()(ids), (0, 0, number, 0))
    architecture, family = architecture_of(model, "test"), model.config.model_type
    first = 2 if family == "roberta" else 0
    positions = torch.cat([torch.arange(number), torch.arange(len(ids)) + (number if architecture.rotary else 0)])
    handles = []
    for (_, layer), prefix in zip(layers_of(model, architecture), states, strict=True):

        def replace(module, args, prefix=prefix):
            return (torch.cat([prefix[None], args[0][:, number:]], 1), *args[1:])

        handles.append(layer.register_forward_pre_hook(replace))
    mask = torch.ones_like(positions)[None]  # without one, Transformers takes a jump back for another packed text
    inputs = dict(inputs_embeds=embeds[None], attention_mask=mask, position_ids=positions[None] + first)
    try:
        return output_of(model, **inputs)[0, number:]
    finally:
        for handle in handles:
            handle.remove()


def states_of(model: PreTrainedModel) -> list[Tensor]:
    return [layer.prefix_states.weight.detach() for _, layer in layers_of(model, architecture_of(model, "test"))]


@pytest.mark.pairs
@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
@pytest.mark.parametrize("side", ["left", "right", "none"])
@pytest.mark.parametrize("family", EVERY)
def test_activations_equal_those_inserted_by_hand(family, side, implementation):
    model = adapted(family, "prefix-layer", NUM_PREFIX, implementation=implementation)
    bare = new_model(family, implementation)
    ids, mask = padded(side) if side != "none" else (token_ids(2, 7).clamp_min(2), torch.ones(2, 7).long())
    positions = (mask.cumsum(1) - 1).clamp_min(0) + (2 if family == "roberta" else 0)
    outputs = output_of(model, input_ids=ids, attention_mask=mask, position_ids=positions)
    assert outputs.shape[:2] == ids.shape
    for row, real, output in zip(ids, mask.bool(), outputs, strict=True):
        torch.testing.assert_close(output[real], with_activations(bare, row[real], states_of(model)))
    if side == "none":  # and without a mask or positions
        torch.testing.assert_close(output_of(model, input_ids=ids), outputs)


def test_activations_use_adapted_projections():
    method = new_method("lora+prefix-layer", prefix_length=NUM_PREFIX, r=2, target_modules="all-linear")
    model = shaken(apply_method(new_model("llama"), method), by=1.0)
    ids = token_ids(1, 7).clamp_min(2)
    outputs, states = output_of(model, input_ids=ids), states_of(model)
    remove_inserted(model)
    torch.testing.assert_close(outputs[0], with_activations(merge_and_unload(model), ids[0], states))


def test_prefix_and_infix_are_the_same_in_an_encoder():
    model, other = (adapted("bert", "prefix-layer", *lengths) for lengths in ((1, 2), (3, 0)))
    other.load_state_dict(model.state_dict())
    ids = token_ids(2, 6)
    torch.testing.assert_close(output_of(model, input_ids=ids), output_of(other, input_ids=ids))
    llama = new_model("llama")
    with refused(llama, ValueError, "infix_length is 3", "no token of a LlamaForCausalLM sees", "prefix-embed"):
        apply_method(llama, new_method("prefix-layer", infix_length=3))


@pytest.mark.parametrize("rope", [{}, {"rope_type": "dynamic", "factor": 2.0}, {"rope_type": "yarn", "factor": 4.0}])
def test_peft_prefix_tuning_has_the_same_keys_and_values(rope):
    """PEFT's are in a cache before the text, so the text's positions start after them."""
    if rope:
        rope = {"rope_parameters": {"rope_theta": 10000.0, "original_max_position_embeddings": 40, **rope}}
    model, bare = adapted("llama", "prefix-layer", NUM_PREFIX, **rope), new_model("llama", **rope)
    cosines, sines = bare.model.rotary_emb(bare.lm_head.weight, torch.arange(NUM_PREFIX)[None])
    both = []
    for layer, states in zip(bare.model.layers, states_of(model), strict=True):
        normed = layer.input_layernorm(states)[None, None]  # one key head: [batch, heads, tokens, head_dim]
        keys = layer.self_attn.k_proj(normed)
        both += [apply_rotary_pos_emb(keys, keys, cosines, sines)[1], layer.self_attn.v_proj(normed)]
    theirs = peft.get_peft_model(bare, peft.PrefixTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=NUM_PREFIX))
    weight = torch.cat(both)[:, 0].transpose(0, 1).reshape(NUM_PREFIX, -1)
    theirs.prompt_encoder["default"].embedding.weight = nn.Parameter(weight.detach())
    ids = token_ids(2, 6).clamp_min(2)
    expected = output_of(theirs.eval(), input_ids=ids, attention_mask=torch.ones_like(ids))
    torch.testing.assert_close(output_of(model, input_ids=ids), expected)


def test_a_static_cache_holds_no_prefix():
    model, ids = adapted("llama", "prefix-layer", NUM_PREFIX), token_ids(2, 5).clamp_min(2)
    cache = StaticCache(config=model.config, max_cache_len=9)
    with torch.no_grad():
        first = model(input_ids=ids, past_key_values=cache, use_cache=True).logits
        more = model(input_ids=ids[:, :2], past_key_values=cache, use_cache=True).logits
    assert int(cache.get_seq_length()) == 7
    expected = output_of(model, input_ids=torch.cat([ids, ids[:, :2]], 1))
    torch.testing.assert_close(torch.cat([first, more], 1), expected)


def test_unsupported_attention_implementations_are_refused():
    model = new_model("llama")
    model.config._attn_implementation = "flash_attention_2"
    with refused(model, ValueError, "'flash_attention_2'", "sdpa, eager", "set_attn_implementation"):
        apply_method(model, new_method("prefix-layer"))
    model.config._attn_implementation = "sdpa"
    apply_method(model, new_method("prefix-layer"))
    model.config._attn_implementation = "flex_attention"
    with refused(model, ValueError, "'flex_attention'", "sdpa, eager"):
        model(inputs_embeds=torch.zeros(1, 2, D_MODEL).double(), attention_mask=torch.ones(1, 1, 2, 2).double())


def test_unsupported_inputs_with_embeddings_are_refused():
    model, ids = adapted("gpt2", "prefix-embed", NUM_PREFIX, NUM_INFIX), token_ids(1, 36)
    with refused(model, ValueError, "36 tokens and 5 special ones", "GPT2Model has 40 positions", "shorten", "to 35"):
        model(ids)
    for mask, given in ((torch.ones(1, 1, 6, 6), "[1, 1, 6, 6]"), ({}, "a dict"), (torch.ones(1, 5), "[1, 5]")):
        with refused(model, ValueError, f"attention_mask is {given}", "[1, 6]", "dynamic cache"):
            model(ids[:, :6], attention_mask=mask)
    for both in ({"input_ids": ids[:, :6], "inputs_embeds": torch.ones(1, 6, D_MODEL).double()}, {}):
        with refused(model, ValueError, "specify"):  # the model's refusals
            model.transformer(**both)
    with torch.no_grad():
        cache = cache_of(model(ids[:, :33], use_cache=True))
        model(ids[:, :2], past_key_values=cache)
    with refused(model, ValueError, "36 tokens and 5 special ones"):
        model(ids[:, :1], past_key_values=cache)
    roberta = adapted("roberta", "prefix-embed", NUM_PREFIX)
    output_of(roberta, input_ids=ids)
    with refused(roberta, ValueError, "37 tokens and 2 special ones", "38 positions", "to 36 tokens"):
        roberta(token_ids(1, 37))


@pytest.mark.parametrize("name", ["prefix-embed", "prefix-layer"])
def test_decoders_of_encoders_are_refused(name):
    config = copy.deepcopy(CONFIGS["bert"])
    config.is_decoder = True
    decoder = AutoModelForCausalLM.from_config(config)
    with refused(decoder, TypeError, "is_decoder=True"):
        apply_method(decoder, new_method(name))


def test_initial_values_are_tokens_that_are_not_special():
    model = new_model("llama", pad_token_id=1, bos_token_id=2, eos_token_id=[3, 4])
    apply_method(model, new_method("prefix-embed", prefix_length=400))
    rows, table = base_model(model).special_tokens.weight, model.get_input_embeddings().weight
    ids = (rows[:, None] == table).all(-1).int().argmax(1)
    assert torch.equal(table[ids], rows)
    assert set(ids.tolist()) == set(range(VOCABULARY)) - {1, 2, 3, 4}


@pytest.mark.full
@pytest.mark.parametrize(
    ("family", "name"), [("bert", "prefix-layer"), ("gpt2", "prefix-embed"), ("llama", "prefix-layer")]
)
def test_compiled_in_one_graph(family, name):
    model = adapted(family, name, NUM_PREFIX)
    ids, mask = padded("right")
    expected = output_of(model, input_ids=ids, attention_mask=mask)
    compiled = torch.compile(base_model(model), fullgraph=True, backend="eager")
    with torch.no_grad():
        hidden = compiled(input_ids=ids, attention_mask=mask, use_cache=False).last_hidden_state
        actual = model.get_output_embeddings()(hidden) if family in LANGUAGE_MODELS else hidden
    torch.testing.assert_close(actual, expected)


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
    torch.testing.assert_close(*gradients)
