"""Layers that read one tensor are computed together: what is computed, for which layers, and when each is alone."""

from __future__ import annotations

import copy

import pytest
import torch
from support.layers import saved_bytes
from support.shared_inputs import WIDTH, Net, assert_close, assert_near, counted_calls, groups, net, some_x, step
from torch import Tensor, nn
from torch.nn.utils.parametrize import register_parametrization as parametrized

from lora_ext import LoraConfig, inject, merge, set_adapter, unmerge
from lora_ext.adapters import delete_adapter, input_groups

# --- what is computed -------------------------------------------------------------------------------------------------


FORMATS = ["nf4", "nf4-double", "fp4", "int8", "torchao-int8", "torchao-int8-group", "torchao-int4", "torchao-float8"]
FEW = ["nf4-double", "int8", "torchao-int8"]
CASES = [(None, torch.float64, 0.0), (None, torch.float64, 0.3)]
CASES += [(format, torch.float32, 0.3) for format in FORMATS]
CASES += [(format, dtype, 0.3) for format in FEW for dtype in (torch.bfloat16, torch.float16)]
OPS, OF_QUANTIZED = ("lora_linear_siblings", "lora_linear"), ("lora_delta_siblings", "plus_lora_delta")


@pytest.mark.parametrize("lora_bias", [False, True])
@pytest.mark.parametrize(("format", "dtype", "dropout"), CASES, ids=str)
def test_results_are_those_of_separate_layers(format, dtype, dropout, lora_bias, each_alone, monkeypatch):
    """Next to quantised weights, each layer computes its own product, and one op adds the updates."""
    calls = counted_calls(monkeypatch, *(OPS if format is None else OF_QUANTIZED))
    model, x = net(2, format=format, dtype=dtype, lora_dropout=dropout, lora_bias=lora_bias), some_x(format, dtype)
    first, second = step(model, x), step(model, x)
    assert calls == [4, 1] * 2 + [3, 1] * 2  # o is in the first guess
    # The guess changes no bit, so that a run that is resumed in a new process equals one that is not.
    assert all(torch.equal(first[name], second[name]) for name in first)
    assert groups(model) == {"qkv"} and len(first) == 2 + 2 * 4 * (3 if lora_bias else 2)
    each_alone()
    tolerance = 4 * torch.finfo(dtype).eps if dtype.itemsize == 2 else {torch.float32: 1e-5}.get(dtype, 1e-10)
    assert_near(first, step(model, x), tolerance)  # with the masks of the layers by themselves
    assert calls[8:] == [1] * 8


@pytest.mark.parametrize("format", FEW)
def test_autograd_keeps_one_mask_and_one_xa_for_a_group_of_quantised_layers(format):
    def activations(model: nn.Module) -> list[tuple[int, ...]]:
        model(some_x(format))
        kept = saved_bytes(lambda: model.blocks[0](some_x(format)))
        return sorted(shape for shape, _ in kept if shape in ((5, 8), (5, 3), (5, 9)))

    options = {"format": format, "r": 3, "lora_dropout": 0.3, "init_lora_weights": True}
    assert activations(net(2, **options)) == [(5, 3), (5, 8), (5, 8), (5, 9)]
    assert activations(net(2, share_inputs=False, **options)) == [(5, 3)] * 4 + [(5, 8)] * 4


def test_masks(each_alone):
    """Layers that read one tensor share a mask, computed together or not; a layer called again draws another."""
    block = net(lora_dropout=0.5).blocks[0]
    for layer in (block.q, block.k):
        layer.load_state_dict(block.v.state_dict())
    for _ in range(2):
        x = some_x()
        q = block.q(x)
        assert torch.equal(q, block.v(x)) and torch.equal(q, block.k(x))
        assert not torch.equal(q, block.q(x))
        each_alone()


def test_the_adapters_in_use_share(calls):
    """tests/contracts has the numbers of layers of different sizes and ranks."""
    model = net()
    inject(model, LoraConfig(target_modules=["q", "k"], rank_pattern={"k": 5}), "second")
    for name, expected in (("second", [2]), ("default", [3, 1])):
        set_adapter(model, name)
        model(some_x())
        calls.clear()
        model(some_x())
        assert calls == expected
    delete_adapter(model, "second")
    calls.clear()
    model(some_x())
    assert calls == [3, 1]


# --- which layers -----------------------------------------------------------------------------------------------------


def test_groups_are_found_and_reported():
    model = net()
    assert groups(model) == set() and len(input_groups(model).alone) == 4
    model(some_x())
    model(some_x())
    text = "shared inputs: 3 layers in 1 groups are computed together\n    "
    text += "blocks.0.q, blocks.0.k, blocks.0.v\n  1 alone\n    blocks.0.o"
    assert groups(model) == {"qkv"} and str(input_groups(model)) == text
    assert groups(merge(model.eval())) == set() and groups(unmerge(model)) == {"qkv"}
    inject(model, LoraConfig(target_modules=["q", "k", "v", "o"]), "second")
    assert groups(model) == {"qkv"}  # which calls have taught
    inject(model, LoraConfig(target_modules=["q", "k", "v", "o"]), "third", share_inputs=False)
    assert not input_groups(model)


def test_layers_that_are_no_candidates(calls):
    layers = nn.Sequential(nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, WIDTH))  # which follow each other
    model = inject(nn.Sequential(layers), LoraConfig(target_modules=["0.0", "0.1"]))
    alone = net(share_inputs=False)
    for one in (model, alone, net(target_modules=["q"])):
        one(some_x())
        assert not input_groups(one)
    assert calls == [1] * 7
    assert_close(step(net(), some_x()), step(alone, some_x()))


def dora(model: Net) -> None:
    inject(model, LoraConfig(r=4, target_modules=["k"], use_dora=True), "other")
    set_adapter(model, ["default", "other"])


@pytest.mark.parametrize(
    ("targets", "change", "expected"),
    [
        ("qv", dora, [2, 1]),  # the second is the DoRA layer's own
        ("qkv", lambda model: model.blocks[0].k.compile(backend="eager"), [2, 1]),
        ("qkv", lambda model: setattr(model.blocks[0].k.adapters.default, "lora_dropout", 0.3), [2, 1]),
        ("qkv", lambda model: parametrized(model.blocks[0].k.adapters.default, "lora_A", nn.Identity()), [2, 1]),
        ("qkv", lambda model: model.blocks[0].k.base_layer.register_forward_hook(lambda *_: None), [2]),
    ],
    ids=["DoRA", "compiled", "other dropout", "parametrized", "hook on a base layer"],
)
def test_a_layer_that_computes_otherwise_is_left_out(targets, change, expected, calls):
    model = net(target_modules=list(targets))
    block = model.blocks[0]
    change(model)
    for _ in range(3):
        calls.clear()
        one = some_x() + 0
        y = block.q(one), block.k(one), block.v(one)
    assert calls == expected and groups(model) == {"qv"}
    assert_close({"q": y[0], "v": y[2]}, {"q": block.q(one), "v": block.v(one)})


def test_cross_attention_shares_keys_and_values(calls):
    model, x, memory = net(), some_x(), some_x() + 1
    for _ in range(3):
        model.blocks[0](x, memory)
    assert groups(model) == {"kv"}
    assert calls == [4, 3, 1] + [1, 2, 1] * 2


def test_groups_are_divided_for_good(calls):
    """Calls that differ every time would otherwise compute, every second time, what nobody takes."""
    model = net(target_modules=["q", "k", "v"])
    block = model.blocks[0]
    for names in ("qk", "qk", "qkv", "qkv"):
        one = some_x() + 0
        for name in names:
            getattr(block, name)(one)
    assert calls == [3, 2, 2, 1, 2, 1] and groups(model) == {"qk"}


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


# --- computed alone ---------------------------------------------------------------------------------------------------


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


def test_quantised_layers_that_share_nothing():
    model, seen = net(2, format="nf4", skip=("v",)), []
    for block in model.blocks:
        block.k.base_layer.register_forward_hook(lambda *_: seen.append(1))
    for _ in range(2):
        model(some_x("nf4"))
    assert len(seen) == 4  # the hooks see their layers' calls, and no others
    assert groups(model) == set()


CHANGES = ["lora_A", "lora_B", "weight", "bias", "frozen", "x", "grad", "autocast", "adapter", "replaced", "eval"]
OF_QUANTISED = ["eval of the base layer", "weight in bytes", "another base layer"]


@pytest.mark.parametrize("what", [*CHANGES, *OF_QUANTISED])
def test_a_change_between_the_calls_has_effect(what):
    format = "int8" if what in OF_QUANTISED else None
    model = net(2, format=format, lora_dropout=0.5 if what == "eval" else 0.0)
    x = some_x(format).requires_grad_()
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
    elif what == "eval of the base layer":
        k.base_layer.eval()
    elif what == "weight in bytes":
        k.base_layer.weight.mul_(0)
    elif what == "another base layer":
        k.base_layer = model.blocks[0].v.base_layer
    with torch.set_grad_enabled(what != "grad"), torch.autocast("cpu", enabled=what == "autocast"):
        y = k(x)
        alone = k(x)
    assert y.dtype == alone.dtype
    assert y.requires_grad == alone.requires_grad
    torch.testing.assert_close(y, alone)
    if y.requires_grad:
        y.sum().backward()
        assert (adapter.lora_A.grad is None) == (what in ("frozen", "adapter"))


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
    model(x)
    assert groups(model) == {"qkv"}


@pytest.mark.cpu_only("streams are stand-ins")
@pytest.mark.parametrize("what", ["current_stream", "is_current_stream_capturing"])
def test_no_output_of_another_stream_or_of_a_graph_is_taken(what, calls, monkeypatch):
    model, x = net(), some_x()
    model(x)
    calls.clear()
    monkeypatch.setattr(torch.Tensor, "is_cuda", True)
    answers = {"current_stream": "first", "is_current_stream_capturing": False}
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: answers["current_stream"])
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: answers["is_current_stream_capturing"])
    x, block = some_x(), model.blocks[0]
    block.q(x)
    block.k(x)
    answers[what] = "second" if what == "current_stream" else True
    block.v(x)
    assert calls == [3, 1]  # k took the output of the first call, v did not
