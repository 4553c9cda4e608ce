"""LoRAFusion's Triton kernels (lorafusion.ops.lora_v1.fused_linear_lora; EuroSys 2026).

They take ``x`` as [batch, length, features], and a power of two of at least 16 as rank. Their backward reads the mask
also where there is no dropout, and raises. So only training with dropout is measured, and agreement without dropout is
checked with a probability that drops nothing.
"""

from __future__ import annotations

import importlib

from torch import Tensor, nn

from harness.contestants import ALPHA_OVER_R

PACKAGE = "lorafusion"
DROPS_NOTHING = 1e-9


def load():
    return importlib.import_module("lorafusion.ops.lora_v1").fused_linear_lora


def computes(dropout: float) -> bool:
    return dropout > 0.0


class Layer(nn.Module):
    def __init__(self, base: nn.Linear, A: Tensor, B: Tensor, dropout: float) -> None:
        super().__init__()
        self.base, self.dropout = base, dropout or DROPS_NOTHING
        self.lora_A, self.lora_B = nn.Parameter(A.clone()), nn.Parameter(B.clone())
        self.fused_linear_lora = load()

    def forward(self, x: Tensor) -> Tensor:
        factors = (self.lora_A, self.lora_B, ALPHA_OVER_R)
        options = {"dropout_p": self.dropout, "linear_bias": self.base.bias}
        return self.fused_linear_lora(x.unsqueeze(0), self.base.weight, *factors, **options).squeeze(0)


make = Layer
