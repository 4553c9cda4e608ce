"""Exported programs of models with quantised layers."""

from __future__ import annotations

import pytest
import torch
from support.quantized import QUANTIZE, quantized_copy
from torch import Tensor, nn

from lora_ext import LoraConfig, inject


class Attention(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.q, self.k, self.o = (nn.Linear(64, 64) for _ in range(3))

    def forward(self, x: Tensor) -> Tensor:
        return self.o(torch.tanh(self.q(x) * self.k(x)))


def net(format: str) -> nn.Module:
    config = LoraConfig(r=3, target_modules=["q", "k", "o"], init_lora_weights=False)
    return inject(quantized_copy(Attention(), format), config)


@pytest.mark.full
@pytest.mark.parametrize("strict", [True, False])
@pytest.mark.parametrize("format", list(QUANTIZE))
@torch.no_grad()
def test_exported_programs_compute_the_same(format, strict):
    model, x = net(format).eval(), torch.randn(5, 64)
    expected = model(x)
    if not (strict or format.startswith("torchao")):
        with pytest.raises(RuntimeError, match=r"cannot trace Linear\w+ of bitsandbytes; call .*strict=True"):
            torch.export.export(model, (x,), strict=False)
        with pytest.raises((RuntimeError, AttributeError)):  # if this passes, the refusal above can go
            torch.export.export(model.q.base_layer, (x,), strict=False)
        return
    program = torch.export.export(model, (x,), strict=strict)
    torch.testing.assert_close(program.module()(x), expected)
    ours = [str(node.target) for node in program.graph.nodes if "lora_ext" in str(node.target)]
    assert len(ours) == 3
