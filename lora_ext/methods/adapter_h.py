"""Adapters after Houlsby et al. 2019 (arXiv 1902.00751), the paper's Adapter^H."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from lora_ext.methods.architectures import Architecture
from lora_ext.methods.bottleneck import BottleneckMethod


@dataclass(frozen=True)
class AdapterH(BottleneckMethod):
    """Bottlenecks after attention and after the MLP of every layer, before the residual is added.

    ``h + up(activation(down(h)))``, where ``h`` is the branch's output, to which the residual stream is added.
    """

    activation: str = "silu"
    name: ClassVar[str] = "adapter-h"

    def places(self, architecture: Architecture) -> list[str]:
        return [architecture.attention_output, architecture.mlp_output]
