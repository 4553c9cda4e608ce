"""Layers that read one tensor, and what is around them: memory, copies, threads, checkpointing, graphs."""

from __future__ import annotations

import copy
import functools
import gc
import pickle
import threading
import weakref
from collections.abc import Callable

import pytest
import torch
from support.shared_inputs import WIDTH, Net, assert_close, groups, net, some_x, step
from torch import Tensor, nn
from torch.utils.checkpoint import CheckpointPolicy, checkpoint, create_selective_checkpoint_contexts

from lora_ext import LoraConfig, inject, set_adapter
from lora_ext.adapters import unload
from lora_ext.nn import shared_inputs
from lora_ext.nn.input_groups import APART

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


def test_an_interrupted_call_changes_no_result(calls):
    model, x = net(), some_x()
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
    for _ in range(2):
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


def test_shallow_copies_are_computed_alone(calls):
    """They have the weights of the layer, but are not called where that is; more than an op takes may exist."""
    model, x = net(), some_x()
    expected, q = step(model, x), model.blocks[0].q
    twins = [copy.copy(q) for _ in range(shared_inputs.LARGEST)]
    calls.clear()
    assert_close(step(model, x), expected)
    assert calls == [3, 1]
    for twin in twins:
        assert twin.adapters is q.adapters
        torch.testing.assert_close(twin(x), q(x))


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
    # Layers that read the input of a reentrant part itself draw their own masks.
    expected = loss(net(2, lora_dropout=0.3, share_inputs=not reentrant), lambda block, x: block(x))
    for _ in range(3):
        calls.clear()
        assert_close(loss(model, checkpointed), expected)
    if not reentrant:
        assert calls == [3, 1] * (2 * 2 * forwards)
        assert groups(model) == {"qkv": "", "o": APART}


def test_layers_in_a_reentrant_part_share(calls):
    """They read a tensor that the part makes, as in a decoder's layer, which begins with a norm."""

    def run(block: nn.Module, x: Tensor) -> Tensor:
        return checkpoint(lambda x: block(x + 0), x, use_reentrant=True)

    model, x = net(2, lora_dropout=0.3), some_x()
    expected = step(net(2, lora_dropout=0.3), x)
    for _ in range(3):
        calls.clear()
        assert_close(step(model, x, run), expected)
    assert calls == [3, 1] * 4


def test_selective_checkpointing():
    """Selective checkpointing replays the operations of the first forward by their order."""

    def policy(_, op, *args, **kwargs):
        return CheckpointPolicy.MUST_SAVE if op is torch.ops.aten.mul.Tensor else CheckpointPolicy.PREFER_RECOMPUTE

    def run(block: nn.Module, x: Tensor) -> Tensor:
        contexts = functools.partial(create_selective_checkpoint_contexts, policy)
        return checkpoint(block, x, use_reentrant=False, context_fn=contexts)

    model, x = net(2, lora_dropout=0.3), some_x()
    expected = step(net(2, lora_dropout=0.3), x)
    for _ in range(3):
        assert_close(step(model, x, run), expected)


class InParts(nn.Module):
    """Runs each layer within a function that may be checkpointed, as gated units of large models do."""

    def __init__(self) -> None:
        super().__init__()
        self.q, self.k, self.v = (nn.Linear(WIDTH, WIDTH) for _ in range(3))

    def forward(self, x: Tensor, run: Callable = lambda part, x: part(x)) -> Tensor:
        x = x + 0
        q = self.q(x).sin().exp()
        return q * run(lambda x: self.k(x).sin().exp(), x) * run(lambda x: self.v(x).sin().exp(), x)


@pytest.mark.parametrize("reentrant", [False, True])
@pytest.mark.parametrize("dropout", [0.0, 0.3])
def test_layers_in_different_checkpoints(reentrant, dropout):
    """A part that runs again runs alone: it has neither the outputs nor the dropout seeds of the others."""

    def checkpointed(part: Callable, x: Tensor) -> Tensor:
        return checkpoint(part, x, use_reentrant=reentrant)

    config = LoraConfig(r=2, target_modules=["q", "k", "v"], lora_dropout=dropout, init_lora_weights=False)
    torch.manual_seed(0)
    model = inject(InParts(), config)
    alone = inject(unload(copy.deepcopy(model)), config, share_inputs=False)
    alone.load_state_dict(model.state_dict())
    for _ in range(3):
        assert_close(step(model, some_x(), checkpointed), step(alone, some_x()))


class Repeats(InParts):
    """Calls its layers in any order and number, with one tensor."""

    def forward(self, x: Tensor, run: Callable = lambda part, x: part(x), names: str = "qkk") -> Tensor:
        return run(lambda x: sum(getattr(self, name)(x).sin() for name in names), x + 0)


@pytest.mark.parametrize("names", ["qkk", "kkvq", "qq"])
def test_a_checkpoint_that_calls_a_layer_again(names):
    """Which layers leave a group is learnt between the two forwards, but they must save the same tensors."""
    config, x = LoraConfig(r=2, target_modules=["q", "k", "v"], lora_dropout=0.3, init_lora_weights=False), some_x()
    torch.manual_seed(0)
    model = inject(Repeats(), config)
    run = functools.partial(checkpoint, use_reentrant=False)

    def loss(model: nn.Module, run: Callable) -> dict[str, Tensor]:
        """Accumulates over forwards that call other layers, before the first backward."""
        torch.manual_seed(0)
        model.zero_grad(set_to_none=True)
        total = sum(model(x, run, called).square().sum() for called in (names, "qkv", "kv", "kv", "vk", names))
        total.backward()
        return {name: p.grad.clone() for name, p in model.named_parameters() if p.requires_grad}

    plain = copy.deepcopy(model)
    for _ in range(3):
        assert_close(loss(model, run), loss(plain, lambda part, x: part(x)))


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
