"""BitFit (Ben Zaken et al. 2021, arXiv 2106.10199)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import nn

from lora_ext.methods.base import Method, head_paths
from lora_ext.methods.full import parameters_outside
from lora_ext.model.bare_model import BareModel, root_module


@dataclass(frozen=True)
class BitFit(Method):
    """Trains the biases only."""

    name: ClassVar[str] = "bitfit"

    def trained_parameters(self, bare: BareModel) -> dict[str, nn.Parameter]:
        outside = parameters_outside(bare, head_paths(bare))
        biases = {path: parameter for path, parameter in outside.items() if path.rpartition(".")[2].endswith("bias")}
        if not biases:
            raise TypeError(
                f"bitfit: {type(bare.root).__name__} has no biases to train; BERT, RoBERTa and GPT-2 have, and Llama "
                "with attention_bias=True or mlp_bias=True"
            )
        return biases

    def count(self, model: nn.Module) -> int:
        """Counts the elements of all trained biases."""
        return sum(bias.numel() for bias in self.trained_parameters(BareModel(root_module(model))).values())
