"""The bottleneck that adapters consist of, and where it is put."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from lora_ext._common.printable import shown
from lora_ext._ops.bottleneck import ACTIVATIONS, bottleneck
from lora_ext.methods.architectures import Architecture, architecture_of, hidden_size, layers_of, weight_of
from lora_ext.methods.base import Method, check_at_least
from lora_ext.methods.inserted import Inserted, Insertion, own_dtype


class Bottleneck(Inserted):
    """``residual + up(activation(down(x)))`` with biases; ``up`` is zero at first, and so is what it adds.

    Args:
        size: of the hidden layer.
        activation: one of ``relu``, ``gelu``, ``silu``, ``identity``.
        like: its last dimension is that of the inputs; it gives device and dtype, float32 where that is a 16-bit one.
    """

    def __init__(self, size: int, activation: str, like: Tensor) -> None:
        super().__init__()
        dtype = own_dtype(like)
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
        """What takes the place of ``h``, which the host returns."""
        return self(h, h)

    def leave(self, host: nn.Module, args: tuple, kwargs: dict[str, Any], output: Any) -> Any:
        """Adds to what the host returns, or to the first thing that it does."""
        if isinstance(output, tuple):
            return (self.adapted(output[0]), *output[1:])
        return self.adapted(output)

    def extra_repr(self) -> str:
        return f"activation={self.activation}"


@dataclass(frozen=True)
class BottleneckMethod(Method):
    """What the kinds of adapters have in common.

    Args:
        bottleneck_size: the paper's ``r``: features between the two products.
        activation: of those features.
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
        """Modules in a layer, "" the layer itself, that are to have a bottleneck each."""
        raise NotImplementedError

    def new_bottleneck(self, architecture: Architecture, like: Tensor) -> Bottleneck:
        return Bottleneck(self.bottleneck_size, self.activation, like)

    def adapted_layers(self, model: nn.Module) -> list[tuple[str, nn.Module]]:
        """``(path, layer)`` of the layers that get adapters."""
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
