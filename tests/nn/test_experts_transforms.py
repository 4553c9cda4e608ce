"""Updates of stacked experts under torch.func and in exported programs."""

from __future__ import annotations

from contextlib import nullcontext

import pytest
import torch
from support.mixtures import IMPLEMENTATIONS, LargestTensor, mixture
from support.models import VOCABULARY, token_ids
from torch import Tensor, nn
from torch.export import Dim

from lora_ext import LoraConfig, inject
from lora_ext.adapters import lora_modules
from lora_ext.export import plain_pytorch

pytestmark = pytest.mark.cpu_only("makes its inputs on the CPU")

EXPERTS = ["experts.gate_up_proj", "experts.down_proj"]
SETTINGS = {"r": 4, "lora_alpha": 3, "init_lora_weights": False, "target_modules": [], "target_parameters": EXPERTS}
STACK = 4 * 16 * 24


def adapted(base: nn.Module) -> nn.Module:
    return inject(base, LoraConfig(**SETTINGS))


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_gradients_of_torch_func(implementation):
    model, ids = adapted(mixture("gpt_oss", implementation)), token_ids()[:1, :2]
    trained = {name: p for name, p in model.named_parameters() if p.requires_grad}

    def loss(values: dict[str, Tensor]) -> Tensor:
        return torch.func.functional_call(model, values, (), {"input_ids": ids, "labels": ids}).loss

    expected = torch.autograd.grad(loss(trained), list(trained.values()))
    with LargestTensor() as largest:
        found = torch.func.grad(loss)({name: p.detach() for name, p in trained.items()})
    torch.testing.assert_close(list(found.values()), list(expected))
    assert len(found) == 8 and all(gradient.abs().max() > 0 for gradient in found.values())
    assert {layer.why_whole for _, layer in lora_modules(model)} == {""}
    assert implementation == "batched_mm" or largest.numel < STACK  # which gathers a matrix for each choice


def test_gradients_of_each_sample_and_tangents():
    experts = adapted(mixture("mixtral", "batched_mm")).double().model.layers[0].mlp.experts
    x, weights = torch.randn(3, 2, 16, dtype=torch.float64), torch.rand(3, 2, 2, dtype=torch.float64)
    choices = torch.tensor([[[0, 1], [2, 3]], [[1, 0], [3, 1]], [[2, 2], [0, 3]]])
    trained = {name: p.detach() for name, p in experts.named_parameters() if p.requires_grad}

    def loss(values: dict[str, Tensor], *args: Tensor) -> Tensor:
        return torch.func.functional_call(experts, values, args).square().sum()

    found = torch.func.vmap(torch.func.grad(loss), in_dims=(None, 0, 0, 0))(trained, x, choices, weights)
    for i in range(3):
        expected = torch.func.grad(loss)(trained, x[i], choices[i], weights[i])
        torch.testing.assert_close({name: gradient[i] for name, gradient in found.items()}, expected)
    direction = torch.randn_like(x[0])
    _, tangent = torch.func.jvp(lambda x: loss(trained, x, choices[0], weights[0]), (x[0],), (direction,))
    gradient = torch.func.grad(loss, argnums=1)(trained, x[0], choices[0], weights[0])
    torch.testing.assert_close(tangent, (gradient * direction).sum())


def program_of(model: nn.Module) -> torch.export.ExportedProgram:
    dynamic = {"input_ids": {0: Dim("batch", min=2)}, "use_cache": None}
    inputs = {"input_ids": torch.randint(VOCABULARY, (2, 5)), "use_cache": False}
    return torch.export.export(model, (), inputs, dynamic_shapes=dynamic)


@pytest.mark.full
@pytest.mark.parametrize(
    ("family", "implementation", "dtype", "plain"),
    [("gpt_oss", "grouped_mm", torch.float32, True), ("qwen3", "batched_mm", torch.bfloat16, False)],
)
def test_exported_programs(family, implementation, dtype, plain):
    model = adapted(mixture(family, implementation).to(dtype))
    with plain_pytorch() if plain else nullcontext():
        program = program_of(model)
    ids = torch.randint(VOCABULARY, (3, 5))
    tolerance = {"rtol": 0.03, "atol": 0.03} if dtype == torch.bfloat16 else {"rtol": 1e-4, "atol": 1e-5}
    found = program.module()(input_ids=ids, use_cache=False).logits
    torch.testing.assert_close(found, model(ids).logits, **tolerance)
