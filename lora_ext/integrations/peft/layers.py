"""Subclasses of PEFT's LoRA layers that a layer's ``__class__`` is set to. Their names are those of PEFT's classes."""

from __future__ import annotations

from peft.tuners.lora import layer as peft_layers

from lora_ext.integrations.peft.embedding import EmbeddingForward
from lora_ext.integrations.peft.linear import LinearForward
from lora_ext.integrations.peft.merging import ExactMerging


class Linear(LinearForward, ExactMerging, peft_layers.Linear):
    """Over ``nn.Linear``, transformers' ``Conv1D``, and whatever else PEFT adapts by its ``lora.Linear``."""


class Embedding(EmbeddingForward, ExactMerging, peft_layers.Embedding):
    """Over ``nn.Embedding``."""


class _Conv(ExactMerging):
    """PEFT's forward: its two convolutions take the time. One product in place of the second convolution, the scaling
    and the sum saved 1 to 5 % of a 3x3 layer's time."""

    def forward_obstacle(self) -> str:
        return "the time is that of convolutions, and PEFT's own are as fast"


class Conv1d(_Conv, peft_layers.Conv1d):
    """Over ``nn.Conv1d``: merge and unmerge alone."""


class Conv2d(_Conv, peft_layers.Conv2d):
    """Over ``nn.Conv2d``: merge and unmerge alone."""


class Conv3d(_Conv, peft_layers.Conv3d):
    """Over ``nn.Conv3d``: merge and unmerge alone."""
