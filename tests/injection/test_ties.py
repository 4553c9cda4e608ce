"""Modules that share one weight: which of them are tied, and which are not."""

from __future__ import annotations

import copy
import json
import pickle
import warnings

import peft
import pytest
import torch
from safetensors.torch import load_file, save_file
from support.merging import same_bits
from support.models import llama, logits, refused, token_ids
from torch import Tensor, nn
from transformers import T5Config, T5ForConditionalGeneration

from lora_ext import LoraConfig, inject, load_adapter, merge, save_adapter, set_adapter, unmerge
from lora_ext.adapters import (
    delete_adapter,
    merge_and_unload,
    merge_record_bytes,
    rename_adapter,
    trainable_parameter_counts,
    unload,
)
from lora_ext.nn import LoraEmbedding, LoraLinear

SETTINGS = {"r": 3, "lora_alpha": 6, "init_lora_weights": False, "ensure_weight_tying": True}
TIED = {"target_modules": ["q_proj", "embed_tokens"], **SETTINGS}
EMBEDDING = "model.embed_tokens.adapters.default"


def tied_llama(**settings) -> nn.Module:
    return inject(llama(tied=True).double().eval(), LoraConfig(**TIED | settings))


def both(model: nn.Module) -> tuple[LoraEmbedding, LoraLinear]:
    return model.model.embed_tokens, model.lm_head


def assert_tied(model: nn.Module, name: str = "default") -> None:
    """Checks that the layers share one adapter and compute with the same updated weight."""
    embedding, head = both(model)
    assert head.adapters[name].source is embedding.adapters[name]
    assert head.base_layer.weight is embedding.base_layer.weight
    x, ids = torch.randn(2, 16, dtype=embedding.weight.dtype), torch.tensor([[1, 7]])
    updated = embedding.weight + embedding.delta_weight(name)
    before = model.model.embed_tokens.active.names
    set_adapter(model, name)
    torch.testing.assert_close(embedding(ids), updated[ids])
    torch.testing.assert_close(head(x), x @ updated.T)
    set_adapter(model, before)


# --- ensure_weight_tying ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("targets", [["q_proj", "embed_tokens"], ["lm_head"], ["lm_head", "embed_tokens"]])
def test_the_head_has_the_embeddings_adapter(targets):
    model, apart = tied_llama(target_modules=targets), llama(tied=True)
    assert_tied(model)
    layers = inject(apart, LoraConfig(target_modules=["q_proj"] if "q_proj" in targets else ["embed_tokens"], r=3))
    factors = 3 * (50 + 16)
    expected = trainable_parameter_counts(layers)[0] + (factors if "q_proj" in targets else 0)
    assert trainable_parameter_counts(model)[0] == expected  # the shared parameters count once
    names = {name for name, _ in model.named_parameters() if "embed" in name or "head" in name}
    assert names == {f"{EMBEDDING}.lora_A", f"{EMBEDDING}.lora_B", "model.embed_tokens.base_layer.weight"}


def test_without_it_the_twin_does_not_see_the_adapter():
    model = tied_llama(ensure_weight_tying=False)
    assert isinstance(model.model.embed_tokens, LoraEmbedding) and type(model.lm_head) is nn.Linear
    model = tied_llama(ensure_weight_tying=False, target_modules=["embed_tokens", "lm_head"])
    embedding, head = both(model)
    assert not {id(p) for p in embedding.adapters.parameters()} & {id(p) for p in head.adapters.parameters()}
    text = "the weight of 'model.embed_tokens' is shared with 'lm_head.base_layer', which would change too"
    for operation in (merge, merge_and_unload):
        with refused(model, ValueError, text, "ensure_weight_tying=True, untie them", "or run unmerged"):
            operation(model)


def test_gradients_add_up_as_in_a_tied_weight():
    model, ids = tied_llama(), token_ids()
    adapter = model.model.embed_tokens.adapters.default
    factors = [adapter.lora_A, adapter.lora_B]
    grad = torch.randn(*ids.shape, 50, dtype=torch.float64)
    ours = torch.autograd.grad(logits(model, ids), factors, grad)
    weight = model.lm_head.weight + adapter.scaling * adapter.lora_A @ adapter.lora_B.T
    plain = copy.deepcopy(model)
    plain.model.embed_tokens, plain.lm_head = plain.model.embed_tokens.base_layer, plain.lm_head.base_layer
    names = {"model.embed_tokens.weight": weight, "lm_head.weight": weight}
    theirs = torch.func.functional_call(plain, names, (ids,)).logits
    for mine, expected in zip(ours, torch.autograd.grad(theirs, factors, grad), strict=True):
        torch.testing.assert_close(mine, expected)


@pytest.mark.parametrize("copier", [copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))])
def test_copies_stay_tied(copier):
    model, ids = tied_llama(), token_ids()
    twin = copier(model)
    assert_tied(twin)
    assert not {id(p) for p in twin.parameters()} & {id(p) for p in model.parameters()}
    nn.init.normal_(twin.model.embed_tokens.adapters.default.lora_A)
    assert_tied(twin)
    assert not torch.allclose(logits(twin, ids), logits(model, ids))
    twin.load_state_dict(model.state_dict())
    torch.testing.assert_close(logits(twin, ids), logits(model, ids), rtol=0, atol=0)
    assert_tied(twin.to(torch.float32))


@pytest.mark.parametrize("first", ["default", "other"])
def test_merging_changes_the_weight_once_and_unmerging_restores_every_bit(first):
    model, ids = tied_llama().to(torch.float32), token_ids()
    inject(model, LoraConfig(**TIED | {"r": 2}), "other")
    set_adapter(model, ["default", "other"])
    embedding, head = both(model)
    expected, before, x = logits(model, ids), head.weight.clone(), torch.randn(2, 16)
    deltas = {name: embedding.delta_weight(name) for name in ("default", "other")}
    torch.testing.assert_close([head.delta_weight(name) for name in deltas], list(deltas.values()))
    merge(model, first)
    torch.testing.assert_close(head.weight, before + deltas[first])
    merge(model, "other" if first == "default" else "default")
    assert {*embedding.merged_adapters} == {*head.merged_adapters} == {"default", "other"}
    torch.testing.assert_close(head.weight, before + sum(deltas.values()))
    torch.testing.assert_close(logits(model, ids), expected)
    assert torch.equal(head(x), head.base_layer(x))
    of_layers = [layer.self_attn.q_proj for layer in model.model.layers]
    assert merge_record_bytes(model) < sum(layer.merge_record_bytes for layer in (embedding, head, *of_layers))
    for merged in (model, pickle.loads(pickle.dumps(copy.deepcopy(model)))):
        unmerge(merged, first)
        assert len(merged.lm_head.merged_adapters) == 1
        unmerge(merged)
        assert same_bits(merged.lm_head.weight, before) and merged.lm_head.weight is merged.model.embed_tokens.weight
        torch.testing.assert_close(logits(merged, ids), expected, rtol=0, atol=0)
    merge_and_unload(model)
    assert type(model.lm_head) is nn.Linear and model.lm_head.weight is model.model.embed_tokens.weight
    torch.testing.assert_close(logits(model, ids), expected)


def test_merges_that_would_change_the_weight_for_one_layer_are_refused():
    model, ids = tied_llama(), token_ids()
    for layer in both(model):
        with refused(
            model, RuntimeError, "adapter 'default' is tied to that of another layer", "lora_ext.merge(model)"
        ):
            layer.merge()
    merge(model)
    for layer in both(model):
        with pytest.raises(RuntimeError, match=r"tied to that of another layer .* call lora_ext.unmerge\(model\)"):
            layer.unmerge()
    unmerge(model)
    inject(model, LoraConfig(target_modules=["lm_head"], r=2, init_lora_weights=False), "own")
    for names in (["own"], ["default", "own"]):
        with refused(model, ValueError, "the weight of ", " is shared with "):
            merge(model, names)
    merge(model, "default")
    with refused(model, ValueError, "the weight of 'lm_head' is shared with 'model.embed_tokens.base_layer'"):
        merge(model, "own")
    unmerge(model)
    delete_adapter(set_adapter(model, "default"), "own")

    model.lm_head.base_layer.weight = nn.Parameter(model.lm_head.weight.detach().clone())  # untied: the remedy
    before, expected = model.lm_head.weight.clone(), logits(model, ids)
    torch.testing.assert_close(logits(merge(model), ids), expected)
    unmerge(model)
    assert same_bits(model.lm_head.weight, before) and same_bits(model.model.embed_tokens.weight, before)


def test_operations_keep_the_tie():
    model, ids = tied_llama(), token_ids()
    expected = logits(model, ids)
    rename_adapter(model, "default", "first")
    assert_tied(model, "first")
    torch.testing.assert_close(logits(model, ids), expected)
    inject(model, LoraConfig(**TIED), "second")
    adapter = model.model.embed_tokens.adapters.first
    assert not adapter.lora_A.requires_grad
    set_adapter(model, "first")
    assert adapter.lora_A.requires_grad and model.lm_head.adapters.first.lora_B.requires_grad

    set_adapter(model, "second")
    delete_adapter(model, "first")
    assert_tied(model, "second")
    bare = llama(tied=True).double().eval()
    bare.load_state_dict(unload(model).state_dict())
    torch.testing.assert_close(logits(model, ids), logits(bare, ids))
    assert type(model.lm_head) is nn.Linear


class Encoder(nn.Module):
    """Two embeddings that share a weight, as in T5, and a module of another kind that shares it too."""

    def __init__(self, strange: bool = False) -> None:
        super().__init__()
        self.shared, self.inner = nn.Embedding(50, 16), nn.Embedding(50, 16)
        self.inner.weight = self.shared.weight
        if strange:
            self.strange = nn.Bilinear(1, 1, 1)
            self.strange.weight = self.shared.weight

    def get_input_embeddings(self) -> nn.Module:
        return self.shared

    def forward(self, ids: Tensor) -> Tensor:
        return self.shared(ids) + 2 * self.inner(ids)


def test_tied_embeddings():
    model, ids = Encoder(), token_ids()
    inject(model, LoraConfig(**{**SETTINGS, "target_modules": ["inner"]}))
    updated = model.shared.weight + model.shared.delta_weight()
    torch.testing.assert_close(model(ids), 3 * updated[ids])
    torch.testing.assert_close(merge(model.eval())(ids), 3 * updated[ids])
    model = Encoder(strange=True)
    with refused(model, TypeError, "strange (Bilinear): it shares the weight of 'shared'", "ensure_weight_tying=False"):
        inject(model, LoraConfig(**{**SETTINGS, "target_modules": ["shared"]}))


@pytest.mark.parametrize(
    ("saved", "ensure"), [(["lm_head"], True), (["embed_tokens"], True), (["lm_head", "embed_tokens"], False)]
)
def test_tied_modules_to_save_and_their_files_both_ways(saved, ensure, tmp_path):
    model, ids = llama(tied=True).double().eval(), token_ids()
    base, expected = copy.deepcopy(model), logits(model, ids)
    inject(model, LoraConfig(target_modules=["q_proj"], modules_to_save=saved, ensure_weight_tying=ensure, r=2))
    copies = model.lm_head.in_use, model.model.embed_tokens.in_use
    assert copies[0].weight is copies[1].weight is not model.lm_head.base_layer.weight
    torch.testing.assert_close(logits(model, ids), expected)
    nn.init.normal_(copies[0].weight)
    if ensure:
        save_adapter(model, tmp_path / "ours")
        theirs = peft.PeftModel.from_pretrained(copy.deepcopy(base), tmp_path / "ours").eval()
        torch.testing.assert_close(logits(theirs, ids), logits(model, ids))
        theirs.save_pretrained(tmp_path / "theirs")
        torch.testing.assert_close(logits(load_adapter(base, tmp_path / "theirs"), ids), logits(model, ids))
    weight = copies[0].weight
    merge_and_unload(model)
    assert model.lm_head.weight is model.model.embed_tokens.weight is weight


# --- files ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("targets", [["q_proj", "embed_tokens"], ["lm_head", "q_proj"]])
def test_files_of_tied_adapters_in_both_directions(targets, tmp_path):
    base, ids = llama(tied=True).double().eval(), token_ids()
    ours = inject(copy.deepcopy(base), LoraConfig(**TIED | {"target_modules": targets}))
    save_adapter(ours, tmp_path / "ours")
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message=".*(missing|unexpected|adapter key).*")
        theirs = peft.PeftModel.from_pretrained(copy.deepcopy(base), tmp_path / "ours").eval()
    torch.testing.assert_close(logits(theirs, ids), logits(ours, ids))

    theirs = peft.get_peft_model(copy.deepcopy(base), peft.LoraConfig(**TIED | {"target_modules": targets})).eval()
    with warnings.catch_warnings(action="ignore"):
        theirs.save_pretrained(tmp_path / "theirs")
    loaded = load_adapter(copy.deepcopy(base), tmp_path / "theirs")
    assert_tied(loaded)
    torch.testing.assert_close(logits(loaded, ids), logits(theirs, ids))
    save_adapter(loaded, tmp_path / "again")
    again, first = (load_file(tmp_path / name / "adapter_model.safetensors") for name in ("again", "theirs"))
    assert {key for key in first.keys() - again.keys() if not key.endswith("base_layer.weight")} == set()
    assert all(same_bits(tensor, first[key]) for key, tensor in again.items())
    load_adapter(ours, tmp_path / "theirs")  # replaces the present values
    assert_tied(ours)
    torch.testing.assert_close(logits(ours, ids), logits(theirs, ids))


def test_a_file_whose_tied_factors_differ(tmp_path):
    save_adapter(tied_llama(), tmp_path)
    file = tmp_path / "adapter_model.safetensors"
    tensors = load_file(file)
    tensors["base_model.model.lm_head.lora_B.weight"][1, 2] += 1
    save_file(tensors, file)
    model = llama(tied=True).double()
    with refused(
        model, ValueError, "lm_head.lora_B.weight", "tied to", "lora_embedding_A in the model, but they differ"
    ):
        load_adapter(model, tmp_path)


def t5() -> nn.Module:
    sizes = {"vocab_size": 50, "d_model": 16, "d_kv": 8, "d_ff": 24, "num_layers": 1, "num_heads": 2}
    return T5ForConditionalGeneration(T5Config(**sizes, decoder_start_token_id=0)).double().eval()


@pytest.mark.parametrize("targets", [["shared", "q"], r"shared|.*\.q"], ids=["list", "expression"])
def test_peft_ties_what_is_tied_to_an_embedding_that_it_does_not_know(targets, tmp_path):
    """PEFT ties nothing if only ``shared`` is named, so the file names the modules tied to it."""
    base, ids = t5(), token_ids()

    def outputs(model: nn.Module) -> Tensor:
        return model(input_ids=ids, decoder_input_ids=ids).logits

    ours = inject(copy.deepcopy(base), LoraConfig(**SETTINGS | {"target_modules": targets}))
    save_adapter(ours, tmp_path)
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message=".*(missing|unexpected|adapter key|ensure_weight_tying).*")
        theirs = peft.PeftModel.from_pretrained(copy.deepcopy(base), tmp_path).eval()
    torch.testing.assert_close(outputs(theirs), outputs(ours))
    again = load_adapter(copy.deepcopy(base), tmp_path)
    torch.testing.assert_close(outputs(again), outputs(ours))
    save_adapter(again, tmp_path / "again")
    first, second = ((path / "adapter_config.json").read_text() for path in (tmp_path, tmp_path / "again"))
    assert first == second
    torch.testing.assert_close(outputs(merge(ours)), outputs(theirs))


def test_files_name_the_saved_modules_that_are_tied(tmp_path):
    """PEFT 0.21 cannot run such a T5; without the names it would leave the trained weight out without a word."""
    base, ids = t5(), token_ids()
    settings = {"target_modules": ["q"], "modules_to_save": ["shared"]}
    ours = inject(copy.deepcopy(base), LoraConfig(**SETTINGS | settings))
    nn.init.normal_(ours.shared.in_use.weight)
    save_adapter(ours, tmp_path)
    names = json.loads((tmp_path / "adapter_config.json").read_text())["modules_to_save"]
    assert names == ["shared", "encoder.embed_tokens", "decoder.embed_tokens", "lm_head"]
    again = load_adapter(copy.deepcopy(base), tmp_path)
    actual, expected = (model(input_ids=ids, decoder_input_ids=ids).logits for model in (again, ours))
    torch.testing.assert_close(actual, expected)
