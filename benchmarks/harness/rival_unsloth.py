"""Unsloth's autograd function (unsloth.kernels.fast_lora.LoRA_W), called as its Llama layers call it.

``apply_lora_o`` reads weight, A, B and scaling from a PEFT layer; it has no dropout and no bias. Importing unsloth
changes Transformers and PEFT in this process.
"""

from __future__ import annotations

import importlib

from torch import Tensor, nn

from harness.attention_output import AttentionOutput
from harness.contestants import make_peft

PACKAGE = "unsloth"


def load():
    return importlib.import_module("unsloth.kernels.fast_lora").apply_lora_o


def computes(dropout: float) -> bool:
    return dropout == 0.0


def make(base: nn.Linear, A: Tensor, B: Tensor, dropout: float) -> nn.Module:
    return AttentionOutput(make_peft(base, A, B, dropout), load())
