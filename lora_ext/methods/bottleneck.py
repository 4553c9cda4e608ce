"""The bottleneck adapters: of Houlsby, Lin and Pfeiffer, and AdapterDrop; the paper's Adapter^H, ^L, ^P and ^D."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

from torch import Tensor, nn

from lora_ext import functional
from lora_ext._common.messages import shown
from lora_ext._ops.bottleneck import ACTIVATIONS
from lora_ext.methods.architectures import architecture_of, hidden_size, layers_of, weight_of
from lora_ext.methods.base import Inserted, Insertion, Method, check_at_least, new_parameter_dtype


class Bottleneck(Inserted):
    """``residual + up(activation(down(x)))`` with biases; ``up`` starts at zero, so nothing is added at first.

    It has ``size`` hidden features, and the last dimension and device of ``like``.
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
        return functional.bottleneck(x, *weights, self.activation, None if residual is x else residual)

    def adapted(self, h: Tensor) -> Tensor:
        """Returns the replacement of ``h``, the host's output."""
        return self(h, h)

    def leave(self, host: nn.Module, args: tuple, kwargs: dict[str, Any], output: Any) -> Any:
        """Adapts the host's output, or the first entry if it is a tuple."""
        if isinstance(output, tuple):
            return (self.adapted(output[0]), *output[1:])
        return self.adapted(output)


class NormedBottleneck(Bottleneck):
    """``h + up(activation(down(norm(h))))`` with a new LayerNorm."""

    def __init__(self, size: int, activation: str, like: Tensor) -> None:
        super().__init__(size, activation, like)
        self.norm = nn.LayerNorm(like.shape[-1], device=like.device, dtype=self.down.weight.dtype)

    def adapted(self, h: Tensor) -> Tensor:
        return self(self.norm(h.to(self.norm.weight.dtype)).to(h.dtype), h)


class BeforeNorm(Bottleneck):
    """A bottleneck on the LayerNorm that ends a layer: reads its output and adds to its input.

    ``host(z + up(activation(down(host(z)))))``: the structure found by AdapterHub's search.
    """

    def leave(self, host: nn.Module, args: tuple, kwargs: dict[str, Any], output: Any) -> Any:
        return host.forward(self(output, args[0]))  # not host(), whose hook this is


@dataclass(frozen=True)
class BottleneckMethod(Method):
    """Base of the methods that insert bottlenecks."""

    bottleneck_size: int = 16  # the paper's r: number of hidden features
    activation: str = "relu"  # of the hidden features
    places: ClassVar[tuple[str, ...]] = ("layer_output",)  # fields of Architecture: modules that get a bottleneck
    kinds: ClassVar[tuple[type, type]] = (Bottleneck, Bottleneck)  # in layers that begin and that end with a norm

    def __post_init__(self) -> None:
        check_at_least(self.name, 1, bottleneck_size=self.bottleneck_size)
        if not isinstance(self.activation, str) or self.activation not in ACTIVATIONS:
            known = ", ".join(ACTIVATIONS)
            raise ValueError(f"{self.name}: activation is {shown(self.activation)}, want one of {known}")

    def adapted_layers(self, model: nn.Module) -> list[tuple[str, nn.Module]]:
        """Returns ``(path, layer)`` of the layers that get adapters."""
        return layers_of(model, architecture_of(model, self.name))

    def insertions(self, model: nn.Module) -> list[Insertion]:
        architecture = architecture_of(model, self.name)
        found, kind = [], self.kinds[architecture.post_norm]
        for path, layer in self.adapted_layers(model):
            for place in (getattr(architecture, field) for field in self.places):
                module = kind(self.bottleneck_size, self.activation, weight_of(layer, model))
                found.append(Insertion(f"{path}.{place}".rstrip("."), layer.get_submodule(place), "bottleneck", module))
        return found

    def count(self, model: nn.Module) -> int:
        """``L_Adpt * (2 * d_model * r + r + d_model)``, section 5.1 of the paper."""
        adapters, r = len(self.adapted_layers(model)) * len(self.places), self.bottleneck_size
        return adapters * (2 * hidden_size(model) * r + r + hidden_size(model))


@dataclass(frozen=True)
class AdapterH(BottleneckMethod):
    """Bottlenecks after attention and after the MLP of every layer, before the residual is added.

    Houlsby et al. 2019 (arXiv 1902.00751): ``h + up(activation(down(h)))``, where ``h`` is the branch's output, to
    which the residual stream is added.
    """

    activation: str = "silu"
    name: ClassVar[str] = "adapter-h"
    places: ClassVar[tuple[str, ...]] = ("attention_output", "mlp_output")


@dataclass(frozen=True)
class AdapterL(BottleneckMethod):
    """A :class:`NormedBottleneck` at the end of every layer: Lin et al. 2020 (arXiv 2004.03829)."""

    name: ClassVar[str] = "adapter-l"
    kinds: ClassVar[tuple[type, type]] = (NormedBottleneck, NormedBottleneck)

    def count(self, model: nn.Module) -> int:
        """``L_Adpt * (2 * d_model * r + r + d_model) + 2 * L_LN * d_model``, with one LayerNorm per adapter."""
        return super().count(model) + 2 * len(self.adapted_layers(model)) * hidden_size(model)


@dataclass(frozen=True)
class AdapterP(BottleneckMethod):
    """A bottleneck at the end of every layer, after the MLP: Pfeiffer et al. 2021 (arXiv 2005.00247).

    If layers end with a LayerNorm, between the residual sum ``z`` and the norm:
    ``norm(z + up(activation(down(norm(z)))))``. If they begin with one: ``z + up(activation(down(z)))``.
    """

    name: ClassVar[str] = "adapter-p"
    kinds: ClassVar[tuple[type, type]] = (Bottleneck, BeforeNorm)


@dataclass(frozen=True)
class AdapterDrop(AdapterP):
    """Pfeiffer's adapters in the upper layers; the lower need no backward: Rücklé et al. 2021 (arXiv 2010.11918)."""

    drop_layers: int | None = None  # layers without adapters, from the input; None: 5 of 12, as in that paper
    name: ClassVar[str] = "adapter-drop"

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.drop_layers is not None:
            check_at_least(self.name, 0, drop_layers=self.drop_layers)

    def adapted_layers(self, model: nn.Module) -> list[tuple[str, nn.Module]]:
        layers = super().adapted_layers(model)
        dropped = round(5 / 12 * len(layers)) if self.drop_layers is None else self.drop_layers
        if dropped >= len(layers):
            raise ValueError(f"{self.name}: drop_layers is {dropped}, but the model has {len(layers)} layers")
        return layers[dropped:]
