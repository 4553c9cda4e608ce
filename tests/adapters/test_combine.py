"""Weighted combinations of adapters: PEFT's numbers, in every kind of layer and through files."""

from __future__ import annotations

import copy

import peft
import pytest
import torch
from support.models import Net, bert, gpt2, refused, token_ids
from support.properties import given, settings, st
from torch import Tensor, nn

from lora_ext import LoraConfig, add_weighted_adapter, inject, load_adapter, save_adapter, set_adapter
from lora_ext.adapters import hotswap_adapter, lora_modules, prepare_hotswap
from lora_ext.adapters.combine import COMBINATIONS, combine_factors

ALIVE = {"lora_alpha": 8, "init_lora_weights": False}
WEIGHTS = [0.7, -0.4, 1.5]


# --- the factors of one layer -----------------------------------------------------------------------------------------


def random_factors(ranks: list[int], out: int, in_: int, dtype=torch.float64):
    pairs = [(torch.randn(r, in_, dtype=dtype), torch.randn(out, r, dtype=dtype)) for r in ranks]
    return [(lora_A, lora_B, 0.5 + i) for i, (lora_A, lora_B) in enumerate(pairs)]


def delta(lora_A: Tensor, lora_B: Tensor, scaling: float) -> Tensor:
    return scaling * lora_B @ lora_A


@settings(deadline=None, max_examples=60)
@given(st.lists(st.integers(1, 6), min_size=1, max_size=3), st.integers(1, 9), st.integers(1, 9), st.integers(1, 9))
def test_svd_is_the_best_approximation_and_cat_is_exact(ranks, out, in_, rank):
    torch.manual_seed(sum(ranks) + out)
    parts, weights = random_factors(ranks, out, in_), WEIGHTS[: len(ranks)]
    expected = sum(w * delta(*part) for w, part in zip(weights, parts, strict=True))
    torch.testing.assert_close(delta(*combine_factors("cat", parts, weights)), expected)
    lora_A, lora_B, scaling = combine_factors("svd", parts, weights, rank)
    assert lora_A.shape == (rank, in_) and lora_B.shape == (out, rank) and scaling == 1
    lost = torch.linalg.svdvals(expected)[rank:].norm()
    torch.testing.assert_close((delta(lora_A, lora_B, 1.0) - expected).norm(), lost, rtol=1e-9, atol=1e-9)
    assert combine_factors("svd", parts, weights)[0].shape == (max(ranks), in_)


@pytest.mark.parametrize("kind", COMBINATIONS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_is_computed_in_float32(kind, dtype):
    parts = random_factors([4, 4], 9, 8, dtype=dtype)
    A, B, scaling = combine_factors(kind, parts, WEIGHTS[:2])
    assert A.dtype == B.dtype == dtype
    expected = delta(*combine_factors(kind, [(A.float(), B.float(), s) for A, B, s in parts], WEIGHTS[:2]))
    error = (delta(A.float(), B.float(), scaling) - expected).norm() / expected.norm()
    assert error < 2 * torch.finfo(dtype).eps


# --- models, against PEFT ---------------------------------------------------------------------------------------------


class Layers(nn.Module):
    """A model with convolutions and an embedding."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(15, 8)
        self.conv = nn.Conv2d(4, 6, 3)
        self.pointwise = nn.Conv2d(6, 6, 1)

    def forward(self, tokens: Tensor) -> Tensor:
        return self.pointwise(self.conv(self.embedding(tokens).view(-1, 4, 4, 4)))


def pair(base: nn.Module, directory, first: dict, second: dict) -> tuple[nn.Module, peft.PeftModel]:
    """Returns our model and PEFT's, both with the same adapters "one" and "two"."""
    theirs = peft.get_peft_model(copy.deepcopy(base), peft.LoraConfig(**first, **ALIVE), adapter_name="one").eval()
    theirs.add_adapter("two", peft.LoraConfig(**second, **ALIVE))
    theirs.save_pretrained(directory)
    ours = copy.deepcopy(base)
    for name in ("one", "two"):
        load_adapter(ours, directory / name, adapter_name=name)
    return ours.eval(), theirs


def combine_both(ours: nn.Module, theirs: peft.PeftModel, weights, kind: str, **options) -> None:
    names = ["one", "two"][: len(weights)]
    theirs.add_weighted_adapter(names, list(weights), "both", kind, **options)
    theirs.set_adapter("both")
    set_adapter(add_weighted_adapter(ours, names, list(weights), "both", kind, **options), "both")


MODELS = {
    "bert": (bert, ["query", "dense"], lambda model, ids: model(input_ids=ids).logits),
    "layers": (Layers, ["embedding", "conv", "pointwise"], lambda model, ids: model(ids % 15)),
}


@pytest.mark.parametrize("kind", COMBINATIONS)
@pytest.mark.parametrize("weights", [(0.7, 0.5), (1.0, -0.4), (0.5,)], ids=str)
@pytest.mark.parametrize("family", MODELS)
def test_as_in_peft(family, kind, weights, tmp_path):
    make, targets, call = MODELS[family]
    base, ids = make().double().eval(), token_ids(4, 8)
    config = {"r": 3, "target_modules": targets}
    ours, theirs = pair(base, tmp_path, config, config)
    combine_both(ours, theirs, weights, kind)
    result, expected = call(ours, ids), call(theirs, ids)
    # PEFT rounds the weights of linear and svd to float32, and the factors of embeddings and convolutions.
    assert (result - expected).norm() / expected.norm() < (1e-7 if (family, kind) == ("bert", "cat") else 2e-6)


@pytest.mark.parametrize(("kind", "options"), [("cat", {}), ("svd", {}), ("svd", {"svd_rank": 1})])
def test_adapters_with_different_layers_and_ranks(kind, options, tmp_path):
    base, ids = gpt2().double().eval(), token_ids()
    first = {"r": 2, "target_modules": ["c_attn", "c_proj"], "fan_in_fan_out": True}
    second = {"r": 5, "target_modules": ["c_fc", "c_attn"], "fan_in_fan_out": True, "use_rslora": True}
    ours, theirs = pair(base, tmp_path, first, second)
    combine_both(ours, theirs, (0.6, 1.5), kind, **options)
    result, expected = ours(input_ids=ids).logits, theirs(input_ids=ids).logits
    # PEFT rounds the weights of svd to float32, and near ones of the singular values that are kept and cut enlarge it.
    assert (result - expected).norm() / expected.norm() < (1e-7 if kind == "cat" else 1e-5)
    if kind == "cat":  # no unused rank in a layer with only one of the two
        ranks = {path.rpartition(".")[2]: layer.adapters["both"].r for path, layer in lora_modules(ours)}
        assert ranks == {"c_attn": 7, "c_proj": 2, "c_fc": 5}
        save_adapter(ours, tmp_path / "ours", "both")
        read = peft.PeftModel.from_pretrained(copy.deepcopy(base), tmp_path / "ours").eval()
        torch.testing.assert_close(read(input_ids=ids).logits, result)


# --- bad input; tests/support/refusals.py has settings ----------------------------------------------------------------


class Other(Net):
    """A model with layers whose adapters are more than one plain update."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(4, 4)
        self.grouped = nn.Conv1d(4, 4, 1, groups=2)
        self.attention = nn.MultiheadAttention(8, 2)


OTHERS = {
    "DoraLinear": {"use_dora": True},
    "LoraConv": {"target_modules": ["grouped"]},
    "LoraMultiheadAttention": {"target_modules": ["attention"]},
    "LoraPackedLinear": {"enable_lora": {"up": [True, False]}},
    "LoraParameter": {"target_parameters": ["head.weight"]},
    "TrainedModule": {"modules_to_save": ["head"]},
    "TrainableTokens": {"trainable_token_indices": {"embedding": [1]}},
    "the model's own biases": {"bias": "all"},
}


@pytest.mark.parametrize("change", ["prepare_hotswap", "hotswap_adapter", "add_weighted_adapter"])
@pytest.mark.parametrize("kind", OTHERS)
def test_other_kinds_of_adapters_are_neither_swapped_nor_combined(kind, change, tmp_path):
    model = inject(Other(), LoraConfig(**{"r": 2, "target_modules": ["up"]} | OTHERS[kind]), "a")
    save_adapter(model, tmp_path)
    inject(model, LoraConfig(r=2, target_modules=["down"]), "b")
    calls = {
        "prepare_hotswap": lambda: prepare_hotswap(model, 4, "a"),
        "hotswap_adapter": lambda: hotswap_adapter(model, tmp_path, "a"),
        "add_weighted_adapter": lambda: add_weighted_adapter(model, ["b", "a"], [1.0, 1.0], "c", "cat"),
    }
    with refused(model, ValueError, f"{change}: 'a' has more than low-rank updates", f": {kind}", "load_adapter"):
        calls[change]()
