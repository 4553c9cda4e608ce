"""Weighted combinations of factors give PEFT's numbers."""

from __future__ import annotations

import math

import peft
import pytest
import torch
from support.properties import given, settings, st
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from lora_ext.adapters.combine import COMBINATIONS, check_combination, combine_factors, combined_rank


class Layers(nn.Module):
    """A model with one layer of each kind."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(12, 9)
        self.transposed = Conv1D(9, 12)
        self.embedding = nn.Embedding(15, 7)
        self.conv = nn.Conv2d(4, 6, 3)
        self.pointwise = nn.Conv2d(4, 6, 1)


NAMES = ["linear", "transposed", "embedding", "conv", "pointwise"]
TRANSPOSED = ("transposed", "embedding")
WEIGHTS = [0.7, -0.4, 1.5]


def adapted(ranks: list[int], dtype: torch.dtype = torch.float32, **config) -> peft.PeftModel:
    """Adds one adapter with random factors per rank."""
    model = Layers().to(dtype)
    configs = [
        peft.LoraConfig(target_modules=NAMES, r=r, lora_alpha=3 + 2 * i, init_lora_weights=False, **config)
        for i, r in enumerate(ranks)
    ]
    model = peft.get_peft_model(model, configs[0], "0", autocast_adapter_dtype=False)
    for i, config in enumerate(configs[1:], 1):
        model.add_adapter(str(i), config, autocast_adapter_dtype=False)
    return model


def factors(layer: nn.Module, adapter: str) -> tuple[Tensor, Tensor, float]:
    if adapter in layer.lora_embedding_A:
        return layer.lora_embedding_A[adapter].data, layer.lora_embedding_B[adapter].data, layer.scaling[adapter]
    return layer.lora_A[adapter].weight.data, layer.lora_B[adapter].weight.data, layer.scaling[adapter]


def delta(lora_A: Tensor, lora_B: Tensor, scaling: float) -> Tensor:
    return scaling * lora_B.flatten(1) @ lora_A.flatten(1)


def layers(model: peft.PeftModel) -> dict[str, nn.Module]:
    return {name: model.base_model.model.get_submodule(name) for name in NAMES}


def error(ours: Tensor, theirs: Tensor) -> float:
    return ((ours - theirs).norm() / theirs.norm()).item()


KINDS = [
    (kind, {"density": density, "majority_sign_method": method})
    for kind in COMBINATIONS
    for density in ((0.4, 1.0) if kind not in ("linear", "cat", "svd") else (None,))
    for method in (("total", "frequency") if "ties" in kind else ("total",))
]


@pytest.mark.filterwarnings("ignore:The density 1.0")
@pytest.mark.parametrize(("kind", "options"), KINDS)
def test_the_same_update_as_peft(kind, options):
    torch.manual_seed(1)
    model = adapted([4, 4, 4])
    base = model.base_model
    adapters = ["0", "1", "2"]
    for name, layer in layers(model).items():
        args = [options["density"], options["majority_sign_method"]]
        torch.manual_seed(2)
        if kind == "cat":
            expected = sum(w * delta(*factors(layer, a)) for a, w in zip(adapters, WEIGHTS, strict=True))
        elif kind.endswith("svd"):
            like_A, like_B, _ = factors(layer, "0")
            combined = base._svd_generalized_task_arithmetic_weighted_adapter(
                kind, adapters, WEIGHTS, 4, layer, like_A, like_B, *args
            )
            expected = delta(*combined, 1.0)
        else:
            combined = base._generalized_task_arithmetic_weighted_adapter(kind, adapters, WEIGHTS, layer, *args)
            expected = delta(*combined, 1.0)
        random_state = torch.get_rng_state()
        torch.manual_seed(2)
        ours = combine_factors(
            kind, [factors(layer, a) for a in adapters], WEIGHTS, **options, transposed=name in TRANSPOSED
        )
        assert error(delta(*ours), expected) < 2e-6, name
        assert torch.equal(torch.get_rng_state(), random_state)
        rank = combined_rank(kind, [4, 4, 4])
        for new, old, rank_dim in zip(ours[:2], factors(layer, "0"), (0, 1), strict=False):
            assert new.shape[rank_dim] == rank and new.dtype == old.dtype
            assert new.select(rank_dim, 0).shape == old.select(rank_dim, 0).shape


@pytest.mark.parametrize(
    ("kind", "ranks", "options"),
    [
        ("linear", [3, 3], {}),
        ("cat", [3, 2], {}),
        ("svd", [3, 2], {}),
        ("svd", [3, 2], {"svd_rank": 4}),
        ("svd", [3, 2], {"svd_rank": 1}),
        ("svd", [4, 4], {"svd_clamp": 0.9}),
        ("magnitude_prune_svd", [3, 4], {"density": 0.5, "svd_rank": 2, "svd_clamp": 0.8}),
        ("ties_svd", [3, 4], {"density": 0.5, "svd_full_matrices": False}),
        ("magnitude_prune", [2, 2], {"density": 0.3}),
        ("svd", [3], {}),
        ("ties", [3], {}),
    ],
)
@pytest.mark.parametrize("use_rslora", [False, True])
def test_the_same_adapter_as_add_weighted_adapter(kind, ranks, options, use_rslora):
    torch.manual_seed(3)
    model = adapted(ranks, use_rslora=use_rslora)
    adapters, weights = [str(i) for i in range(len(ranks))], WEIGHTS[: len(ranks)]
    model.base_model.add_weighted_adapter(adapters, weights, "new", kind, **options)
    kind = check_combination(kind, weights, len(adapters), density=options.get("density"))
    for name, layer in layers(model).items():
        combined = combine_factors(kind, [factors(layer, a) for a in adapters], weights, **options)
        lora_A, lora_B, scaling = factors(layer, "new")
        # PEFT scales the result by alpha / sqrt(r) = sqrt(r) if the first adapter has use_rslora: a bug in PEFT.
        assert math.isclose(scaling, math.sqrt(lora_A.shape[0]) if use_rslora else 1)
        assert error(delta(*combined), delta(lora_A, lora_B, 1.0)) < 2e-6, name
        assert lora_A.shape[0] == combined[0].shape[0] == combined_rank(kind, ranks, options.get("svd_rank"))


def random_factors(ranks: list[int], out: int, in_: int, groups: int = 1, dtype=torch.float64):
    shapes = [((r, in_), (out, r)) if groups == 1 else ((r, in_, 3), (out, r // groups, 1)) for r in ranks]
    return [(torch.randn(A, dtype=dtype), torch.randn(B, dtype=dtype), 0.5 + i) for i, (A, B) in enumerate(shapes)]


@settings(deadline=None, max_examples=60)
@given(st.lists(st.integers(1, 6), min_size=1, max_size=3), st.integers(1, 9), st.integers(1, 9), st.integers(1, 9))
def test_svd_is_the_best_approximation_and_cat_is_exact(ranks, out, in_, rank):
    torch.manual_seed(sum(ranks) + out)
    parts = random_factors(ranks, out, in_)
    weights = WEIGHTS[: len(ranks)]
    expected = sum(w * delta(*part) for w, part in zip(weights, parts, strict=True))
    torch.testing.assert_close(delta(*combine_factors("cat", parts, weights)), expected)
    lora_A, lora_B, scaling = combine_factors("svd", parts, weights, svd_rank=rank)
    assert lora_A.shape == (rank, in_) and lora_B.shape == (out, rank) and scaling == 1
    lost = torch.linalg.svdvals(expected)[rank:].norm()
    torch.testing.assert_close((delta(lora_A, lora_B, 1.0) - expected).norm(), lost, rtol=1e-9, atol=1e-9)


def grouped_conv_delta(lora_A: Tensor, lora_B: Tensor, scaling: float, groups: int) -> Tensor:
    return scaling * torch.cat(
        [b.flatten(1) @ a.flatten(1) for a, b in zip(lora_A.chunk(groups), lora_B.chunk(groups), strict=True)]
    )


@pytest.mark.parametrize("kind", ["cat", "svd", "ties_svd"])
def test_groups_of_a_convolution_are_combined_separately(kind):
    parts = random_factors([4, 4], 6, 5, groups=2)
    weights = WEIGHTS[:2]
    new = combine_factors(kind, parts, weights, svd_rank=6 if kind != "cat" else None, density=1.0)
    assert new[0].shape == ((8, 5, 3) if kind == "cat" else (6, 5, 3)) and new[1].shape[2:] == (1,)
    summed = sum(w * grouped_conv_delta(*part, 2) for w, part in zip(weights, parts, strict=True))
    if kind != "ties_svd":  # rank 3 per group is full: a group has 3 outputs
        torch.testing.assert_close(grouped_conv_delta(*new, 2), summed)
    with pytest.raises(ValueError, match="svd_rank is 3, want a multiple of the convolution's 2 groups"):
        combine_factors("svd", parts, weights, svd_rank=3)


@pytest.mark.parametrize("kind", COMBINATIONS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_is_computed_in_float32(kind, dtype):
    torch.manual_seed(4)
    parts = random_factors([4, 4], 9, 8, dtype=dtype)
    wide = [(A.float(), B.float(), s) for A, B, s in parts]
    torch.manual_seed(5)
    ours = combine_factors(kind, parts, WEIGHTS[:2], density=0.5)
    assert ours[0].dtype == ours[1].dtype == dtype
    if "dare" not in kind:  # dare draws its masks in the dtype
        expected = combine_factors(kind, wide, WEIGHTS[:2], density=0.5)
        assert error(delta(ours[0].float(), ours[1].float(), 1.0), delta(*expected)) < 2 * torch.finfo(dtype).eps


@pytest.mark.parametrize(
    ("options", "error", "text"),
    [
        ({"kind": "sum"}, ValueError, "combination_type is 'sum', want one of linear, cat, svd, ties, ties_svd, dare_"),
        ({"weights": [1.0]}, ValueError, "weights has 1 entries for 2 adapters; want one per adapter"),
        ({"weights": [1.0, math.nan]}, ValueError, "weights has nan, want finite numbers"),
        ({"weights": [1.0, "2"]}, TypeError, "weights has '2' of type str, want finite numbers"),
        ({"kind": "ties"}, ValueError, "density is None; ties needs the fraction of values to keep, 0 < density <= 1"),
        ({"kind": "dare_linear_svd", "density": 0}, ValueError, "density has 0, want 0 < density <= 1"),
        ({"kind": "ties", "density": 1.01}, ValueError, "density has 1.01, want 0 < density <= 1"),
        ({"kind": "ties", "density": "1"}, TypeError, "density has '1' of type str, want 0 < density <= 1"),
        ({"majority_sign_method": "mean"}, ValueError, "majority_sign_method is 'mean', want \"total\" or"),
        ({"kind": "svd", "svd_rank": 0}, ValueError, "svd_rank is 0, want None or an integer of at least 1"),
        ({"kind": "svd", "svd_clamp": 2.0}, ValueError, "svd_clamp has 2.0, want None or a quantile"),
    ],
)
def test_bad_settings_are_named(options, error, text):
    options = {"kind": "linear", "weights": [1.0, 2.0]} | options
    for call in (
        lambda kind, weights, **rest: check_combination(kind, weights, 2, **rest),
        lambda kind, weights, **rest: combine_factors(kind, random_factors([2, 2], 3, 4), weights, **rest),
    ):
        with pytest.raises(error) as caught:
            call(**options)
        assert text in str(caught.value)


def test_adapters_of_different_shapes_are_refused():
    for kind in ("linear", "ties", "dare_linear", "dare_ties", "magnitude_prune"):
        with pytest.raises(ValueError, match=rf"have ranks \[2, 3\], but {kind} adds .*; use cat or one of the svd"):
            combine_factors(kind, random_factors([2, 3], 3, 4), [1, 1], density=0.5)
    mixed = random_factors([2], 3, 4) + random_factors([2], 3, 5)
    with pytest.raises(ValueError, match=r"different layers: lora_A \[2, 4\] and lora_B \[3, 2\], and lora_A \[2, 5\]"):
        combine_factors("cat", mixed, [1, 1])
    with pytest.raises(ValueError, match="adapters is empty; name at least one"):
        check_combination("linear", [], 0)


def test_one_adapter_is_combined_linearly():
    assert all(check_combination(kind, [2.0], 1) == "linear" for kind in COMBINATIONS)
    assert all(check_combination(kind, [2.0, 1], 2, density=0.5) == kind for kind in COMBINATIONS)
    (part,) = random_factors([3], 5, 4)
    torch.testing.assert_close(delta(*combine_factors("linear", [part], [-2.0])), -2 * delta(*part))
