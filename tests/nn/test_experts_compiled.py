"""Updates of stacked experts in compiled graphs: numbers of uncompiled calls, no tensor as large as the experts."""

from __future__ import annotations

from collections.abc import Callable

import peft
import pytest
import torch
import transformers
from functorch.compile import make_boxed_func
from support.mixtures import mixture
from support.models import token_ids
from support.versions import before, needs
from torch import Tensor, nn
from torch._dynamo.backends.common import aot_autograd
from torch.nn import functional as F
from torch.utils._pytree import tree_leaves
from transformers.models.llama4.modeling_llama4 import Llama4TextExperts

from lora_ext import LoraConfig, inject
from lora_ext.adapters import disable_adapters, lora_modules, set_adapter
from lora_ext.integrations.peft import accelerate

pytestmark = [pytest.mark.cpu_only("compiles for the CPU"), pytest.mark.full]

EXPERTS = ["experts.gate_up_proj", "experts.down_proj"]
SETTINGS = {"r": 4, "lora_alpha": 3, "init_lora_weights": False, "target_modules": [], "target_parameters": EXPERTS}
TRACES_VIEWS = not before("torch", "2.13")  # older releases make the updated parameter
TOLERANCES = {torch.float32: {"rtol": 1e-4, "atol": 1e-5}, torch.bfloat16: {"rtol": 0.03, "atol": 0.03}}


@pytest.fixture(autouse=True)
def _no_graphs_of_other_tests():
    torch._dynamo.reset()


def adapted(base: nn.Module, name: str = "default", **settings) -> nn.Module:
    return inject(base, LoraConfig(**SETTINGS | settings), name)


class Graphs:
    """A backend that runs the forward and backward graphs as they are, and remembers what they make."""

    def __init__(self) -> None:
        self.forwards = 0
        self.largest = 0
        self.backend = aot_autograd(fw_compiler=self._see, bw_compiler=self._see)

    def __deepcopy__(self, memo: dict) -> Graphs:
        return self

    def __call__(self, graph: torch.fx.GraphModule, inputs: list[Tensor]) -> Callable:
        self.forwards += 1
        return self.backend(graph, inputs)

    def _see(self, graph: torch.fx.GraphModule, inputs: list[Tensor]) -> Callable:
        for node in graph.graph.nodes:
            if node.op == "call_function" and not getattr(node.target, "is_view", False):
                sizes = [leaf.numel() for leaf in tree_leaves(node.meta.get("val")) if isinstance(leaf, Tensor)]
                self.largest = max([self.largest, *sizes])
        return make_boxed_func(graph.forward)


def stack_size(model: nn.Module) -> int:
    return min(layer.base_weight.numel() for _, layer in lora_modules(model))


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
    if not TRACES_VIEWS or before("transformers", "5.24"):
        ids = few_tokens()
        try:
            torch.compile(model, backend="aot_eager", fullgraph=True)(input_ids=ids, labels=ids).loss.backward()
        except RuntimeError as error:  # also TorchDynamo's
            versions = f"torch {torch.__version__} and Transformers {transformers.__version__}"
            pytest.skip(f"{versions} do not compile this model without an adapter: {type(error).__name__}")
        model.zero_grad(set_to_none=True)
        torch._dynamo.reset()
    return model


CASES = [
    ("mixtral", torch.bfloat16),
    pytest.param("qwen3", torch.bfloat16, marks=pytest.mark.slow),
    ("gpt_oss", torch.bfloat16),
    pytest.param("deepseek_v2", torch.bfloat16, marks=pytest.mark.slow),
    ("deepseek_v3", torch.bfloat16),
    ("mixtral", torch.float32),
]


@pytest.mark.parametrize(("family", "dtype"), CASES)
def test_grouped_products_of_a_model(family, dtype):
    model, ids = adapted(compilable(mixture(family, "grouped_mm").to(dtype))).train(), few_tokens()
    graphs = Graphs()
    compiled = torch.compile(model, backend=graphs, fullgraph=True)
    expected, found = results(model, model, ids), results(compiled, model, ids)
    assert len(found) == 9 and all(gradient.abs().max() > 0 for gradient in found)
    torch.testing.assert_close(found, expected, **TOLERANCES[dtype])
    assert graphs.forwards == 1
    assert (0 < graphs.largest < stack_size(model)) == TRACES_VIEWS


def test_switches():
    model, ids = compilable(mixture("mixtral", "grouped_mm").bfloat16()), few_tokens()
    bare = model(ids).logits
    for name in ("a", "b"):
        adapted(model, name)
    graphs = Graphs()
    compiled = torch.compile(model, backend=graphs, fullgraph=True)
    expected = {}
    with torch.no_grad():
        for name in ("a", "b"):
            set_adapter(model, name)
            expected[name] = model(ids).logits
            torch.testing.assert_close(compiled(ids).logits, expected[name], **TOLERANCES[torch.bfloat16])
        with disable_adapters(model):
            torch.testing.assert_close(compiled(ids).logits, bare)
        assert graphs.forwards == 3 and not torch.allclose(expected["a"], expected["b"], atol=0.1)
        with torch._dynamo.config.patch(error_on_recompile=True):
            for name in ("a", "b", "a"):
                set_adapter(model, name)
                torch.testing.assert_close(compiled(ids).logits, expected[name], **TOLERANCES[torch.bfloat16])


def test_the_loop_over_experts_runs_uncompiled():
    """It breaks every graph with or without an adapter; no tensor of the experts' size is made."""
    model, ids = adapted(mixture("qwen3", "eager").bfloat16()).train(), token_ids()
    compiled = torch.compile(model, backend="eager")
    expected, found = results(model, model, ids), results(compiled, model, ids)
    assert len(found) == 9
    torch.testing.assert_close(found, expected, **TOLERANCES[torch.bfloat16])
    assert {layer.why_whole for _, layer in lora_modules(model)} == {""}
    with pytest.raises(torch._dynamo.exc.Unsupported, match="use grouped_mm or batched_mm"):
        torch.compile(model, backend="eager", fullgraph=True)(ids)


def test_autocast_and_checkpoints():
    model, ids = adapted(mixture("mixtral", "grouped_mm")).train(), few_tokens()
    model.gradient_checkpointing_enable({"use_reentrant": False})
    graphs = Graphs()
    compiled = torch.compile(model, backend=graphs)
    with torch.autocast("cpu", torch.bfloat16):
        expected, found = results(model, model, ids), results(compiled, model, ids)
    assert len(found) == 9
    torch.testing.assert_close(found, expected, **TOLERANCES[torch.bfloat16])
    if TRACES_VIEWS:  # elsewhere there may be a graph break
        assert 0 < graphs.largest < stack_size(model)


@needs("torch", "2.13", "calls run PEFT's code, which does not compile")
def test_pefts_layers():
    config = peft.LoraConfig(**SETTINGS)
    base = compilable(mixture("mixtral", "grouped_mm").bfloat16())
    model = accelerate(peft.get_peft_model(base, config)).train()
    ids, graphs = few_tokens(), Graphs()
    compiled = torch.compile(model, backend=graphs, fullgraph=True)
    expected, found = results(model, model, ids), results(compiled, model, ids)
    assert len(found) == 9
    torch.testing.assert_close(found, expected, **TOLERANCES[torch.bfloat16])
    assert 0 < graphs.largest < 4 * 16 * 24


@pytest.mark.slow
def test_inductor():
    model, ids = adapted(compilable(mixture("gpt_oss", "grouped_mm").bfloat16())).train(), few_tokens()
    expected, found = results(model, model, ids), results(torch.compile(model, fullgraph=True), model, ids)
    torch.testing.assert_close(found, expected, **TOLERANCES[torch.bfloat16])


# --- other modules ----------------------------------------------------------------------------------------------------


class Uses(nn.Module):
    """A module with a stack ``[3, 6, 6]``, which ``function`` uses; square, so that a transposition goes unnoticed."""

    def __init__(self, function: Callable[[Tensor, Tensor], Tensor]) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(3, 6, 6) / 3)
        self.function = function

    def forward(self, x: Tensor) -> Tensor:
        return self.function(x, self.weight)


PRODUCTS = {
    "loop": lambda x, w: sum(F.linear(x, w[e]) for e in range(3)),
    "matmul": lambda x, w: torch.matmul(x, w.permute(0, 2, 1)),
    "operator": lambda x, w: x @ w,
    "reflected operator": lambda x, w: (w @ x.T).transpose(-2, -1),
    "chosen": lambda x, w: torch.bmm(w[torch.tensor([0, 2, 1, 1, 0])], x.unsqueeze(-1)),
}
OTHERS = {
    "einsum": lambda x, w: torch.einsum("nd,efd->nef", x, w),
    "comparison with a number": lambda x, w: x @ (w > 0).float() + x @ (w != 0.5).float(),
    "comparison with a tensor": lambda x, w: x @ (w > x[:1]).float() + x @ (x[:1] > w).float(),
    "arithmetic": lambda x, w: x @ (w - 2) + x @ (3 - w) + x @ (w / 3) + x @ (3 / w),
    "arithmetic with a tensor": lambda x, w: x @ (w - x[:1]) + x @ (x[:1] / w),
    "normalised": lambda x, w: x @ F.normalize(w, dim=-1),
}


def layer_of(base: nn.Module) -> nn.Module:
    return inject(nn.ModuleDict({"m": base}), LoraConfig(**SETTINGS | {"target_parameters": ["m.weight"]}))["m"]


@pytest.mark.parametrize("use", [*PRODUCTS, *OTHERS])
def test_modules_of_any_kind(use):
    layer, x = layer_of(Uses((PRODUCTS | OTHERS)[use])), torch.randn(5, 6)
    expected, graphs = layer(x), Graphs()
    torch.testing.assert_close(torch.compile(layer, backend=graphs, fullgraph=True)(x), expected)
    assert (layer.why_whole == "") == (use in PRODUCTS)
    assert use not in PRODUCTS or graphs.largest <= 5 * 6 * 6  # the chosen matrices of five rows


def test_a_module_that_reads_its_parameter_otherwise():
    class Reads(Uses):
        def forward(self, x: Tensor) -> Tensor:
            return x @ dict(self.named_parameters())["weight"]

    layer, x = layer_of(Reads(None)), torch.randn(5, 6)
    compiled = torch.compile(layer, backend="eager", fullgraph=True)
    found = compiled(x)
    torch.testing.assert_close(found, layer(x))
    assert not torch.allclose(found, layer.base_layer(x))


def test_a_graph_break_inside_of_the_module():
    def breaks(x: Tensor, weight: Tensor) -> Tensor:
        y = x @ weight[0]
        return y * int((y > 0).sum()) + x @ weight[1]

    layer = layer_of(Uses(breaks))
    compiled = torch.compile(layer, backend="eager")
    for _ in range(2):
        x = torch.randn(5, 6)
        torch.testing.assert_close(compiled(x), layer(x))
        assert "weight" not in vars(layer.module)


def test_llama_4():
    config = transformers.Llama4TextConfig(hidden_size=16, intermediate_size=24, num_local_experts=4)
    base = nn.ModuleDict({"experts": Llama4TextExperts(config).bfloat16()})
    with torch.no_grad():
        for parameter in base.parameters():
            parameter.normal_(std=0.2)
    layer, graphs = adapted(base)["experts"], Graphs()
    x = torch.randn(4 * 2, 16, dtype=torch.bfloat16)
    compiled = torch.compile(layer, backend=graphs, fullgraph=True)
    found = []
    for call in (layer, compiled):
        layer.zero_grad()
        y = call(x)
        y.float().square().sum().backward()
        found.append([y.detach(), *(p.grad.clone() for p in layer.parameters() if p.grad is not None)])
    assert len(found[0]) == 5
    torch.testing.assert_close(*found, rtol=0.03, atol=0.1)
    assert (0 < graphs.largest < 4 * 16 * 24) == TRACES_VIEWS
