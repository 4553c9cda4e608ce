"""LoraParameter: expert weights and bare parameters, against merged weights and against PEFT's ParamWrapper."""

from __future__ import annotations

import copy
import types

import peft
import pytest
import torch
from support.models import refused
from torch import Tensor, nn

from lora_ext import LoraConfig, inject, load_adapter
from lora_ext.nn import LoraAdapter, LoraParameter

ALIVE = {"r": 2, "lora_alpha": 3, "init_lora_weights": False, "target_modules": []}


class Mixture(nn.Module):
    """A module whose submodule has experts (in either layout) and a matrix as parameters."""

    def __init__(self, is_transposed: bool = False, dtype: torch.dtype = torch.float64) -> None:
        super().__init__()
        self.experts = Experts(is_transposed, dtype)
        self.head = nn.Linear(6, 3, dtype=dtype)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.experts(x, scale=2.0))


class Experts(nn.Module):
    def __init__(self, is_transposed: bool, dtype: torch.dtype) -> None:
        super().__init__()
        self.is_transposed = is_transposed
        self.up = nn.Parameter(torch.randn((3, 6, 10) if is_transposed else (3, 10, 6), dtype=dtype) / 3)
        self.down = nn.Parameter(torch.randn((3, 10, 6) if is_transposed else (3, 6, 10), dtype=dtype) / 3)
        self.mix = nn.Parameter(torch.randn(6, 6, dtype=dtype))
        self.shift = nn.Parameter(torch.randn(6, dtype=dtype))

    def forward(self, x: Tensor, *, scale: float) -> Tensor:
        up, down = (self.up, self.down) if self.is_transposed else (self.up.transpose(1, 2), self.down.transpose(1, 2))
        return scale * (torch.tanh(x @ up) @ down).sum(0) @ self.mix.T + self.shift


PARAMETERS = ["experts.up", "experts.down", "experts.mix"]


def adapted(base: nn.Module, parameters: list[str] = PARAMETERS, name: str = "default", **settings) -> nn.Module:
    return inject(base, LoraConfig(**ALIVE | {"target_parameters": parameters} | settings), name)


@pytest.fixture(params=[False, True], ids=["out_in", "in_out"])
def mixture(request) -> Mixture:
    return Mixture(request.param)


# --- the same function ------------------------------------------------------------------------------------------------


def test_an_error_in_the_module_leaves_its_parameters_in_place(mixture):
    model = adapted(mixture)
    before = dict(model.named_parameters())
    with pytest.raises(RuntimeError):
        model(torch.randn(4, 5, dtype=torch.float64))
    after = dict(model.named_parameters())
    assert before.keys() == after.keys() and all(after[name] is p for name, p in before.items())


def test_a_layer_without_inject():
    experts = Experts(False, torch.float32)
    adapter = LoraAdapter(6, 10, 2, 4, init_lora_weights=False, shapes=((6, 6), (10, 6)))
    layer = LoraParameter(experts, "up", adapter)
    x = torch.randn(4, 6)
    assert (layer(x, scale=1.0) - experts(x, scale=1.0)).abs().max() > 1e-2
    assert layer.delta_weight(key="weight[1]").shape == (10, 6)
    outer = LoraParameter(layer, "mix", LoraAdapter(6, 6, 2, 4))
    assert all(p.requires_grad == ("adapters" in name) for name, p in outer.named_parameters())
    assert layer.shift is experts.shift and "parameter_name='up'" in repr(layer)
    for name, text in (("shift", "its shift has 1 dimensions, want 2, or 3"), ("nothing", "its nothing is computed")):
        with pytest.raises(TypeError, match=text):
            LoraParameter(experts, name)


# --- with PEFT --------------------------------------------------------------------------------------------------------


# --- bad input --------------------------------------------------------------------------------------------------------


def test_parameters_that_cannot_be_adapted():
    model = Mixture()
    model.experts.count = nn.Parameter(torch.ones(2, 2, dtype=torch.int8), requires_grad=False)
    model.attention = nn.MultiheadAttention(4, 2)
    with refused(
        model,
        TypeError,
        "experts.shift: its shift has 1 dimensions, want 2, or 3 with the experts first",
        "experts.count: its count is torch.int8",
        "attention.out_proj.weight: nn.MultiheadAttention reads it and never calls its module; name",
    ):
        adapted(model, ["experts.shift", "experts.up", "experts.count", "out_proj.weight"])
    with refused(model, ValueError, "target_parameters", "experts.upp", "close matches: 'experts.up'"):
        adapted(model, ["experts.upp"])
    del model.experts.count
    torch.nn.utils.parametrizations.weight_norm(model.experts, "mix")
    with refused(model, ValueError, "['experts.mix'] matches no parameter of", "mix.original0"):
        adapted(model, ["experts.mix"])


def test_one_module_as_both_kinds_of_target():
    model = adapted(Mixture(), ["head.weight"], "a")
    with refused(model, ValueError, "'head' has adapters (['a']) in a LoraParameter, which"):
        inject(model, LoraConfig(target_modules=["head"]), "b")
    model = inject(Mixture(), LoraConfig(target_modules=["head"]), "a")
    with refused(model, ValueError, "'head' has adapters (['a']) in a LoraLinear, which"):
        adapted(model, ["head.weight"], "b")


def test_an_attention_by_its_parameters(tmp_path):
    """Target parameters are how PEFT adapts an attention with separate query, key and value weights."""
    base = nn.ModuleDict({"a": nn.MultiheadAttention(8, 2, kdim=5, vdim=6, dtype=torch.float64)})
    names = [f"a.{name}_proj_weight" for name in "qkv"]
    q, k, v = (torch.randn(3, n, dtype=torch.float64) for n in (8, 5, 6))
    theirs = peft.get_peft_model(copy.deepcopy(base), peft.LoraConfig(**ALIVE | {"target_parameters": names}))
    theirs.save_pretrained(tmp_path)
    ours = load_adapter(copy.deepcopy(base), tmp_path)
    assert (ours["a"](q, k, v)[0] - base["a"](q, k, v)[0]).abs().max() > 1e-3
    torch.testing.assert_close(ours["a"](q, k, v), theirs.base_model.model["a"](q, k, v))


def test_a_version_of_transformers_without_a_grouped_product(monkeypatch):
    """Transformers 5.0 has the module of the experts, but not the op grouped_mm_fallback."""

    class Doubled(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = nn.Parameter(torch.randn(3, 4))

        def forward(self, x: Tensor) -> Tensor:
            return x @ (self.weight * 2.0).t()

    model, x = inject(nn.Sequential(Doubled()), LoraConfig(**ALIVE, target_parameters=["0.weight"])), torch.randn(5, 4)
    expected = model(x)
    monkeypatch.setattr(torch.ops, "transformers", types.SimpleNamespace())
    assert torch.equal(model(x), expected)
