"""Adapters after Lin et al. 2020 (arXiv 2004.03829), the paper's Adapter^L."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor, nn

from lora_ext.methods.architectures import Architecture, hidden_size
from lora_ext.methods.bottleneck import Bottleneck, BottleneckMethod


class NormedBottleneck(Bottleneck):
    """``h + up(activation(down(norm(h))))`` with a new LayerNorm."""

    def __init__(self, size: int, activation: str, like: Tensor) -> None:
        super().__init__(size, activation, like)
        self.norm = nn.LayerNorm(like.shape[-1], device=like.device, dtype=self.down.weight.dtype)

    def adapted(self, h: Tensor) -> Tensor:
        return self(self.norm(h.to(self.norm.weight.dtype)).to(h.dtype), h)


@dataclass(frozen=True)
class AdapterL(BottleneckMethod):
    """A bottleneck with a new LayerNorm at the end of every layer: ``h + up(activation(down(norm(h))))``."""

    name: ClassVar[str] = "adapter-l"

    def places(self, architecture: Architecture) -> list[str]:
        return [architecture.layer_output]

    def new_bottleneck(self, architecture: Architecture, like: Tensor) -> Bottleneck:
        return NormedBottleneck(self.bottleneck_size, self.activation, like)

    def count(self, model: nn.Module) -> int:
        """``L_Adpt * (2 * d_model * r + r + d_model) + 2 * L_LN * d_model``, with one LayerNorm per adapter."""
        return super().count(model) + 2 * len(self.adapted_layers(model)) * hidden_size(model)
