"""Updates of stacked experts, applied to the rows that chose each expert: no large tensors, hooks, threads, graphs.

tests/contracts/test_with_peft.py compares families and implementations of experts with PEFT.
"""

from __future__ import annotations

import copy

import peft
import pytest
import torch
from contracts.kinds import Uses
from support.merging import same_bits
from support.mixtures import IMPLEMENTATIONS, LargestTensor, mixture
from support.models import token_ids
from support.threads import run_together
from torch import Tensor, nn

from lora_ext import LoraConfig, inject, load_adapter, merge
from lora_ext.adapters import lora_modules, set_adapter
from lora_ext.nn import LoraAdapter, LoraParameter

SETTINGS = {"r": 4, "lora_alpha": 3, "init_lora_weights": False, "target_modules": []}
EXPERTS = ["experts.gate_up_proj", "experts.down_proj"]


@pytest.fixture(params=IMPLEMENTATIONS)
def implementation(request) -> str:
    return request.param


def adapted(base: nn.Module, name: str = "default", **settings) -> nn.Module:
    return inject(base, LoraConfig(**SETTINGS | {"target_parameters": EXPERTS} | settings), name)


@pytest.mark.parametrize("family", ["mixtral", "gpt_oss"])
@pytest.mark.parametrize("trains", [False, True])
def test_no_tensor_is_as_large_as_the_experts(family, implementation, trains):
    model, ids = adapted(mixture(family, implementation), r=4), token_ids()[:1, :2]
    stack = min(layer.weight.numel() for _, layer in lora_modules(model))
    with LargestTensor() as largest, torch.set_grad_enabled(trains):
        loss = model.train(trains)(input_ids=ids, labels=ids).loss
        if trains:
            loss.backward()
    # Two tokens choose two experts each: the batched product gathers four matrices, as without an adapter.
    bound = stack if implementation != "batched_mm" else 2 * stack + 1
    assert 0 < largest.numel < bound


# --- what people put around it ----------------------------------------------------------------------------------------


def test_hooks(implementation):
    model, ids, seen = adapted(mixture("mixtral", implementation)), token_ids(), []
    expected, experts = model(input_ids=ids).logits, model.model.layers[0].mlp.experts.module
    experts.register_forward_pre_hook(lambda module, args: seen.append(module.down_proj.shape))
    experts.register_forward_hook(lambda module, args, y: y + 1)
    assert not torch.allclose(model(input_ids=ids).logits, expected)
    assert seen == [torch.Size([4, 16, 24])]


def test_threads(implementation):
    """Forwards with different adapters in use at the same time each see one state of the experts."""
    model, ids = adapted(adapted(mixture("qwen3", implementation), "a"), "b"), token_ids()
    expected = {}
    for name in ("a", "b"):
        set_adapter(model, name)
        expected[name] = model(input_ids=ids).logits
    other = copy.deepcopy(model)  # the same names, other layers
    set_adapter(model, "a")

    @torch.no_grad()
    def run(name: str, model: nn.Module) -> None:
        for _ in range(10):
            assert same_bits(model(input_ids=ids).logits, expected[name]), name

    calls = [("a", model), ("a", model), ("b", other)]
    assert run_together(*(lambda call=call: run(*call) for call in calls)) == [None] * 3


# --- torch.func and graphs --------------------------------------------------------------------------------------------


class Reads(nn.Module):
    """Reads its parameter otherwise than as an attribute."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(3, 6, 6) / 3)

    def forward(self, x: Tensor) -> Tensor:
        return x @ dict(self.named_parameters())["weight"]


def test_a_module_that_reads_its_parameter_otherwise():
    torch._dynamo.reset()
    layer = adapted(nn.ModuleDict({"m": Reads()}), target_parameters=["m.weight"])["m"]
    x = torch.randn(5, 6)
    found = torch.compile(layer, backend="eager", fullgraph=True)(x)
    torch.testing.assert_close(found, layer(x))
    assert not torch.allclose(found, layer.base_layer(x))


class Computes(Reads):
    """Uses parts of its parameter in other functions than products, and with operators."""

    def forward(self, x: Tensor) -> Tensor:
        w = self.weight
        return x * w[1].sum(0) + (2 * w[2] - w[0]).amax(0) + w[[2, 0]].mean((0, 1)) + (w**2).sum() + (-w).amin()


def test_a_module_that_computes_with_its_parameter():
    model, x = adapted(nn.ModuleDict({"m": Computes()}), target_parameters=["m.weight"]).eval(), torch.randn(5, 6)
    y, base = model["m"](x), model["m"].base_layer(x)
    assert not torch.allclose(y, base)
    torch.testing.assert_close(y, merge(model)["m"](x))


# --- bare parameters --------------------------------------------------------------------------------------------------


def test_an_error_in_the_module_leaves_its_parameters_in_place():
    model = adapted(nn.ModuleDict({"m": Uses(False)}), target_parameters=["m.up", "m.mix"])["m"]
    before = dict(model.named_parameters())
    with pytest.raises(RuntimeError):
        model(torch.randn(4, 5))
    after = dict(model.named_parameters())
    assert before.keys() == after.keys() and all(after[name] is p for name, p in before.items())


def test_a_layer_without_inject():
    module, x = Uses(False), torch.randn(4, 8)
    module.shift = nn.Parameter(torch.zeros(6))
    layer = LoraParameter(module, "up", LoraAdapter(8, 5, 2, 4, init_lora_weights=False, shapes=((6, 8), (5, 6))))
    assert (layer(x) - module(x)).abs().max() > 1e-2
    assert layer.delta_weight(key="weight[1]").shape == (5, 8)
    outer = LoraParameter(layer, "mix", LoraAdapter(5, 6, 2, 4))
    assert all(p.requires_grad == ("adapters" in name) for name, p in outer.named_parameters())
    assert layer.shift is module.shift and "parameter_name='up'" in repr(layer)


def test_an_attention_by_its_parameters(tmp_path):
    """Target parameters are how PEFT adapts an attention with separate query, key and value weights."""
    base = nn.ModuleDict({"a": nn.MultiheadAttention(8, 2, kdim=5, vdim=6, dtype=torch.float64)})
    names = [f"a.{name}_proj_weight" for name in "qkv"]
    q, k, v = (torch.randn(3, n, dtype=torch.float64) for n in (8, 5, 6))
    theirs = peft.get_peft_model(copy.deepcopy(base), peft.LoraConfig(**SETTINGS | {"target_parameters": names}))
    theirs.save_pretrained(tmp_path)
    ours = load_adapter(copy.deepcopy(base), tmp_path)
    assert (ours["a"](q, k, v)[0] - base["a"](q, k, v)[0]).abs().max() > 1e-3
    torch.testing.assert_close(ours["a"](q, k, v), theirs.base_model.model["a"](q, k, v))
