"""Layers that read one tensor are computed together: what is computed, and for which layers."""

from __future__ import annotations

import copy

import pytest
import torch
from support.shared_inputs import WIDTH, Net, assert_close, groups, net, some_x, step
from torch import Tensor, nn

from lora_ext import LoraConfig, inject, set_adapter
from lora_ext.adapters import input_groups, merge_and_unload
from lora_ext.nn.input_groups import ANOTHER_WAY, APART, NOT_YET

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
    assert groups(model) == {"qkvo": NOT_YET}
    model(some_x())
    model(some_x())
    assert groups(model) == {"qkv": "", "o": APART}
    text = str(input_groups(model))
    assert "3 layers in 1 groups are computed together" in text
    assert f"1 alone: {APART}\n    blocks.0.o" in text


def test_a_layer_of_another_kind_is_no_neighbour(calls):
    model, x = net(target_modules=["q", "v"]), some_x()
    inject(model, LoraConfig(r=4, target_modules=["k"], use_dora=True), "other")
    set_adapter(model, ["default", "other"])
    block = model.blocks[0]
    for _ in range(2):
        block.q(x), block.k(x), block.v(x)
    assert calls == [2, 1] * 2  # the second is the DoRA layer's own
    assert groups(model) == {"qv": ""}
    assert groups(net(target_modules=["q"])) == {}


def test_a_layer_that_is_compiled_by_itself_is_left_out(calls):
    model, x = net(target_modules=["q", "k", "v"]), some_x()
    block = model.blocks[0]
    alone = block.k(x)
    block.k.compile(backend="eager")
    for _ in range(3):
        _, k, _ = block.q(x), block.k(x), block.v(x)
    assert torch.equal(k, alone)
    assert groups(model)["k"] == ANOTHER_WAY and groups(model)["qv"] == ""


def test_cross_attention_shares_keys_and_values(calls):
    model, x, memory = net(), some_x(), some_x() + 1
    for _ in range(3):
        model.blocks[0](x, memory)
    assert groups(model) == {"q": APART, "kv": "", "o": APART}
    assert calls == [4, 3, 1] + [1, 2, 1] * 2


def test_groups_follow_the_calls(calls):
    model = net(target_modules=["q", "k", "v"])
    block = model.blocks[0]
    for _ in range(3):  # v is left out
        one = some_x() + 0
        block.q(one), block.k(one)
    assert calls == [3, 2, 2] and groups(model) == {"qk": "", "v": APART}
    calls.clear()
    for _ in range(3):
        one = some_x() + 0
        block.q(one), block.k(one), block.v(one)
    assert calls == [2, 1, 3, 3] and groups(model) == {"qkv": ""}


def test_calls_that_differ_every_time_end_alone(calls):
    """Otherwise every second call would compute an output that nobody takes."""
    model = net(target_modules=["q", "k", "v"])
    block = model.blocks[0]
    for i in range(12):
        one = some_x() + 0
        block.q(one), block.k(one)
        if i % 2:
            block.v(one)
    assert calls[-3:] == [2, 2, 1]


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
