"""Updates of stacked experts in compiled graphs, which take the whole updated parameter: numbers of other calls."""

from __future__ import annotations

from collections.abc import Callable

import peft
import pytest
import torch
import transformers
from support.mixtures import mixture
from support.models import token_ids
from support.versions import before
from torch import Tensor, nn

from lora_ext import LoraConfig, inject
from lora_ext.adapters import disable_adapters, set_adapter
from lora_ext.integrations.peft import accelerate

pytestmark = [pytest.mark.cpu_only("compiles for the CPU"), pytest.mark.full]

EXPERTS = ["experts.gate_up_proj", "experts.down_proj"]
SETTINGS = {"r": 4, "lora_alpha": 3, "init_lora_weights": False, "target_modules": [], "target_parameters": EXPERTS}
TOLERANCES = {torch.float32: {"rtol": 1e-4, "atol": 1e-5}, torch.bfloat16: {"rtol": 0.03, "atol": 0.03}}


@pytest.fixture(autouse=True)
def _no_graphs_of_other_tests():
    torch._dynamo.reset()


def adapted(base: nn.Module, name: str = "default", **settings) -> nn.Module:
    return inject(base, LoraConfig(**SETTINGS | settings), name)


def results(call: Callable, model: nn.Module, ids: Tensor) -> list[Tensor]:
    """The loss and the gradients of the adapters."""
    model.zero_grad()
    loss = call(input_ids=ids, labels=ids).loss
    loss.backward()
    return [loss.detach(), *(p.grad.clone() for p in model.parameters() if p.grad is not None)]


def few_tokens() -> Tensor:
    return token_ids()[:1, :2]


def compilable(model: nn.Module) -> nn.Module:
    """Returns the model; skips the test where older releases do not compile it in one graph without an adapter."""
    if before("torch", "2.13") or before("transformers", "5.24"):
        ids = few_tokens()
        try:
            torch.compile(model, backend="aot_eager", fullgraph=True)(input_ids=ids, labels=ids).loss.backward()
        except RuntimeError as error:  # also TorchDynamo's
            versions = f"torch {torch.__version__} and Transformers {transformers.__version__}"
            pytest.skip(f"{versions} do not compile this model without an adapter: {type(error).__name__}")
        model.zero_grad(set_to_none=True)
        torch._dynamo.reset()
    return model


@pytest.mark.parametrize(
    ("family", "dtype"),
    [
        ("mixtral", torch.bfloat16),
        ("gpt_oss", torch.float32),
        *(pytest.param(family, torch.bfloat16, marks=pytest.mark.slow) for family in ("qwen3", "deepseek_v3")),
    ],
)
def test_a_model_is_one_graph_with_the_numbers_of_uncompiled_calls(family, dtype):
    model, ids = adapted(compilable(mixture(family, "grouped_mm").to(dtype))).train(), few_tokens()
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    expected, found = results(model, model, ids), results(compiled, model, ids)
    assert len(found) == 9 and all(gradient.abs().max() > 0 for gradient in found)
    torch.testing.assert_close(found, expected, **TOLERANCES[dtype])


@torch.no_grad()
def test_switches():
    model, ids = compilable(mixture("mixtral", "grouped_mm").bfloat16()), few_tokens()
    bare = model(ids).logits
    for name in ("a", "b"):
        adapted(model, name)
    compiled, expected = torch.compile(model, backend="eager", fullgraph=True), {}
    for name in ("a", "b"):
        set_adapter(model, name)
        expected[name] = model(ids).logits
        torch.testing.assert_close(compiled(ids).logits, expected[name], **TOLERANCES[torch.bfloat16])
    with disable_adapters(model):
        torch.testing.assert_close(compiled(ids).logits, bare)
    assert not torch.allclose(expected["a"], expected["b"], atol=0.1)
    with torch._dynamo.config.patch(error_on_recompile=True):
        for name in ("a", "b", "a"):
            set_adapter(model, name)
            torch.testing.assert_close(compiled(ids).logits, expected[name], **TOLERANCES[torch.bfloat16])


def test_the_loop_over_experts():
    """It breaks every graph, with or without an adapter."""
    model, ids = adapted(mixture("qwen3", "eager").bfloat16()).train(), token_ids()
    expected, found = results(model, model, ids), results(torch.compile(model, backend="eager"), model, ids)
    assert len(found) == 9
    torch.testing.assert_close(found, expected, **TOLERANCES[torch.bfloat16])


def test_autocast_and_checkpoints():
    model, ids = adapted(mixture("mixtral", "grouped_mm")).train(), few_tokens()
    model.gradient_checkpointing_enable({"use_reentrant": False})
    compiled = torch.compile(model, backend="aot_eager")
    with torch.autocast("cpu", torch.bfloat16):
        expected, found = results(model, model, ids), results(compiled, model, ids)
    assert len(found) == 9
    torch.testing.assert_close(found, expected, **TOLERANCES[torch.bfloat16])


def test_pefts_layers():
    model = accelerate(peft.get_peft_model(mixture("mixtral", "grouped_mm").bfloat16(), peft.LoraConfig(**SETTINGS)))
    ids, compiled = few_tokens(), torch.compile(model.train(), backend="aot_eager")
    expected, found = results(model, model, ids), results(compiled, model, ids)
    assert len(found) == 9
    torch.testing.assert_close(found, expected, **TOLERANCES[torch.bfloat16])


class Reads(nn.Module):
    """Reads its parameter otherwise than as an attribute."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(3, 6, 6) / 3)

    def forward(self, x: Tensor) -> Tensor:
        return x @ dict(self.named_parameters())["weight"]


def test_a_module_that_reads_its_parameter_otherwise():
    layer = inject(nn.ModuleDict({"m": Reads()}), LoraConfig(**SETTINGS | {"target_parameters": ["m.weight"]}))["m"]
    x = torch.randn(5, 6)
    found = torch.compile(layer, backend="eager", fullgraph=True)(x)
    torch.testing.assert_close(found, layer(x))
    assert not torch.allclose(found, layer.base_layer(x))
