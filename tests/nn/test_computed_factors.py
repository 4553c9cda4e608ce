"""Factors that torch.nn.utils computes in every call: pruned, normalised or parametrized ones."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize, prune, spectral_norm

from lora_ext import LoraConfig, inject

TARGETS = ["embed", "conv", "attention", "q", "k"]


class Net(nn.Module):
    """A layer of each kind; ``q`` and ``k`` read one tensor."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(9, 4)
        self.conv = nn.Conv1d(4, 4, 3, padding=1)
        self.attention = nn.MultiheadAttention(4, 2, batch_first=True)
        self.q, self.k = nn.Linear(4, 3), nn.Linear(4, 3)

    def forward(self, ids: Tensor) -> Tensor:
        x = self.conv(self.embed(ids).transpose(1, 2)).transpose(1, 2)
        x = self.attention(x, x, x)[0]
        return self.q(x) * self.k(x)


class Doubled(nn.Module):
    def forward(self, value: Tensor) -> Tensor:
        return 2 * value


def adapted() -> nn.Module:
    torch.manual_seed(0)
    return inject(Net().double(), LoraConfig(r=2, target_modules=TARGETS, init_lora_weights=False))


def adapter_of(model: nn.Module, name: str) -> nn.Module:
    return model.get_submodule(name).adapters.default


@pytest.mark.parametrize("compute", ["parametrized", "spectral_norm", "pruned"])
@pytest.mark.parametrize("factor", ["lora_A", "lora_B"])
@pytest.mark.parametrize("name", TARGETS)
def test_factors_are_computed_in_every_call(name, factor, compute):
    model, plain, ids = adapted().eval(), adapted().eval(), torch.randint(9, (2, 5))
    adapter = adapter_of(model, name)
    if compute == "parametrized":
        parametrize.register_parametrization(adapter, factor, Doubled())
        stored = adapter.parametrizations[factor].original
        with torch.no_grad():
            getattr(adapter_of(plain, name), factor).mul_(2)
        for _ in range(2):  # the first call may decide that q and k share their input
            torch.testing.assert_close(model(ids), plain(ids))
    else:
        prune.l1_unstructured(adapter, factor, 0.5) if compute == "pruned" else spectral_norm(adapter, factor)
        stored = getattr(adapter, f"{factor}_orig")
    for _ in range(2):  # a factor that is computed once has one backward
        model.zero_grad()
        model(ids).square().sum().backward()
        assert stored.grad.abs().max() > 0
        before = model(ids)
        with torch.no_grad():
            stored.copy_(torch.randn_like(stored))
        assert not torch.allclose(model(ids), before)
