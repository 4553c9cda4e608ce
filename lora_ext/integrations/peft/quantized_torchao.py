"""A subclass like those in layers.py, for base layers quantised by torchao."""

from __future__ import annotations

from peft.tuners.lora import torchao as peft_layers

from lora_ext.integrations.peft.linear import LinearForward
from lora_ext.integrations.peft.merging import ExactMerging


class TorchaoLoraLinear(LinearForward, ExactMerging, peft_layers.TorchaoLoraLinear):
    """Over ``nn.Linear`` with a weight of torchao. It merges without ``get_apply_tensor_subclass``, too."""
