"""A frozen parameter of any module and its low-rank adapters."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from lora_ext._common.arguments import checked
from lora_ext._common.sharded import is_partitioned
from lora_ext.nn.active import ActiveAdapters
from lora_ext.nn.adapter import LoraAdapter, materialised
from lora_ext.nn.adapter_layer import TransparentLayer, innermost, layers_around
from lora_ext.nn.base_layer import why_weight_unusable
from lora_ext.nn.layer import LoraLayer, Matrix
from lora_ext.nn.parameter_view import (
    ExpertUpdate,
    NeedsWholeError,
    StackedUpdates,
    call_with_updates,
    call_with_value,
)

if TYPE_CHECKING:
    from lora_ext.config import LoraConfig


class LoraParameter(TransparentLayer, LoraLayer):
    """Calls ``base_layer`` with its parameter ``W`` replaced by ``W + scaling * lora_B @ lora_A`` during the call.

    The parameter is a matrix ``[out_features, in_features]``, or experts ``[num_experts, out_features, in_features]``
    (``[num_experts, in_features, out_features]`` if the module's ``is_transposed`` is true). Each expert has its own
    factors of rank ``r``; as in PEFT, ``lora_A [r * num_experts, in_features]`` concatenates them and ``lora_B
    [out_features, r * num_experts]`` interleaves them.

    The module gets a view of the parameter (:mod:`lora_ext.nn.parameter_view`), and its products with that make no
    tensor of the parameter's size. Other uses make one, and a gradient of that size. Several parameters of a module
    have nested layers. Code that reads the parameter without calling the module sees the
    frozen one.

    Args:
        base_layer: the module, or the layer of another of its parameters.
        parameter_name: name of a parameter of the module itself, with 2 or 3 dimensions.
        adapter: as in :class:`~lora_ext.nn.LoraLinear`, and so are ``adapter_name`` and ``active``.

    Raises:
        TypeError: the parameter cannot be adapted.
    """

    base_kinds = "a module with parameters"

    @checked
    def __init__(
        self,
        base_layer: nn.Module,
        parameter_name: str,
        adapter: LoraAdapter | None = None,
        adapter_name: str = "default",
        active: ActiveAdapters | None = None,
    ) -> None:
        module = innermost(base_layer)
        if reason := self.why_not_parameter(module, parameter_name):
            raise TypeError(f"{type(self).__name__}: {type(module).__name__}: {reason}")
        super().__init__(base_layer, None, adapter_name, active)
        self.parameter_name = parameter_name
        self.place = list(module._parameters).index(parameter_name)
        self._add_first(adapter, adapter_name, active)

    @classmethod
    def adapts(cls, module: nn.Module) -> bool:
        return isinstance(module, nn.Module)

    @classmethod
    def why_not_parameter(cls, module: nn.Module, name: str) -> str | None:
        """Returns why the parameter ``name`` of ``module`` cannot be adapted, or None."""
        if (reason := why_weight_unusable(module, name, reads_values=True)) is not None:
            return reason
        dims = module._parameters[name].dim()
        return None if dims in (2, 3) else f"its {name} has {dims} dimensions, want 2, or 3 with the experts first"

    @classmethod
    def new_adapter_of(
        cls, module: nn.Module, name: str, config: LoraConfig, path: str, device: torch.device | None = None
    ) -> LoraAdapter:
        """Makes a new adapter for the parameter ``name`` of ``module`` at ``path``, on ``device`` if given."""
        num_experts, out_features, in_features = _sizes(module, name)
        r = config.rank_for(path)
        shapes = (r * num_experts, in_features), (out_features, r * num_experts)
        weight = module._parameters[name]
        return LoraAdapter.from_config(config, path, in_features, out_features, weight, device, shapes=shapes)

    def target_name(self, path: str) -> str:
        return f"{path}.{self.parameter_name}"

    @property
    def module(self) -> nn.Module:
        """The module that owns the parameter."""
        return innermost(self.base_layer)

    @property
    def weight(self) -> Tensor:
        return getattr(self.module, self.parameter_name)

    @property
    def bias(self) -> None:
        return None

    @property
    def stores_transposed(self) -> bool:
        return _is_transposed(self.module, self.weight)

    def factor_shapes(self, adapter: LoraAdapter) -> dict[str, tuple[int, ...]]:
        num_experts, out_features, in_features = _sizes(self.module, self.parameter_name)
        rank = adapter.r * num_experts
        return {"lora_A": (rank, in_features), "lora_B": (out_features, rank)}

    def matrices(self) -> dict[str, Matrix]:
        views = {"weight": self.weight}
        if self.weight.dim() == 3:
            views = {f"weight[{i}]": view for i, view in enumerate(self.weight)}
        return {key: Matrix(self.module, self.parameter_name, view) for key, view in views.items()}

    def factors(self, name: str) -> dict[str, tuple[Tensor, Tensor, float]]:
        adapter = self.adapters[name]
        return {
            key: (rhs, lhs, adapter.scaling)
            for key, lhs, rhs in zip(self.matrices(), *self._batched_factors(adapter), strict=True)
        }

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        names = self._applied_to_all()
        if not names:
            return self.base_layer(*args, **kwargs)
        module = self.module
        adapters = [materialised(self.adapters[name]) for name in names]
        updates = [ExpertUpdate(*self._stacked_factors(adapter), adapter.scaling) for adapter in adapters]
        try:
            return call_with_updates(
                self.base_layer, module, self.parameter_name, updates, args, kwargs, self.stores_transposed
            )
        except NeedsWholeError:
            updated = StackedUpdates(self.weight, self.stores_transposed, updates).updated()
            name = self.parameter_name
            if is_partitioned(module._parameters[name]) and not hasattr(type(module), name):
                return call_with_value(self.base_layer, module, name, updated, args, kwargs)
            path = "base_layer." * len(layers_around(self.base_layer)) + name
            return torch.func.functional_call(self.base_layer, {path: updated}, args, kwargs, tie_weights=False)

    def _stacked_factors(self, adapter: LoraAdapter) -> tuple[Tensor, Tensor]:
        """``lora_A [num_experts, r, in_features]`` and ``lora_B [num_experts, out_features, r]``."""
        A = adapter.lora_A.unflatten(0, (-1, adapter.r))
        return A, adapter.lora_B.unflatten(1, (adapter.r, -1)).permute(2, 0, 1)

    def _batched_factors(self, adapter: LoraAdapter) -> tuple[Tensor, Tensor]:
        """``[num_experts, rows, r]`` and ``[num_experts, r, cols]``; their product is the update without scaling."""
        A, B = self._stacked_factors(adapter)
        return (A.transpose(1, 2), B.transpose(1, 2)) if self.stores_transposed else (B, A)

    def extra_repr(self) -> str:
        return f"parameter_name={self.parameter_name!r}, {self._repr_of_state()}"


def _is_transposed(module: nn.Module, weight: Tensor) -> bool:
    return weight.dim() == 3 and bool(getattr(module, "is_transposed", False))


def _sizes(module: nn.Module, name: str) -> tuple[int, int, int]:
    """Returns ``(num_experts, out_features, in_features)``."""
    weight = module._parameters[name]
    num_experts, rows, cols = (1, *weight.shape) if weight.dim() == 2 else weight.shape
    return (num_experts, cols, rows) if _is_transposed(module, weight) else (num_experts, rows, cols)
