"""Subclasses of PEFT's LoRA layers, with the same names, for a layer's ``__class__``."""

from __future__ import annotations

from peft.tuners.lora import layer as peft_layers

from lora_ext.integrations.peft.embedding import EmbeddingForward
from lora_ext.integrations.peft.linear import LinearForward
from lora_ext.integrations.peft.merging import ExactMerging
from lora_ext.integrations.peft.parameter import ParameterForward


class Linear(LinearForward, ExactMerging, peft_layers.Linear):
    """Over ``nn.Linear``, transformers' ``Conv1D``, and every other layer that PEFT adapts with ``lora.Linear``."""


class Embedding(EmbeddingForward, ExactMerging, peft_layers.Embedding):
    """Over ``nn.Embedding``."""


class _Conv(ExactMerging):
    """Keeps PEFT's forward, whose two convolutions dominate: fusing the second with scaling and sum saved only 1 to 5 %
    of a 3x3 layer's time."""

    def why_not_forward(self) -> str:
        return "convolutions take the time, and PEFT's are as fast"


class Conv1d(_Conv, peft_layers.Conv1d):
    pass


class Conv2d(_Conv, peft_layers.Conv2d):
    pass


class Conv3d(_Conv, peft_layers.Conv3d):
    pass


class ParamWrapper(ParameterForward, peft_layers.ParamWrapper):
    """Over a module with a parameter that ``target_parameters`` names: forward only."""
