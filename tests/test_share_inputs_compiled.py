"""Layers that read one tensor are computed together in compiled graphs, with the numbers of uncompiled models."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
import transformers
from architectures.table import ARCHITECTURES
from support.shared_inputs import WIDTH, Attention, assert_close, net, some_x, step
from support.ways import WAYS, adapted, save_random_adapter
from torch import Tensor, fx, nn
from torch._dynamo import lookup_backend
from torch.utils.checkpoint import checkpoint

from lora_ext import LoraConfig, functional, inject, save_adapter, set_adapter
from lora_ext.adapters import hotswap_adapter, prepare_hotswap
from lora_ext.compiling import share_inputs

pytestmark = [pytest.mark.cpu_only("makes its inputs on the CPU"), pytest.mark.full]

ROWS = {row.name: row for row in ARCHITECTURES}
QKVO = {"target_modules": ["q", "k", "v", "o"], "r": 2, "init_lora_weights": False}


class Counting:
    """A backend that counts the layers of each call of our ops in the graphs that it gets."""

    def __init__(self, backend: str = "eager") -> None:
        self.compile = lookup_backend(backend)
        self.graphs: list[list[int]] = []

    def __call__(self, graph: fx.GraphModule, inputs: list[Tensor], **options: Any) -> Callable[..., Any]:
        found = []
        for module in graph.modules():
            if isinstance(module, fx.GraphModule):
                module.graph.lint()
                for node in module.graph.nodes:
                    if str(node.target).startswith("lora_ext.lora_linear"):
                        found.append(len(node.args[1]) if isinstance(node.args[1], (list, tuple)) else 1)
        self.graphs.append(found)
        return self.compile(graph, inputs, **options)


@pytest.fixture(autouse=True)
def _no_graphs_of_other_tests():
    torch._dynamo.reset()


def compiled(model: nn.Module, backend: str = "eager", **options: Any) -> tuple[nn.Module, Counting]:
    counting = Counting(backend)
    return torch.compile(model, backend=share_inputs(counting), fullgraph=True, **options), counting


def compiled_step(model: nn.Module, run: nn.Module, *args: Any, x: Tensor | None = None) -> dict[str, Tensor]:
    """:func:`support.shared_inputs.step` of ``run``, the compiled ``model``."""
    model.zero_grad(set_to_none=True)
    torch.manual_seed(0)
    x = (some_x() if x is None else x).requires_grad_()
    y = run(x, *args)
    y.square().sum().backward()
    grads = {name: parameter.grad for name, parameter in model.named_parameters() if parameter.requires_grad}
    return {"y": y.detach(), "x": x.grad} | grads


# --- whole models -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "way", "calls"), [("Llama", "inject", [3, 1, 2, 1]), ("BERT", "accelerate", [3, 1, 1, 1])]
)
def test_models_compute_as_uncompiled_ones(name, way, calls, tmp_path):
    base, inputs, way = ROWS[name].build(), ROWS[name].inputs(), WAYS[way]
    model = adapted(way, base, save_random_adapter(base, tmp_path, target_modules="all-linear"))
    run, counting = compiled(model)

    def step_of(call: nn.Module) -> dict[str, Tensor]:
        model.zero_grad(set_to_none=True)
        y = call(**inputs).logits
        y.square().mean().backward()
        grads = {name: p.grad for name, p in model.named_parameters() if p.requires_grad and p.grad is not None}
        return {"y": y.detach()} | grads

    assert_close(step_of(run), step_of(model))
    blocks, (found,) = base.config.num_hidden_layers, counting.graphs
    assert blocks >= 2 and found[: len(calls) * blocks] == calls * blocks


def test_a_switch_of_adapters_compiles_each_set_once():
    model = net(1, lora_dropout=0.3)
    inject(model, LoraConfig(**QKVO, lora_dropout=0.3), "second")
    run, counting = compiled(model, "aot_eager")
    for names in (["default"], ["second"], ["default"]):
        set_adapter(model, names)
        model(some_x())  # the first call computes groups that are only guessed
        expected = step(model, some_x())
        assert_close(compiled_step(model, run), expected)
    assert counting.graphs == [[3, 1]] * 2


@pytest.mark.parametrize("use_reentrant", [False, True])
def test_activation_checkpointing(use_reentrant):
    def around(block: nn.Module, x: Tensor) -> Tensor:
        return checkpoint(block, x, use_reentrant=use_reentrant)

    model = net(2, lora_dropout=0.3)
    run, counting = compiled(model, "aot_eager")
    assert_close(compiled_step(model, run, around), step(model, some_x(), around))
    assert counting.graphs == [[3, 1] * 2]


def test_inductor():
    model = net(1, lora_dropout=0.3, lora_bias=True).double()
    run, counting = compiled(model, "inductor")
    with torch._inductor.config.patch(fallback_random=True):  # PyTorch's generator, as in uncompiled calls
        actual = compiled_step(model, run, x=some_x().double())
    assert_close(actual, step(model, some_x().double()))
    assert counting.graphs == [[3, 1]]


# --- around the model -------------------------------------------------------------------------------------------------


def test_autocast_and_inference_mode():
    model = net(1)
    run, counting = compiled(model)
    with torch.autocast("cpu", torch.bfloat16):
        y = run(some_x())
        torch.testing.assert_close(y, model(some_x()))
    assert y.dtype == torch.bfloat16
    with torch.inference_mode():
        torch.testing.assert_close(run(some_x()), model(some_x()))
    assert counting.graphs == [[3, 1]] * 2


@torch.no_grad()
def test_dynamic_shapes():
    model = net(1)
    run, counting = compiled(model, "aot_eager", dynamic=True)
    torch.testing.assert_close(run(some_x()), model(some_x()))
    with torch._dynamo.config.patch(error_on_recompile=True):
        for tokens in (4, 9):
            x = torch.randn(tokens, WIDTH)
            torch.testing.assert_close(run(x), model(x))
    assert counting.graphs[-1] == [3, 1]  # in a graph before it, dropout and scaling are not constants


def test_a_hot_swap_compiles_nothing(tmp_path):
    torch.manual_seed(0)
    base = Attention()
    small, large = (inject(copy.deepcopy(base), LoraConfig(**QKVO | {"r": r})) for r in (2, 4))
    save_adapter(large, tmp_path)
    model = prepare_hotswap(copy.deepcopy(small), 4)
    run, counting = compiled(model)
    torch.testing.assert_close(run(some_x()), small(some_x()))
    with torch._dynamo.config.patch(error_on_recompile=True):
        hotswap_adapter(run, tmp_path)
        torch.testing.assert_close(run(some_x()), large(some_x()))
    assert counting.graphs == [[3, 1]]


# --- what is computed together ----------------------------------------------------------------------------------------


class Pair(nn.Module):
    """Two layers on one tensor, and something between their calls."""

    def __init__(self, between: Callable[[Tensor, Tensor], Any] = lambda x, y: None) -> None:
        super().__init__()
        self.a, self.b, self.between = nn.Linear(WIDTH, 4), nn.Linear(WIDTH, 4), between

    def forward(self, x: Tensor) -> Tensor:
        x = x * 2
        y = self.a(x)
        self.between(x, y)
        return y * self.b(x)


class CastBetween(Pair):
    def forward(self, x: Tensor) -> Tensor:
        with torch.autocast("cpu", torch.bfloat16):
            y = self.a(x)
        return y * self.b(x)


class TwiceA(Pair):
    """The first layer is called twice, as in SimCSE: its masks differ."""

    def forward(self, x: Tensor) -> Tensor:
        return self.a(x) - self.a(x)


class UnderTwoNames(Pair):
    """One layer with two names is called twice."""

    def __init__(self) -> None:
        super().__init__()
        self.b = self.a

    def forward(self, x: Tensor) -> Tensor:
        return self.a(x) - self.b(x)


class Renormalised(Pair):
    """An embedding changes its weight, which is the second layer's, too, as it is read."""

    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Embedding(4, WIDTH, max_norm=0.1)
        self.b.weight = self.table.weight

    @torch.no_grad()
    def forward(self, x: Tensor) -> Tensor:
        y = self.a(x)
        rows = self.table(torch.arange(4))
        return y * self.b(x) + rows.sum()


@torch.compiler.allow_in_graph
def not_traced(x: Tensor) -> Tensor:
    return x.mul_(3)


class OtherParent(Pair):
    def __init__(self) -> None:
        super().__init__()
        self.b = nn.Sequential(self.b)


def set_entry(x: Tensor, y: Tensor) -> None:
    x[0] = 7.0


def ours(model: nn.Module, **options: Any) -> nn.Module:
    return inject(model, LoraConfig(**{"target_modules": "a|b", "r": 2, "init_lora_weights": False} | options))


def with_other_dropout() -> nn.Module:
    model = ours(Pair(), lora_dropout=0.5)
    model.b.adapters["default"].lora_dropout = 0.25
    return model


def with_input_hook() -> nn.Module:
    model = ours(Pair())
    model.b.register_forward_pre_hook(lambda _, args: (args[0] + 1,))
    return model


def with_base_hook() -> nn.Module:
    model = ours(Pair())
    model.b.base_layer.register_forward_hook(lambda *args: args[2] * 2)
    return model


def with_two_adapters() -> nn.Module:
    model = ours(Pair())
    inject(model, LoraConfig(target_modules=["a", "b"], r=2, init_lora_weights=False), "second")
    set_adapter(model, ["default", "second"])
    return model


CASES: dict[str, tuple[Callable[[], nn.Module], list[int], str]] = {
    "nothing between": (lambda: ours(Pair()), [2], ""),
    "a view is read": (lambda: ours(Pair(lambda x, y: x[0].sum())), [2], ""),
    "the output changes": (lambda: ours(Pair(lambda x, y: y.mul_(2))), [2], ""),
    "two adapters": (with_two_adapters, [2], ""),
    "lora_bias": (lambda: ours(Pair(), lora_bias=True), [2], ""),
    "the input changes": (lambda: ours(Pair(lambda x, y: x.add_(1))), [1, 1], "add_"),
    "a view of it changes": (lambda: ours(Pair(lambda x, y: x.view(-1)[3:].zero_())), [1, 1], "zero_"),
    "an entry is set": (lambda: ours(Pair(set_entry)), [1, 1], "setitem"),
    "it is written to": (lambda: ours(Pair(lambda x, y: torch.mul(x, 2, out=x))), [1, 1], "mul"),
    "relu in place": (lambda: ours(Pair(lambda x, y: nn.functional.relu(x, True))), [1, 1], "relu"),
    "autocast ends": (lambda: ours(CastBetween()), [1, 1], "_exit_autocast"),
    "other dropout": (with_other_dropout, [1, 1], "its dropout is 0.25, that of the others 0.5"),
    "another input": (with_input_hook, [1, 1], ""),
    "a hook on the base layer": (with_base_hook, [1], ""),
    "a function that is not traced": (lambda: ours(Pair(lambda x, y: not_traced(x))), [1, 1], "not_traced"),
    "a table is renormalised": (lambda: ours(Renormalised()), [1, 1], "may change"),
    "one layer, two names": (lambda: ours(UnderTwoNames(), lora_dropout=0.5), [1, 1], "called again"),
    "called twice": (lambda: ours(TwiceA(), lora_dropout=0.5), [1, 1], "called again"),
    "layers of two modules": (lambda: ours(OtherParent(), target_modules=r"a|b\.0"), [1, 1], ""),
}


@pytest.mark.parametrize("case", CASES)
def test_what_is_computed_together(case):
    make, calls, reason = CASES[case]
    torch.manual_seed(0)
    model = make()
    counting = Counting()
    backend = share_inputs(counting)
    run = torch.compile(model, backend=backend, fullgraph=True)
    torch.manual_seed(0)
    actual = run(some_x())
    torch.manual_seed(0)
    if reason != "called again":
        torch.testing.assert_close(actual, model(some_x()))
    else:
        assert actual.abs().max() > 0.01
    assert counting.graphs == [calls]
    assert sum(group.shared for group in backend.groups) == calls.count(2)
    assert reason in " ".join(group.reason for group in backend.groups)


def test_layers_of_a_function_are_of_no_module():
    q, k = (ours(Pair(), lora_dropout=0.5).a for _ in range(2))
    k.load_state_dict(q.state_dict())

    def closure(x: Tensor) -> Tensor:
        return q(x) - k(x)

    def arguments(x: Tensor, q: nn.Module, k: nn.Module) -> Tensor:
        return q(x) - k(x)

    for function, layers in ((closure, ()), (arguments, (q, k))):
        counting = Counting()
        y = torch.compile(function, backend=share_inputs(counting))(some_x(), *layers)
        assert counting.graphs == [[1, 1]] and y.abs().max() > 0.01  # two masks


def test_another_scaling_is_shared_too():
    model = ours(Pair())
    run, counting = compiled(model)
    for scaling in (1.0, 3.0, 0.5):
        model.b.adapters["default"].scaling = scaling
        torch.testing.assert_close(run(some_x()), model(some_x()))
    assert {tuple(graph) for graph in counting.graphs} == {(2,)}


def test_quantised_layers_compute_alone():
    quantization = pytest.importorskip("torchao.quantization")
    pair = Pair()
    quantization.quantize_(pair, quantization.Int8WeightOnlyConfig())
    model = ours(pair)
    run, counting = compiled(model)
    torch.testing.assert_close(run(some_x()), model(some_x()))
    assert counting.graphs == [[]]


def test_calls_of_the_op_by_users_stay_as_they_are():
    weight, A, B = torch.randn(4, WIDTH), torch.randn(2, WIDTH), torch.randn(4, 2)

    def twice(x: Tensor) -> Tensor:
        return functional.lora_linear(x, weight, None, A, B, 1.0) + functional.lora_linear(x, weight, None, A, B, 2.0)

    run, counting = compiled(twice)
    torch.testing.assert_close(run(some_x()), twice(some_x()))
    assert counting.graphs == [[1, 1]]


# --- the backend ------------------------------------------------------------------------------------------------------


def test_the_report_names_the_layers():
    backend = share_inputs("eager")
    torch.compile(net(1), backend=backend, fullgraph=True)(some_x())
    assert "3 layers in 1 groups are computed together" in str(backend.groups)
    assert "blocks.0.q, blocks.0.k, blocks.0.v" in str(backend.groups)


def test_mode_and_options_are_those_of_the_backend():
    for options in ({"options": {"nonsense": 1}}, {"mode": "nonsense"}):
        run = torch.compile(ours(Pair()), backend=share_inputs(), **options)
        with pytest.raises(RuntimeError, match="nonsense"):
            run(some_x())
    given = []

    def backend(graph: fx.GraphModule, inputs: list[Tensor], **options: Any) -> Callable[..., Any]:
        given.append(options)
        return graph.forward

    torch.compile(ours(Pair()), backend=share_inputs(backend), options={"mine": 1})(some_x())
    assert given == [{"options": {"mine": 1}}]


def test_a_copied_backend_compiles_nothing():
    """Transformers copies a CompileConfig for every call of generate."""
    model, counting = net(1), Counting()
    config = transformers.CompileConfig(backend=share_inputs(counting))
    for backend in (config.backend, copy.deepcopy(config).backend):
        torch.compile(model, backend=backend, fullgraph=True)(some_x())
    assert counting.graphs == [[3, 1]] and config == copy.deepcopy(config)


def test_what_is_no_backend_is_refused():
    with pytest.raises(TypeError, match="share_inputs: backend is 3 of type int, want a string or a function"):
        share_inputs(3)
    with pytest.raises(torch._dynamo.exc.InvalidBackend, match="nonsense"):
        share_inputs("nonsense")
