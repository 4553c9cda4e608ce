"""A frozen linear layer and its low-rank adapters."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from lora_ext import functional
from lora_ext._common.sharded import full_shape, is_fully_sharded, is_sharded
from lora_ext.nn import base_product
from lora_ext.nn.adapter import Device, LoraAdapter, MaterialisedFactors, materialised, materialised_factors
from lora_ext.nn.base_layer import is_conv1d, own_copy, plain_linear, why_not_merge, why_output_unusable
from lora_ext.nn.layer import LoraLayer, Matrix
from lora_ext.nn.rows import LayerSlots, RowChoice, RowUpdate, add_chosen, linear_with_chosen, row_choice
from lora_ext.nn.shared_inputs import Operands, SharesInputs, compute_alone, frozen_product, neighbours_of
from lora_ext.nn.tensor_parallel import add_split_update, split_dim, split_factors
from lora_ext.nn.updates import Update, joined, sum_of_biases
from lora_ext.quantized import quantized_weight

if TYPE_CHECKING:
    from lora_ext.config import LoraConfig


class OverLinear(LoraLayer):
    """Says which linear layers can be adapted and what their sizes are; LoRA and DoRA add what they compute."""

    base_kinds = "an nn.Linear or Conv1D"

    @classmethod
    def adapts(cls, module: nn.Module) -> bool:
        return is_linear(module)

    @classmethod
    def why_not(cls, module: nn.Module, config: LoraConfig) -> str | None:
        if (weight := quantized_weight(module)) is not None:
            return weight.why_not_adapt()
        return super().why_not(module, config) or why_output_unusable(module)

    def add_adapter(self, name: str, adapter: LoraAdapter) -> None:
        super().add_adapter(name, adapter)
        if (weight := quantized_weight(self.base_layer)) is not None:
            weight.keep_stored()

    def why_not_merge(self) -> str | None:
        weight = quantized_weight(self.base_layer)
        kind = nn.Linear if weight is None else weight.plain_forward
        reason = super().why_not_merge() or why_not_merge(self.base_layer, kind)
        return reason if reason or weight is None else weight.why_not_adapt() or weight.why_not_quantize()

    @property
    def in_features(self) -> int:
        return linear_sizes(self.base_layer)[0]

    @property
    def out_features(self) -> int:
        return linear_sizes(self.base_layer)[1]

    def extra_repr(self) -> str:
        return f"in_features={self.in_features}, out_features={self.out_features}, {self._repr_of_state()}"


class LoraLinear(SharesInputs, OverLinear):
    """``base_layer(x) + scaling * dropout(x) @ lora_A.T @ lora_B.T`` with the base layer frozen, in fused kernels.

    Active adapters are computed together with the base layer, as one update, if they have one dropout and one dtype
    (:func:`~lora_ext.nn.updates.joined`); each further kind takes another pass over the output. With ``lora_bias`` an
    adapter also adds ``scaling * lora_bias``.

    If a call of the base layer would do more than multiply by its weight (:mod:`lora_ext.nn.base_layer`), or if its
    weight is quantised or split over devices, it is called, with further arguments of the forward, and the update is
    added to a copy of its output.

    Args:
        base_layer: an ``nn.Linear`` or Transformers' ``Conv1D`` (GPT-2); kept, not copied, and frozen.
        adapter: the first adapter, or None.
        adapter_name: the first adapter's name.
        active: names of the active adapters, shared with other layers; by default the first adapter's name.
    """

    slots: LayerSlots | None = None  # adapters of a pool

    @classmethod
    def why_not(cls, module: nn.Module, config: LoraConfig) -> str | None:
        if quantized_weight(module) is None and cls is LoraLinear and split_dim(module) is not None:
            return None
        return super().why_not(module, config)

    @classmethod
    def new_adapter(cls, base_layer: nn.Module, config: LoraConfig, path: str, device: Device = None) -> LoraAdapter:
        adapter = LoraAdapter.from_config(config, path, *linear_sizes(base_layer), base_layer.weight, device)
        if split_dim(base_layer) is not None:
            split_factors(adapter, base_layer.weight)
        return adapter

    @property
    def stores_transposed(self) -> bool:
        return is_conv1d(self.base_layer)

    def matrices(self) -> dict[str, Matrix]:
        matrices = super().matrices()
        return matrices | {"weight": matrices["weight"]._replace(quantized=quantized_weight(self.base_layer))}

    def factors(self, name: str) -> dict[str, tuple[Tensor, Tensor, float]]:
        factors = super().factors(name)
        if self.stores_transposed:  # W.T += (B A).T
            A, B, scaling = factors["weight"]
            factors["weight"] = B.T, A.T, scaling
        return factors

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        if (choice := row_choice(self.active)) is not None:
            return self._forward_rows(choice, x, *args, **kwargs)
        if not (args or kwargs or torch.compiler.is_compiling()) and (operands := self.operands()) is not None:
            # One adapter on a plain or quantised product: together with the layers that read the same x, or alone.
            neighbours = self.__dict__.get("_neighbours")
            return compute_alone(x, operands) if neighbours is None else neighbours.output(self, x, operands)
        names = self._applied()
        if not names:
            return self.base_layer(x, *args, **kwargs)
        adapters = [materialised(self.adapters[name]) for name in names]
        plain = None if args or kwargs else plain_linear(self.base_layer)
        if plain is not None:
            weight, bias = plain
            bias = sum_of_biases(bias, scaled_biases(adapters), weight.dtype)
            return add_updates(x, weight, bias, joined(self._updates(names, adapters)))
        return self._add_to_output(x, self.base_layer(x, *args, **kwargs), names, adapters)

    def operands(self) -> Operands | None:
        adapters, names = self._modules["adapters"]._modules, self.active.names
        if len(names) > 1:
            names = self.active_adapters
        adapter = adapters.get(names[0]) if len(names) == 1 else None
        if adapter is None or self._merged is not None or self._compiled_call_impl is not None:
            return None
        if "ds_id" in self.__dict__:
            return None  # an engine with ZeRO-3 brings the values for a call, see _applied
        state = adapter.__dict__
        factors = state["_parameters"]
        lora_A, lora_B = factors.get("lora_A"), factors.get("lora_B")
        if lora_A is None or lora_B is None or state["_forward_pre_hooks"] or "forward" in state:
            return None  # computed, sharded apart or offloaded
        if self._forward_pre_hooks and is_fully_sharded(self):
            return None  # gathered for its own call only
        base = frozen_product(self._modules["base_layer"])
        if base is None:
            return None
        weight, bias, quantized, is_training = base
        dropout = state["_modules"].get("dropout") if self.training else None
        dropout_p = 0.0 if dropout is None else dropout.p
        lora_bias, scaling = factors.get("lora_bias"), adapter.scaling
        return Operands(weight, bias, lora_A, lora_B, lora_bias, scaling, dropout_p, quantized, is_training)

    def _updates(self, names: Sequence[str], adapters: Sequence[LoraAdapter | MaterialisedFactors]) -> list[Update]:
        updates = []
        for name, adapter in zip(names, adapters, strict=True):
            dropout_p = adapter.lora_dropout if self.training else 0.0
            lora_B = self._full_lora_B(name, adapter.lora_B)
            updates.append(Update(adapter.lora_A, lora_B, adapter.scaling, dropout_p))
        return updates

    def _add_to_output(
        self, x: Tensor, y: Tensor, names: Sequence[str], adapters: Sequence[LoraAdapter | MaterialisedFactors]
    ) -> Tensor:
        """Adds the adapters to a copy of ``y``, the base layer's output."""
        y = own_copy(self, y)
        if is_sharded(weight := self.base_layer._parameters.get("weight")) and not is_fully_sharded(self.base_layer):
            for adapter in adapters:
                y = add_split_update(self, y, x, weight, adapter, adapter.lora_dropout if self.training else 0.0)
            return y
        if (bias := sum_of_biases(None, scaled_biases(adapters), y.dtype)) is not None:
            y = y + bias  # not in place: samples of torch.func.vmap may share y
        x = x.to(device=y.device, dtype=y.dtype)
        for update in joined(self._updates(names, adapters)):
            y = functional.plus_lora_delta(y, x, *update)
        return y

    def _forward_rows(self, choice: RowChoice, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """Computes the forward; each row uses the adapter that ``choice`` gives it."""
        names, slots = self._applied(choice), self.slots if choice.slots else None
        plain = None if args or kwargs else plain_linear(self.base_layer)
        if not names and slots is None:  # no row changes anything here
            return self.base_layer(x, *args, **kwargs) if plain is None else base_product.product(x, *plain)
        _, times = choice.aligned(self, x)
        neighbours = neighbours_of(self) if self.training else None
        seeds = None if neighbours is None else neighbours.seeds(self, x)
        if plain is None:
            y = own_copy(self, self.base_layer(x, *args, **kwargs))
            x = x.to(device=y.device, dtype=y.dtype)
            if names:
                y = add_chosen(y, x, choice, self._row_updates(names), times, seeds)
        elif not names:
            return slots.linear_with_chosen(x, *plain, choice, times)
        else:
            y = linear_with_chosen(x, *plain, choice, self._row_updates(names), times, seeds)
        return y if slots is None else slots.add_chosen(y, x.to(y.dtype), choice, times)

    @property
    def is_needed(self) -> bool:
        return super().is_needed or self.slots is not None

    def _row_updates(self, names: tuple[str, ...]) -> list[RowUpdate]:
        adapters, training, updates = self._modules["adapters"]._modules, self.training, []
        for name in names:
            adapter = adapters[name]
            lora_A, lora_B, bias = materialised_factors(adapter)
            scaling, dropout_p = adapter.scaling, adapter.lora_dropout if training else 0.0
            bias = None if bias is None else scaling * bias
            updates.append(RowUpdate(name, lora_A, self._full_lora_B(name, lora_B), scaling, dropout_p, bias))
        return updates

    def _full_lora_B(self, name: str, lora_B: Tensor) -> Tensor:
        """``lora_B`` of the adapter ``name`` for the whole output: ``[out_features, rows of lora_A]``."""
        return lora_B


def scaled_biases(adapters: Sequence[LoraAdapter]) -> list[Tensor]:
    return [adapter.scaling * adapter.lora_bias for adapter in adapters if adapter.lora_bias is not None]


def add_updates(x: Tensor, weight: Tensor, bias: Tensor | None, updates: list[Update]) -> Tensor:
    """Returns ``x @ weight.T + bias`` plus one or more updates (see :func:`~lora_ext.nn.updates.joined`)."""
    first, *others = updates
    y = functional.lora_linear(x, weight, bias, *first)
    for update in others:
        y = functional.plus_lora_delta(y, x, *update)
    return y


def is_linear(module: nn.Module) -> bool:
    """Returns whether ``module`` is a linear layer of PyTorch or Transformers."""
    return isinstance(module, nn.Linear) or is_conv1d(module)


def linear_sizes(module: nn.Module) -> tuple[int, int]:
    """Returns ``(in_features, out_features)``."""
    if is_conv1d(module):
        in_features, out_features = full_shape(module.weight)
        return in_features, out_features
    return int(module.in_features), int(module.out_features)  # tensors in Transformers' Inkling
