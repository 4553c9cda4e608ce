"""Layers that read one tensor, and what is around them: memory, copies, threads, checkpointing, graphs."""

from __future__ import annotations

import copy
import functools
import gc
import pickle
import weakref
from collections.abc import Callable

import pytest
import torch
from support.shared_inputs import WIDTH, Net, assert_close, groups, net, some_x, step
from support.threads import run_together
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from lora_ext import LoraConfig, inject
from lora_ext.adapters import unload

# --- memory -----------------------------------------------------------------------------------------------------------


@pytest.fixture
def few_objects() -> None:
    """Hides the objects that exist from the collector for good: looking at all of them would take a second."""
    gc.collect()
    gc.freeze()


def alive(shape: tuple[int, ...]) -> int:
    gc.collect()
    return sum(type(found) is Tensor and found.shape == shape for found in gc.get_objects())


@pytest.mark.usefixtures("few_objects")
@pytest.mark.parametrize("end", ["x dies", "backward", "another group", "the same group"])
def test_outputs_that_nobody_takes_are_dropped(end):
    model, shape = net(2), (13, WIDTH)
    model(some_x())
    block, other = model.blocks
    before = alive(shape)
    with torch.set_grad_enabled(end != "x dies"):
        x = torch.randn(shape)
        y = block.q(x)
    assert alive(shape) == before + 4  # x, y, and the outputs of k and v
    if end == "another group":
        other.q(some_x())
    elif end == "the same group":
        block.q(some_x())
    elif end == "backward":
        y.sum().backward()
    del x, y
    assert alive(shape) == before


def test_models_are_freed_at_once():
    gc.collect()
    gc.disable()
    try:
        model = net()
        step(model, some_x())
        layer = model.blocks[0].q
        gone = [weakref.ref(part) for part in (model, layer, model.blocks[0].k, layer.adapters.default.lora_A)]
        del model, layer
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
        assert_close(step(model, x), expected)
    assert groups(model) == {"kv"}  # as q was called without them


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
    calls.clear()
    twin, layer = copy.copy(model.blocks[0].q), duplicate(model.blocks[0].q)  # are not called where that layer is
    torch.testing.assert_close(twin(x), layer(x))
    step(model, x)
    assert calls == [1, 1, 3, 1, 3, 1] and twin.adapters is model.blocks[0].q.adapters


def test_threads_do_not_take_each_others_outputs():
    model = net(3).eval()
    xs = [some_x() + i for i in range(4)]
    with torch.no_grad():
        expected = [model(x) for x in xs]
        model(xs[0])

    @torch.no_grad()
    def run(i: int) -> None:
        for _ in range(40):
            torch.testing.assert_close(model(xs[i]), expected[i])

    assert run_together(*(lambda i=i: run(i) for i in range(4))) == [None] * 4
    assert groups(model) == {"qkv"}


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
        assert groups(model) == {"qkv"}


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
