"""The bottleneck module of adapters, and the base of methods that insert it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from lora_ext._common.printable import shown
from lora_ext._ops.bottleneck import ACTIVATIONS, bottleneck
from lora_ext.methods.architectures import Architecture, architecture_of, hidden_size, layers_of, weight_of
from lora_ext.methods.base import Method, check_at_least
from lora_ext.methods.inserted import Inserted, Insertion, new_parameter_dtype


class Bottleneck(Inserted):
    """``residual + up(activation(down(x)))`` with biases; ``up`` starts at zero, so nothing is added at first.

    Args:
        size: number of hidden features.
        activation: one of ``relu``, ``gelu``, ``silu``, ``identity``.
        like: tensor with the inputs' last dimension and device; the dtype is the same, but float32 for 16-bit ones.
    """

    def __init__(self, size: int, activation: str, like: Tensor) -> None:
        super().__init__()
        dtype = new_parameter_dtype(like)
        self.activation = activation
        self.down = nn.Linear(like.shape[-1], size, device=like.device, dtype=dtype)
        self.up = nn.Linear(size, like.shape[-1], device=like.device, dtype=dtype)
        nn.init.zeros_(self.down.bias)
        nn.init.zeros_(self.up.weight)
        nn.init.zeros_(self.up.bias)

    def forward(self, x: Tensor, residual: Tensor) -> Tensor:
        weights = self.down.weight, self.down.bias, self.up.weight, self.up.bias
        return bottleneck(x, *weights, self.activation, None if residual is x else residual)

    def adapted(self, h: Tensor) -> Tensor:
        """Returns the replacement of ``h``, the host's output."""
        return self(h, h)

    def leave(self, host: nn.Module, args: tuple, kwargs: dict[str, Any], output: Any) -> Any:
        """Adapts the host's output, or the first entry if it is a tuple."""
        if isinstance(output, tuple):
            return (self.adapted(output[0]), *output[1:])
        return self.adapted(output)

    def extra_repr(self) -> str:
        return f"activation={self.activation}"


@dataclass(frozen=True)
class BottleneckMethod(Method):
    """Base of the methods that insert bottlenecks.

    Args:
        bottleneck_size: the paper's ``r``: number of hidden features.
        activation: activation of the hidden features.
    """

    bottleneck_size: int = 16
    activation: str = "relu"

    def __post_init__(self) -> None:
        check_at_least(self.name, 1, bottleneck_size=self.bottleneck_size)
        if not isinstance(self.activation, str) or self.activation not in ACTIVATIONS:
            raise ValueError(
                f"{self.name}: activation is {shown(self.activation)}, want one of {', '.join(ACTIVATIONS)}"
            )

    def places(self, architecture: Architecture) -> list[str]:
        """Returns the paths of the modules in a layer that get a bottleneck; "" is the layer itself."""
        raise NotImplementedError

    def new_bottleneck(self, architecture: Architecture, like: Tensor) -> Bottleneck:
        return Bottleneck(self.bottleneck_size, self.activation, like)

    def adapted_layers(self, model: nn.Module) -> list[tuple[str, nn.Module]]:
        """Returns ``(path, layer)`` of the layers that get adapters."""
        return layers_of(model, architecture_of(model, self.name))

    def insertions(self, model: nn.Module) -> list[Insertion]:
        architecture = architecture_of(model, self.name)
        found = []
        for path, layer in self.adapted_layers(model):
            like = weight_of(layer, model)
            for place in self.places(architecture):
                host, bottleneck = layer.get_submodule(place), self.new_bottleneck(architecture, like)
                found.append(Insertion(f"{path}.{place}".rstrip("."), host, "bottleneck", bottleneck))
        return found

    def count(self, model: nn.Module) -> int:
        """``L_Adpt * (2 * d_model * r + r + d_model)``, section 5.1 of the paper."""
        architecture, d_model, r = architecture_of(model, self.name), hidden_size(model), self.bottleneck_size
        adapters = len(self.adapted_layers(model)) * len(self.places(architecture))
        return adapters * (2 * d_model * r + r + d_model)
