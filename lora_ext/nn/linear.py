"""A frozen linear layer and its low-rank adapters."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from lora_ext import functional
from lora_ext.nn.adapter import LoraAdapter
from lora_ext.nn.layer import LoraLayer, has_forward_of

if TYPE_CHECKING:
    from lora_ext.config import LoraConfig


class LoraLinear(LoraLayer):
    """``base_layer(x) + scaling * dropout(x) @ lora_A.T @ lora_B.T`` with the base layer frozen, in fused kernels.

    The first active adapter is computed together with the base layer; each further one takes another pass over the
    output. With ``lora_bias`` an adapter also adds ``scaling * lora_bias``.

    Args:
        base_layer: an ``nn.Linear``, or Transformers' ``Conv1D`` (GPT-2), whose weight is ``[in_features,
            out_features]``; kept, not copied. Its parameters are frozen here.
        adapter: the first adapter, or None.
        adapter_name: the first adapter's name.
        active: names of the adapters in use, shared with other layers; by default the first adapter's name.
    """

    base_kinds = "an nn.Linear or Conv1D"

    @classmethod
    def adapts(cls, module: nn.Module) -> bool:
        return is_linear(module)

    @classmethod
    def why_not(cls, module: nn.Module, config: LoraConfig) -> str | None:
        if is_conv1d(module):
            return "its forward was replaced" if "forward" in vars(module) else super().why_not(module, config)
        return (
            super().why_not(module, config) if has_forward_of(module, nn.Linear) else "its forward is not nn.Linear's"
        )

    @classmethod
    def new_adapter(
        cls, base_layer: nn.Module, config: LoraConfig, path: str, device: torch.device | None = None
    ) -> LoraAdapter:
        return LoraAdapter.from_config(config, path, *linear_sizes(base_layer), base_layer.weight, device)

    @property
    def in_features(self) -> int:
        return linear_sizes(self.base_layer)[0]

    @property
    def out_features(self) -> int:
        return linear_sizes(self.base_layer)[1]

    @property
    def stores_transposed(self) -> bool:
        return is_conv1d(self.base_layer)

    def factors(self, name: str) -> dict[str, tuple[Tensor, Tensor, float]]:
        factors = super().factors(name)
        if self.stores_transposed:  # W.T += (B A).T
            A, B, scaling = factors["weight"]
            factors["weight"] = B.T, A.T, scaling
        return factors

    def forward(self, x: Tensor) -> Tensor:
        names = self._applied()
        if not names:
            return self.base_layer(x)
        base, adapters = self.base_layer, [self.adapters[name] for name in names]
        weight = base.weight if isinstance(base, nn.Linear) else base.weight.T
        updates = [
            (a.lora_A, self._full_lora_B(a), a.scaling, a.lora_dropout if self.training else 0.0) for a in adapters
        ]
        return add_updates(x, weight, add_lora_biases(base.bias, weight.dtype, adapters), updates)

    def _full_lora_B(self, adapter: LoraAdapter) -> Tensor:
        """``lora_B`` for the whole output: ``[out_features, rows of lora_A]``."""
        return adapter.lora_B

    def extra_repr(self) -> str:
        return f"in_features={self.in_features}, out_features={self.out_features}, {self._state()}"


def add_lora_biases(bias: Tensor | None, dtype: torch.dtype, adapters: list[LoraAdapter]) -> Tensor | None:
    """Adds the scaled biases of the adapters to ``bias``, out of place."""
    for adapter in adapters:
        if adapter.lora_bias is not None:
            scaled = (adapter.scaling * adapter.lora_bias).to(dtype)
            bias = scaled if bias is None else bias + scaled
    return bias


def add_updates(
    x: Tensor, weight: Tensor, bias: Tensor | None, updates: list[tuple[Tensor, Tensor, float, float]]
) -> Tensor:
    """``x @ weight.T + bias`` plus one or more updates ``(lora_A, lora_B, scaling, dropout probability)``."""
    y = functional.lora_linear(x, weight, bias, *updates[0])
    for update in updates[1:]:
        y = functional.plus_lora_delta(y, x, *update)
    return y


def is_linear(module: nn.Module) -> bool:
    """Whether ``module`` is a linear layer of PyTorch or Transformers."""
    return isinstance(module, nn.Linear) or is_conv1d(module)


def is_conv1d(module: nn.Module) -> bool:
    """Whether ``module`` is Transformers' ``Conv1D``, a linear layer that stores its weight transposed.

    Decided by the class's name: Transformers may not be installed.
    """
    kind = type(module)
    return kind.__name__ == "Conv1D" and kind.__module__.startswith("transformers.")


def linear_sizes(module: nn.Module) -> tuple[int, int]:
    """Returns ``(in_features, out_features)``."""
    if isinstance(module, nn.Linear):
        return module.in_features, module.out_features
    in_features, out_features = module.weight.shape
    return in_features, out_features
