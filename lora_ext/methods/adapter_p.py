"""Adapters after Pfeiffer et al. 2021 (arXiv 2005.00247), the paper's Adapter^P."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

from torch import Tensor, nn

from lora_ext.methods.architectures import Architecture
from lora_ext.methods.bottleneck import Bottleneck, BottleneckMethod


class BeforeNorm(Bottleneck):
    """A bottleneck on the LayerNorm that ends a layer: reads its output and adds to its input.

    ``host(z + up(activation(down(host(z)))))``: the structure found by AdapterHub's search.
    """

    def leave(self, host: nn.Module, args: tuple, kwargs: dict[str, Any], output: Any) -> Any:
        return host.forward(self(output, args[0]))  # not host(), whose hook this is


@dataclass(frozen=True)
class AdapterP(BottleneckMethod):
    """A bottleneck at the end of every layer, after the MLP.

    If layers end with a LayerNorm, between the residual sum ``z`` and the norm:
    ``norm(z + up(activation(down(norm(z)))))``. If they begin with one: ``z + up(activation(down(z)))``.
    """

    name: ClassVar[str] = "adapter-p"

    def places(self, architecture: Architecture) -> list[str]:
        return [architecture.layer_output]

    def new_bottleneck(self, architecture: Architecture, like: Tensor) -> Bottleneck:
        kind = BeforeNorm if architecture.post_norm else Bottleneck
        return kind(self.bottleneck_size, self.activation, like)
