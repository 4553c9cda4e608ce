"""Trained rows of embeddings, against PEFT and against a model with those rows."""

from __future__ import annotations

import copy
import pickle

import peft
import pytest
import torch
from safetensors.torch import load_file
from support.layers import relative_error
from support.merging import same_bits
from support.models import VOCABULARY, llama, logits, refused, token_ids
from support.small_nets import TextNet
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from lora_ext import LoraConfig, inject, load_adapter, merge, save_adapter, set_adapter
from lora_ext.adapters import (
    adapter_status,
    delete_adapter,
    disable_adapters,
    merge_and_unload,
    rename_adapter,
    trainable_parameter_counts,
    unload,
)
from lora_ext.nn import LoraLinear
from lora_ext.nn.trainable_tokens import TokenRows, TrainableTokens

TOKENS = [7, 0, 31]  # not sorted; 0 is the padding of TextNet
ALIVE = {"r": 2, "lora_alpha": 8, "init_lora_weights": False, "target_modules": ["q_proj"]}


def tuned(tied: bool, **settings) -> nn.Module:
    """A model with trained rows that differ from the weight's."""
    config = LoraConfig(**ALIVE | {"trainable_token_indices": TOKENS} | settings)
    return shaken(inject(llama(tied).double().eval(), config))


def shaken(model: nn.Module) -> nn.Module:
    with torch.no_grad():
        for module in model.modules():
            if isinstance(module, TokenRows):
                module.rows.add_(torch.randn_like(module.rows))
    return model


def ids_with_tokens() -> Tensor:
    ids = token_ids(3, 9)
    ids[:, ::3] = torch.tensor(TOKENS)
    return ids


# --- against PEFT -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "options", [{"trainable_token_indices": TOKENS}, {"target_modules": ["embed_tokens", "q_proj"]}]
)
def test_pefts_files_may_hold_the_embedding(options, tmp_path):
    base, ids = llama(True).double().eval(), ids_with_tokens()
    theirs = peft.get_peft_model(copy.deepcopy(base), peft.LoraConfig(**ALIVE | options)).eval()
    for name, parameter in theirs.named_parameters():
        if "tokens_delta" in name:
            nn.init.normal_(parameter)
    theirs.save_pretrained(tmp_path, save_embedding_layers=True)
    ours = load_adapter(copy.deepcopy(base), tmp_path)
    torch.testing.assert_close(logits(ours, ids), logits(theirs, ids))
    save_adapter(ours, tmp_path / "again")
    again = load_file(tmp_path / "again" / "adapter_model.safetensors")
    first = load_file(tmp_path / "adapter_model.safetensors")
    assert again.keys() == first.keys()  # the frozen table, too
    assert all(same_bits(tensor, first[key]) for key, tensor in again.items())
    load_adapter(ours, tmp_path)  # replaces the present values


def test_lora_on_the_tied_head_with_trained_rows():
    ours = tuned(True, target_modules=["q_proj", "lm_head"])
    assert isinstance(ours.lm_head, TrainableTokens) and isinstance(ours.lm_head.base_layer, LoraLinear)
    unload(ours)
    assert type(ours.lm_head) is nn.Linear


# --- without PEFT -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("tied", [False, True])
def test_starts_as_the_model_and_trains_only_the_rows(tied):
    model, ids = llama(tied).double().eval(), ids_with_tokens()
    expected = logits(model, ids)
    inject(model, LoraConfig(target_modules=["q_proj"], trainable_token_indices=TOKENS, r=2))
    torch.testing.assert_close(logits(model, ids), expected)
    trainable = {name for name, p in model.named_parameters() if p.requires_grad and "q_proj" not in name}
    assert trainable == {"model.embed_tokens.adapters.default.rows"}
    assert trainable_parameter_counts(model)[1] == trainable_parameter_counts(llama(tied))[1] + 3 * 16 + 2 * 2 * 2 * 16
    status = {entry.layer: entry for entry in adapter_status(model)}["model.embed_tokens"]
    assert status.kind == "TrainableTokens" and status.r is None


def test_scaled_embeddings_and_padding():
    config = LoraConfig(target_modules=["head"], trainable_token_indices={"tokens": TOKENS}, r=2)
    model, ids = shaken(inject(TextNet().double(), config)), ids_with_tokens()
    layer, plain = model.tokens, copy.deepcopy(model.tokens.base_layer)
    weight = layer.weight
    torch.testing.assert_close(layer(ids), torch.func.functional_call(plain, {"weight": weight}, (ids,)))
    layer(ids).sum().backward()
    gradient = layer.adapters.default.rows.grad
    assert not gradient[TOKENS.index(0)].any() and gradient[TOKENS.index(7)].any()
    assert layer.padding_idx == 0 and layer.num_embeddings == VOCABULARY  # attributes of the embedding


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_16_bits_are_as_good_as_plain_pytorch(dtype):
    base = nn.Linear(64, 40, bias=False, dtype=dtype)
    layer = TrainableTokens(base)
    layer.add_adapter("default", TokenRows(base.weight, (3, 20)))
    layer.set_active("default")
    rows = layer.adapters.default.rows
    nn.init.normal_(rows, std=0.1)
    assert rows.dtype == torch.float32
    x, grad = torch.randn(200, 64).to(dtype), torch.randn(200, 40).to(dtype)

    def plain(kind: torch.dtype) -> list[Tensor]:
        trained = rows.detach().to(torch.promote_types(kind, torch.float32)).requires_grad_()
        weight = base.weight.to(kind).index_copy(0, layer.adapters.default.index, trained.to(kind))
        y = x.to(kind) @ weight.T
        return [y[:, [3, 20]], y, *torch.autograd.grad(y, trained, grad.to(kind))]

    y = layer(x)
    ours = [y[:, [3, 20]], y, *torch.autograd.grad(y, rows, grad)]
    for mine, exact, theirs in zip(ours, plain(torch.float64), plain(dtype), strict=True):
        assert relative_error(mine, exact) <= 2 * relative_error(theirs, exact)


def test_adapters_by_name():
    model, ids = tuned(True), ids_with_tokens()
    weight, first = model.lm_head.inner_layer.weight.clone(), logits(model, ids)
    inject(model, LoraConfig(**ALIVE | {"trainable_token_indices": [7, 8]}), "other")
    set_adapter(model, ["default", "other"])
    for read in (lambda: logits(model, ids), lambda: model.lm_head.weight):
        with pytest.raises(ValueError, match=r"\['default', 'other'\] train rows for the tokens \[7\]; use one"):
            read()
    rename_adapter(shaken(set_adapter(model, "other")), "other", "renamed")
    assert model.lm_head.adapters.renamed.source is model.model.embed_tokens.adapters.renamed
    changed = (model.lm_head.weight != weight).any(1).nonzero().flatten()
    assert changed.tolist() == [7, 8]
    with disable_adapters(model):
        assert torch.equal(model.lm_head.weight, weight)
    set_adapter(model, "default")
    assert not torch.allclose(logits(model, ids), first)  # shaken again
    delete_adapter(model, "renamed")
    inject(model, LoraConfig(**ALIVE), "plain")
    delete_adapter(model, "default")
    assert type(model.lm_head) is nn.Linear and type(model.model.embed_tokens) is nn.Embedding


def test_rows_of_several_active_adapters():
    model = tuned(True)
    inject(model, LoraConfig(**ALIVE | {"trainable_token_indices": [8]}), "other")
    set_adapter(model, ["default", "other"])
    embedding, head = model.model.embed_tokens, model.lm_head
    weight = embedding.inner_layer.weight.clone()
    weight[TOKENS], weight[8] = embedding.adapters.default.rows, embedding.adapters.other.rows[0]
    x, ids = torch.randn(2, 16, dtype=torch.float64), torch.tensor([[8, 7, 3]])
    torch._dynamo.reset()
    for run in (lambda layer: layer, lambda layer: torch.compile(layer, fullgraph=True, backend="aot_eager")):
        torch.testing.assert_close(run(embedding)(ids), weight[ids])
        torch.testing.assert_close(run(head)(x), x @ weight.T)
    merge_and_unload(model)
    torch.testing.assert_close(model.lm_head.weight, weight)


def test_copies_compute_the_same_and_stay_tied():
    model, ids = tuned(True), ids_with_tokens()
    twin = pickle.loads(pickle.dumps(copy.deepcopy(model)))
    assert torch.equal(logits(twin, ids), logits(model, ids))
    shaken(twin)
    assert twin.lm_head.adapters.default.source is twin.model.embed_tokens.adapters.default
    assert not torch.allclose(logits(twin, ids), logits(model, ids))
    twin.load_state_dict(model.state_dict())
    assert torch.equal(logits(twin, ids), logits(model, ids))


def test_an_average_of_models_has_the_same_tokens():
    """Averages of buffers round down: 29 may become 28."""
    model = inject(llama().eval(), LoraConfig(**ALIVE | {"trainable_token_indices": list(range(1, 50, 2))}))
    average = AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(0.9), use_buffers=True)
    for _ in range(3):
        average.update_parameters(shaken(model))
    ids = torch.arange(VOCABULARY)[None, :30]
    y, of_rows = average(ids).logits, average(ids, adapter_names=["default"]).logits
    model.load_state_dict(average.module.state_dict())
    torch.testing.assert_close([y, of_rows], [model(ids).logits] * 2)


def test_meta_models_get_their_token_buffers_with_to_empty():
    with torch.device("meta"):
        model = llama(True)
    inject(model, LoraConfig(target_modules=["q_proj"], trainable_token_indices=TOKENS))
    model.to_empty(device=torch.get_default_device())
    assert model.lm_head.adapters.default.source.index.tolist() == TOKENS
    source = inject(llama(True), LoraConfig(target_modules=["q_proj"], trainable_token_indices=TOKENS))
    model.load_state_dict(shaken(source).state_dict())
    place, found = model.model.embed_tokens.adapters.default.find(torch.tensor([31, 5, 7, 49]))
    assert place[found].tolist() == [2, 0] and found.tolist() == [True, False, True, False]


def test_an_update_of_the_embedding_is_merged_below_the_rows_of_another_adapter():
    model, ids = inject(llama().eval(), LoraConfig(r=2, target_modules=["embed_tokens"])), token_ids()
    inject(model, LoraConfig(r=2, target_modules=["q_proj"], trainable_token_indices=[3, 4]), "rows")
    for name in ("default", "rows"):
        shaken(set_adapter(model, name))
    ids[:, 2] = 3
    expected = logits(set_adapter(model, ["default", "rows"]), ids)
    torch.testing.assert_close(logits(merge(model), ids), expected)


# --- bad input --------------------------------------------------------------------------------------------------------


def test_a_file_with_other_tokens(tmp_path):
    save_adapter(tuned(True), tmp_path)
    model = tuned(True, trainable_token_indices=[1, 2, 3])
    with refused(model, ValueError, "trainable_token_indices=(7, 0, 31)", "with trainable_token_indices=(1, 2"):
        load_adapter(model, tmp_path)
