"""Layers that read one tensor are computed together: when, when not, and that no result depends on it."""

from __future__ import annotations

import copy
import functools
import gc
import pickle
import threading
import weakref
from collections.abc import Callable
from typing import ClassVar

import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import CheckpointPolicy, checkpoint, create_selective_checkpoint_contexts

from lora_ext import LoraConfig, functional, inject, merge, set_adapter, unmerge
from lora_ext.adapters import delete_adapter, disable_adapters, input_groups, merge_and_unload
from lora_ext.nn import shared_inputs
from lora_ext.nn.shared_inputs import SharedInputs

WIDTH = 8


class Attention(nn.Module):
    """Like an attention: o has as many in_features as q, k and v, and reads another tensor."""

    def __init__(self) -> None:
        super().__init__()
        self.q, self.k, self.v, self.o = (nn.Linear(WIDTH, WIDTH) for _ in range(4))

    def forward(self, x: Tensor, memory: Tensor | None = None) -> Tensor:
        memory = x if memory is None else memory
        return self.o(torch.softmax(self.q(x) * self.k(memory), -1) + self.v(memory))


class Net(nn.Module):
    def __init__(self, layers: int = 1) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(Attention() for _ in range(layers))

    def forward(self, x: Tensor, run: Callable = lambda block, x: block(x)) -> Tensor:
        for block in self.blocks:
            x = run(block, x + 0)
        return x


def net(layers: int = 1, share_inputs: bool = True, **options) -> Net:
    torch.manual_seed(0)
    config = LoraConfig(**{"target_modules": ["q", "k", "v", "o"], "r": 2, "init_lora_weights": False} | options)
    return inject(Net(layers), config, share_inputs=share_inputs)


def some_x() -> Tensor:
    return torch.randn(5, WIDTH, generator=torch.Generator().manual_seed(1))


@pytest.fixture
def calls(monkeypatch) -> list[int]:
    """The number of layers of each call of the op."""
    found = []

    def siblings(x, weights, *rest):
        found.append(len(weights))
        return of_siblings(x, weights, *rest)

    def single(*arguments):
        found.append(1)
        return of_single(*arguments)

    of_siblings, of_single = functional.lora_linear_siblings, functional.lora_linear
    monkeypatch.setattr(functional, "lora_linear_siblings", siblings)
    monkeypatch.setattr(functional, "lora_linear", single)
    return found


@pytest.fixture
def each_alone(monkeypatch) -> Callable[[], None]:
    """Makes every layer compute its own output from now on; dropout seeds stay common."""
    return lambda: monkeypatch.setattr(SharedInputs, "_group_to_compute", lambda *_: None)


def step(model: nn.Module, x: Tensor, run: Callable = lambda block, x: block(x), seed: int = 0) -> dict[str, Tensor]:
    """The output and all gradients of one step."""
    model.zero_grad(set_to_none=True)
    torch.manual_seed(seed)
    x = x.clone().requires_grad_()
    y = model(x, run)
    y.square().sum().backward()
    grads = {name: parameter.grad for name, parameter in model.named_parameters() if parameter.requires_grad}
    return {"y": y.detach(), "x": x.grad} | grads


def assert_close(actual: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    assert actual.keys() == expected.keys()
    for name, tensor in expected.items():
        torch.testing.assert_close(actual[name], tensor, msg=lambda text, name=name: f"{name}: {text}")


def groups(model: nn.Module) -> dict[str, str]:
    """The reasons of a report, by the last names of the paths."""
    return {"".join(path[-1] for path in group.paths): group.reason for group in input_groups(model)}


# --- what is computed -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("lora_bias", [False, True])
@pytest.mark.parametrize("dropout", [0.0, 0.3])
def test_results_are_those_of_separate_layers(dropout, lora_bias, calls, each_alone):
    model, x = net(2, lora_dropout=dropout, lora_bias=lora_bias).double(), some_x().double()
    first, second = step(model, x), step(model, x)
    assert calls == [4, 1] * 2 + [3, 1] * 2  # o is in the first guess
    # The guess changes no bit, so that a run that is resumed in a new process equals one that is not.
    assert all(torch.equal(first[name], second[name]) for name in first)
    each_alone()
    assert_close(first, step(model, x))
    assert calls[8:] == [1] * 8


@pytest.mark.parametrize("dropout", [0.0, 0.3])
def test_without_sharing_every_layer_is_computed_alone(dropout, calls):
    model, x = net(share_inputs=False, lora_dropout=dropout), some_x()
    step(model, x)
    assert calls == [1] * 4
    assert len(input_groups(model)) == 0
    if not dropout:
        assert_close(step(net(), x), step(model, x))


def test_layers_of_different_ranks_and_sizes_share(calls):
    model = Net()
    model.blocks[0].v = nn.Linear(WIDTH, WIDTH, bias=False)
    model.blocks[0].k = nn.Linear(WIDTH, WIDTH)
    options = {"target_modules": ["q", "k", "v"], "init_lora_weights": False, "rank_pattern": {"k": 5}, "r": 3}
    inject(model, LoraConfig(**options))
    alone = inject(merge_and_unload(copy.deepcopy(model)), LoraConfig(**options), share_inputs=False)
    alone.load_state_dict(model.state_dict())
    assert_close(step(model, some_x()), step(alone, some_x()))
    assert calls[0] == 3


def test_a_layer_called_again_with_the_same_tensor_draws_another_mask():
    model, x = net(lora_dropout=0.5), some_x()
    k = model.blocks[0].k
    assert not torch.equal(k(x), k(x))


def test_layers_that_read_one_tensor_share_the_mask_whether_computed_together_or_not():
    model, x = net(lora_dropout=0.5), some_x()
    block = model.blocks[0]
    for layer in (block.q, block.k):
        layer.load_state_dict(block.v.state_dict())
    block.k.base_layer.register_forward_hook(lambda *_: None)  # not computed with the others
    assert torch.equal(block.q(x), block.v(x))


# --- which layers -----------------------------------------------------------------------------------------------------


def test_groups_are_found_and_reported():
    model = net()
    assert groups(model) == {"qkvo": "not called together yet"}
    model(some_x())
    model(some_x())
    assert groups(model) == {"qkv": "", "o": "is called with another tensor"}
    text = str(input_groups(model))
    assert "3 layers in 1 groups are computed together" in text
    assert "1 alone: is called with another tensor\n    blocks.0.o" in text


def test_cross_attention_shares_keys_and_values(calls):
    model, x, memory = net(), some_x(), some_x() + 1
    for _ in range(3):
        model.blocks[0](x, memory)
    assert groups(model) == {
        "q": "the other layers of its module are not computed with it",
        "kv": "",
        "o": groups(model)["o"],
    }
    assert calls[-3:] == [1, 2, 1]


def test_a_layer_that_is_never_called_leaves_after_the_second_time(calls):
    model, x = net(), some_x()
    block = model.blocks[0]
    for _ in range(4):
        block.q(x + 0), block.k(x + 0)
    assert calls[-2:] == [1, 1]
    model = net(target_modules=["q", "k", "v"])
    calls.clear()
    for _ in range(4):
        one = x + 0
        model.blocks[0].q(one), model.blocks[0].k(one)
    assert calls == [3, 3, 2, 2]
    assert groups(model) == {"qk": "", "v": "is not called after the others"}


def test_layers_of_a_sequential_are_no_candidates(calls):
    model = inject(
        nn.Sequential(nn.Sequential(nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, WIDTH))),
        LoraConfig(target_modules=["0.0", "0.1"]),
    )
    model(some_x())
    assert calls == [1, 1]


def test_more_layers_than_the_op_takes(calls):
    class Heads(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.heads = nn.ModuleList(nn.Linear(WIDTH, 2) for _ in range(11))

        def forward(self, x: Tensor) -> Tensor:
            return sum(head(x) for head in self.heads)

    model = inject(Heads(), LoraConfig(target_modules=r"heads\.\d+", init_lora_weights=False))
    model(some_x())
    assert calls == [8, 3]


# --- what falls back --------------------------------------------------------------------------------------------------


def test_hooks_of_a_layer_see_its_calls():
    model, x, seen = net(), some_x(), []
    model(x)
    block = model.blocks[0]
    block.k.register_forward_hook(lambda module, inputs, y: seen.append((inputs[0], y)))
    plain = block.k(x + 0)
    seen.clear()
    one = x + 0
    block(one)
    assert seen[0][0] is one
    torch.testing.assert_close(seen[0][1], plain)


@pytest.mark.parametrize("changes", ["x", "a copy", "in place", "factor", "output"])
def test_hooks_that_change_something_have_effect(changes, each_alone):
    model, x = net(), some_x()
    model(x)
    k = model.blocks[0].k
    hooks = {
        "x": lambda _, inputs: (inputs[0] * 2,),
        "a copy": lambda _, inputs: (inputs[0].clone(),),
        "in place": lambda _, inputs: (inputs[0].mul_(2),),
        "factor": lambda module, inputs: (inputs[0], module.adapters.default.lora_A.mul_(2))[:1],
    }
    if changes == "output":
        k.register_forward_hook(lambda module, inputs, y: y * 2)
    else:
        k.register_forward_pre_hook(hooks[changes])
    other = copy.deepcopy(model)
    with torch.no_grad():
        together = [model(x), model(x), model(x)]
        each_alone()
        alone = [other(x), other(x), other(x)]
    torch.testing.assert_close(together, alone)


def test_hooks_of_a_base_layer_are_called(calls):
    model, x, seen = net(), some_x(), []
    block = model.blocks[0]
    block.k.base_layer.register_forward_hook(lambda *_: seen.append(1))
    model(x)
    model(x)
    assert seen == [1, 1]
    assert calls[-2:] == [2, 1]  # q and v, o; the adapter of k is added to its base layer's output
    assert groups(model)["k"].startswith("now: its base layer")
    assert groups(model)["qv"] == ""


def test_other_dropout(calls):
    model = net(lora_dropout=0.3)
    model.blocks[0].v.adapters.default.lora_dropout = 0.0
    model(some_x())
    model(some_x())
    assert calls[-3:] == [2, 1, 1]
    assert groups(model)["v"] == "now: its dropout is 0, that of the others 0.3"


def test_several_adapters(calls):
    model, x = net(), some_x()
    inject(model, LoraConfig(target_modules=["q", "k"], init_lora_weights=False, r=3), "second")
    alone = copy.deepcopy(model)
    for layer in alone.modules():
        vars(layer).pop("_shared_inputs", None)
    for names in (["second"], ["default"], ["default", "second"]):
        for which in (model, alone):
            set_adapter(which, names)
        for _ in range(2):
            calls.clear()
            torch.testing.assert_close(model(x), alone(x))
    calls.clear()
    set_adapter(model, "second")
    model(x)
    assert calls == [2]  # q and k; v and o have no adapter of this name
    assert groups(model)["qk"] == ""
    assert groups(model)["v"] == "now: no adapter is in use"
    set_adapter(model, "default")
    delete_adapter(model, "second")
    calls.clear()
    model(x)
    assert calls == [3, 1]


def test_merged_and_disabled(calls):
    model, x = net().eval(), some_x()
    expected = model(x)
    merge(model)
    torch.testing.assert_close(model(x), expected)
    assert "now: adapters are merged" in groups(model).values()
    unmerge(model)
    with disable_adapters(model):
        assert not torch.allclose(model(x), expected)
    calls.clear()
    torch.testing.assert_close(model(x), expected)
    assert calls == [3, 1]


CHANGES = ["lora_A", "lora_B", "weight", "bias", "frozen", "x", "grad", "autocast", "adapter", "replaced", "eval"]


@pytest.mark.parametrize("what", CHANGES)
def test_a_change_between_the_calls_has_effect(what):
    model, x = net(lora_dropout=0.5 if what == "eval" else 0.0), some_x().requires_grad_()
    inject(model, LoraConfig(target_modules=["k"], init_lora_weights=False), "second")
    set_adapter(model, "default")
    model(x)
    k, adapter = model.blocks[0].k, model.blocks[0].k.adapters.default
    x = x + 0
    model.blocks[0].q(x)
    with torch.no_grad():
        if what in ("lora_A", "lora_B"):
            getattr(adapter, what).add_(1)
        elif what in ("weight", "bias"):
            getattr(k.base_layer, what).add_(1)
        elif what == "x":
            x.add_(1)
    if what == "frozen":
        adapter.requires_grad_(False)
    elif what == "adapter":
        set_adapter(model, "second")
    elif what == "replaced":
        k.base_layer.weight = nn.Parameter(torch.zeros(WIDTH, WIDTH), requires_grad=False)
    elif what == "eval":
        k.eval()
    with torch.set_grad_enabled(what != "grad"), torch.autocast("cpu", enabled=what == "autocast"):
        y = k(x)
        alone = k(x)
    assert y.dtype == alone.dtype
    assert y.requires_grad == alone.requires_grad
    torch.testing.assert_close(y, alone)
    if y.requires_grad:
        y.sum().backward()
        assert (adapter.lora_A.grad is None) == (what in ("frozen", "adapter"))


def test_a_layer_trained_apart_from_its_neighbours():
    model, x = net(), some_x()
    model(x)
    model.blocks[0].k.adapters.default.requires_grad_(False)
    grads = step(model, x)
    assert "blocks.0.q.adapters.default.lora_A" in grads
    assert model.blocks[0].k.adapters.default.lora_A.grad is None


def test_autocast_and_inference_mode(calls):
    model, x = net(), some_x()
    plain = model(x)
    with torch.autocast("cpu", torch.bfloat16):
        calls.clear()
        y = model(x)
        assert calls == [3, 1]
    assert y.dtype == torch.bfloat16
    with torch.inference_mode():
        calls.clear()
        torch.testing.assert_close(model(x), plain.detach())
        assert calls == [1] * 4
    assert "inference mode" in groups(model)["qkv"]
    model(x)
    assert groups(model)["qkv"] == ""


def test_dispatch_modes_see_the_op():
    class Counter(TorchDispatchMode):
        names: ClassVar[list[str]] = []

        def __torch_dispatch__(self, op, types, args=(), kwargs=None):
            if op.namespace == "lora_ext":
                self.names.append(op._opname)
            return op(*args, **(kwargs or {}))

    model, x = net(), some_x()
    expected = model(x)
    with Counter():
        torch.testing.assert_close(model(x), expected)
    assert Counter.names == ["lora_linear_siblings", "lora_linear"]


def test_transforms():
    model, x = net(), some_x()
    model(x)
    alone = net(share_inputs=False)
    for transform in (
        lambda model: torch.func.vmap(model)(x),
        lambda model: torch.func.grad(lambda x: model(x).sum())(x),
        lambda model: torch.func.jvp(model, (x,), (x,))[1],
        lambda model: torch.autograd.functional.hessian(lambda x: model(x).sum(), x[:1]),
    ):
        torch.testing.assert_close(transform(model), transform(alone))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_inputs_of_another_dtype_are_refused_as_before(dtype):
    model = net()
    with pytest.raises((TypeError, ValueError), match=r"^lora_linear: "):
        model(some_x().to(dtype))


# --- memory -----------------------------------------------------------------------------------------------------------


def test_nothing_is_kept_between_calls():
    model = net(2)
    for grad in (False, True):
        with torch.set_grad_enabled(grad):
            for _ in range(2):
                x = some_x() + 0
                y = model(x)
            if grad:
                y.sum().backward()
        gone = weakref.ref(x), weakref.ref(y)
        del x, y
        assert [ref() for ref in gone] == [None, None]
        assert not shared_inputs._thread.round._outputs


@pytest.mark.parametrize("end", ["x dies", "backward", "another group", "the same group"])
def test_outputs_that_nobody_takes_are_dropped(end):
    model = net(2)
    model(some_x())
    block, other = model.blocks
    x = some_x().requires_grad_(end == "backward") + 0
    with torch.set_grad_enabled(end != "x dies"):
        y = block.q(x)
    round = shared_inputs._thread.round
    assert len(round._outputs) == 2
    if end == "another group":
        other.q(some_x())
    elif end == "the same group":
        block.q(some_x())
    elif end == "backward":
        y.sum().backward()
    del x
    assert not round._outputs


def test_models_are_freed_at_once():
    gc.collect()
    gc.disable()
    try:
        model = net()
        step(model, some_x())
        gone = [weakref.ref(module) for module in (model, model.blocks[0].q, model.blocks[0].k)]
        gone.append(weakref.ref(model.blocks[0].q.adapters.default.lora_A))
        del model
        assert [ref() for ref in gone] == [None] * 4
    finally:
        gc.enable()


def test_an_interrupted_call_changes_nothing(calls):
    model, x = net(), some_x()
    model(x)
    model(x)

    class Stop(Exception):
        pass

    def stop(*_):
        raise Stop

    handle = model.blocks[0].k.register_forward_pre_hook(stop)
    with pytest.raises(Stop):
        model(x)
    handle.remove()
    expected = step(net(share_inputs=False), x)
    calls.clear()
    assert_close(step(model, x), expected)
    assert calls == [3, 1]


# --- copies, threads, checkpointing -----------------------------------------------------------------------------------


@pytest.mark.parametrize("duplicate", [copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))])
def test_copies_share_among_themselves(duplicate, calls):
    model, x = net(2), some_x()
    expected = step(model, x)
    twin = duplicate(model)
    calls.clear()
    assert_close(step(twin, x), expected)
    step(twin, x)
    assert calls[-4:] == [3, 1, 3, 1]
    with torch.no_grad():
        for parameter in twin.parameters():
            parameter.add_(1)
    assert_close(step(model, x), expected)
    layer = duplicate(model.blocks[0].q)
    torch.testing.assert_close(layer(x), model.blocks[0].q(x))


def test_state_and_files_are_as_without_sharing():
    shared, alone = net(), net(share_inputs=False)
    shared(some_x())
    assert list(shared.state_dict()) == list(alone.state_dict())
    assert [name for name, _ in shared.named_modules()] == [name for name, _ in alone.named_modules()]
    assert all(
        torch.equal(a, b) for a, b in zip(shared.state_dict().values(), alone.state_dict().values(), strict=True)
    )


def test_threads_do_not_take_each_others_outputs():
    model, errors = net(3).eval(), []
    xs = [some_x() + i for i in range(4)]
    with torch.no_grad():
        expected = [model(x) for x in xs]
        model(xs[0])

    def run(i: int) -> None:
        with torch.no_grad():
            for _ in range(40):
                if not torch.allclose(model(xs[i]), expected[i], atol=1e-5):
                    errors.append(i)

    threads = [threading.Thread(target=run, args=(i,)) for i in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not errors
    assert groups(model)["qkv"] == ""


@pytest.mark.parametrize("reentrant", [False, True])
@pytest.mark.parametrize("forwards", [1, 2])
def test_activation_checkpointing(reentrant, forwards, calls):
    """The second forward draws the first one's masks and saves as many tensors, while groups are still being found."""

    def loss(model: Net, run: Callable) -> dict[str, Tensor]:
        torch.manual_seed(0)
        model.zero_grad(set_to_none=True)
        x = some_x().requires_grad_()
        total = sum(model(x * (i + 1), run).square().sum() for i in range(forwards))  # all before the first backward
        total.backward()
        grads = {name: parameter.grad for name, parameter in model.named_parameters() if parameter.requires_grad}
        return {"loss": total.detach(), "x": x.grad} | grads

    def checkpointed(block: nn.Module, x: Tensor) -> Tensor:
        return checkpoint(block, x, use_reentrant=reentrant)

    model = net(2, lora_dropout=0.3)
    expected = loss(copy.deepcopy(model), lambda block, x: block(x))
    for _ in range(3):
        calls.clear()
        assert_close(loss(model, checkpointed), expected)
    assert calls == [3, 1] * (2 * 2 * forwards)
    assert groups(model) == {"qkv": "", "o": "is called with another tensor"}


def test_selective_checkpointing():
    """Which replays the operations of the first forward by their order."""

    def policy(_, op, *args, **kwargs):
        return CheckpointPolicy.MUST_SAVE if op is torch.ops.aten.mul.Tensor else CheckpointPolicy.PREFER_RECOMPUTE

    def run(block: nn.Module, x: Tensor) -> Tensor:
        contexts = functools.partial(create_selective_checkpoint_contexts, policy)
        return checkpoint(block, x, use_reentrant=False, context_fn=contexts)

    model, x = net(2, lora_dropout=0.3), some_x()
    expected = step(net(2, lora_dropout=0.3), x)
    for _ in range(3):
        assert_close(step(model, x, run), expected)


def test_checkpointing_with_a_hook_that_goes_between_the_forwards():
    model, x = net(), some_x()
    expected = step(net(), x)
    handle = model.blocks[0].k.register_forward_pre_hook(lambda *_: handle.remove())
    assert_close(step(model, x, lambda block, x: checkpoint(block, x, use_reentrant=False)), expected)


# --- graphs -----------------------------------------------------------------------------------------------------------


def test_compiled_graphs_are_whole_and_an_adapter_switch_compiles_as_often_as_without_sharing():
    counts = []
    for share_inputs in (True, False):
        torch._dynamo.reset()
        model, x = net(2, share_inputs), some_x()
        inject(model, LoraConfig(target_modules=["q", "k", "v", "o"], init_lora_weights=False), "second")
        eager = []
        for name in ("default", "second"):
            set_adapter(model, name)
            eager += [step(model, x), step(model, x)]
        graphs = []

        def backend(graph, inputs, graphs=graphs):
            graphs.append(graph)
            return graph.forward

        compiled = torch.compile(model, fullgraph=True, backend=backend)
        for name, expected in (("default", eager[0]), ("second", eager[2]), ("default", eager[1])):
            set_adapter(model, name)
            for _ in range(2):
                assert_close(step_of(compiled, model, x), expected)
        counts.append(len(graphs))
    assert counts[0] == counts[1]


def step_of(compiled: Callable, model: nn.Module, x: Tensor) -> dict[str, Tensor]:
    model.zero_grad(set_to_none=True)
    x = x.clone().requires_grad_()
    y = compiled(x)
    y.square().sum().backward()
    grads = {name: parameter.grad for name, parameter in model.named_parameters() if parameter.requires_grad}
    return {"y": y.detach(), "x": x.grad} | grads


def test_exported_programs_compute_the_same():
    model, x = net().eval(), some_x()
    expected = model(x)
    model(x)
    for strict in (False, True):
        program = torch.export.export(model, (x,), strict=strict)
        torch.testing.assert_close(program.module()(x), expected)
