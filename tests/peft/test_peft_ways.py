"""A layer alone and in a mixed batch adds up in another order each: the same to rounding, not in bits.

Alone, our product has the adapter in it. In a mixed batch the updates are added to the product, which is PyTorch's for
small weights.
test_instruction_sets.py runs these tests with the other product by the frozen weight, too.
"""

from __future__ import annotations

import copy

import pytest
import torch
from support.layers import assert_errors_as_plain
from support.peft_pairs import config, pair
from torch import Tensor, nn

pytestmark = [pytest.mark.full, pytest.mark.cpu_only("is about products on the CPU")]


def net() -> nn.Module:
    return nn.Sequential(nn.Linear(10, 20), nn.ReLU(), nn.Linear(20, 2))


@pytest.mark.parametrize("way", ["alone", "mixed"])
def test_mixed_batches_of_adapters_with_different_layers(way):
    names = ["__base__", "default", "1"]

    def output(model: nn.Module, x: Tensor) -> Tensor:
        if way == "mixed":
            return model(x, adapter_names=3 * names)
        y = torch.empty(9, 2, dtype=x.dtype)
        with model.disable_adapter():
            y[::3] = model(x)[::3]
        for i, name in enumerate(names[1:], start=1):
            model.set_adapter(name)
            y[i::3] = model(x)[i::3]
        return y

    results = []
    with torch.no_grad():
        for _ in range(20):  # few numbers of one model may be exact by chance
            theirs, ours = pair(net(), config(target_modules=["0"]), config(target_modules=["0", "2"], r=16))
            x = torch.arange(90.0).view(9, 10)  # the input of PEFT's tests
            exact = output(copy.deepcopy(theirs).double(), x.double())
            results.append(({"y": output(ours, x)}, {"y": exact}, {"y": output(theirs, x)}))
    assert_errors_as_plain(results, torch.float32, torch.float32)


def test_rows_without_an_adapter_have_the_bits_of_the_base_model():
    """In layers of small weights, of which PyTorch's product is used."""
    _, ours = pair(net(), config(target_modules=["0", "2"]))
    x, base = torch.randn(9, 10), copy.deepcopy(ours).unload()
    with torch.no_grad():
        mixed = ours(x, adapter_names=3 * ["__base__", "default", "default"])
        assert torch.equal(mixed[::3], base(x)[::3])
