"""Axolotl's autograd function (axolotl.kernels.lora.LoRA_O), called as its patched attention calls it.

``apply_lora_o`` reads weight, bias, A, B, scaling and dropout from a PEFT layer. Releases before 0.16 have no dropout.
"""

from __future__ import annotations

import importlib

from torch import Tensor, nn

from harness.attention_output import AttentionOutput
from harness.contestants import make_peft

PACKAGE = "axolotl"


def load():
    return importlib.import_module("axolotl.kernels.lora").apply_lora_o


def computes(dropout: float) -> bool:
    return dropout == 0.0 or hasattr(importlib.import_module("axolotl.kernels.lora"), "_apply_dropout")


def make(base: nn.Linear, A: Tensor, B: Tensor, dropout: float) -> nn.Module:
    return AttentionOutput(make_peft(base, A, B, dropout), load())
