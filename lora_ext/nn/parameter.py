"""A frozen parameter of any module and its low-rank adapters."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from lora_ext._common.arguments import checked
from lora_ext.nn.adapter import LoraAdapter
from lora_ext.nn.layer import ActiveAdapters, AdapterLayer, LoraLayer, Matrix, TransparentLayer, why_weight_unusable

if TYPE_CHECKING:
    from lora_ext.config import LoraConfig


class LoraParameter(TransparentLayer, LoraLayer):
    """Calls ``base_layer`` with its parameter ``W`` replaced by ``W + scaling * lora_B @ lora_A``, for the call.

    For modules that use a parameter as they like: experts of a mixture (``[num_experts, out_features, in_features]``,
    or ``[num_experts, in_features, out_features]`` where the module's ``is_transposed`` says so), and any matrix
    ``[out_features, in_features]``. Every expert has factors of rank ``r`` of its own; as in PEFT, ``lora_A [r *
    num_experts, in_features]`` holds them one after the other, and ``lora_B [out_features, r * num_experts]``
    alternating.

    A call with an adapter in use makes one tensor of the parameter's size, and its backward a gradient of that size.
    Merged, it makes none: merge for inference. The parameter itself is not written but by merging. Several parameters
    of a module have a layer each, one around the other. Code that reads the parameter without calling the module sees
    the frozen one.

    Args:
        base_layer: the module, or such a layer of another of its parameters; kept, not copied.
        parameter_name: of one of the module's own parameters, with 2 or 3 dimensions.
        adapter, adapter_name, active: as of :class:`~lora_ext.nn.LoraLinear`.

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
        if reason := self.why_not_parameter(_bare(base_layer), parameter_name):
            raise TypeError(f"{type(self).__name__}: {type(_bare(base_layer)).__name__}: {reason}")
        super().__init__(base_layer, None, adapter_name, active)
        self.parameter_name = parameter_name
        self.place = list(self.module._parameters).index(parameter_name)
        self._begin_with(adapter, adapter_name, active)

    @classmethod
    def adapts(cls, module: nn.Module) -> bool:
        return isinstance(module, nn.Module)

    @classmethod
    def why_not_parameter(cls, module: nn.Module, name: str) -> str | None:
        """Why the parameter ``name`` of ``module`` cannot be adapted, or None."""
        if (reason := why_weight_unusable(module, name, called=True)) is not None:
            return reason
        dims = module._parameters[name].dim()
        return (
            None if dims in (2, 3) else f"its {name} has {dims} dimensions, want 2, or 3 of which the first is experts"
        )

    @classmethod
    def new_adapter_of(
        cls, module: nn.Module, name: str, config: LoraConfig, path: str, device: torch.device | None = None
    ) -> LoraAdapter:
        """A fresh adapter for the parameter ``name`` of ``module``, found at ``path``; ``device`` as in new_adapter."""
        num_experts, out_features, in_features = _sizes(module, name)
        r = config.rank_for(path)
        shapes = (r * num_experts, in_features), (out_features, r * num_experts)
        weight = module._parameters[name]
        return LoraAdapter.from_config(config, path, in_features, out_features, weight, device, shapes=shapes)

    def target_name(self, path: str) -> str:
        return f"{path}.{self.parameter_name}"

    @property
    def module(self) -> nn.Module:
        """The module whose parameter it is."""
        return _bare(self.base_layer)

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

    def delta_weight(self, name: str | None = None, key: str | None = None) -> Tensor:
        """As of :class:`LoraLayer`; of all experts, unless ``key`` says of which."""
        if key is not None or self.weight.dim() == 2:
            return super().delta_weight(name, key or "weight")
        return torch.stack([super(LoraParameter, self).delta_weight(name, key) for key in self.matrices()])

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        names = self._applied()
        if not names:
            return self.base_layer(*args, **kwargs)
        substitute = {self._path_from_base_layer(): self._updated([self.adapters[name] for name in names])}
        return torch.func.functional_call(self.base_layer, substitute, args, kwargs, tie_weights=False)

    def _updated(self, adapters: list[LoraAdapter]) -> Tensor:
        weight = self.weight
        factors = [self._batched_factors(adapter) for adapter in adapters]
        scaled = [lhs * adapter.scaling for (lhs, _), adapter in zip(factors, adapters, strict=True)]
        lhs, rhs = torch.cat(scaled, dim=2).to(weight.dtype), torch.cat([rhs for _, rhs in factors], dim=1)
        with torch.autocast(weight.device.type, enabled=False):  # the parameter keeps its dtype
            updated = torch.baddbmm(weight.view(-1, *weight.shape[-2:]), lhs, rhs.to(weight.dtype))
        return updated.view(weight.shape)

    def _batched_factors(self, adapter: LoraAdapter) -> tuple[Tensor, Tensor]:
        """``[num_experts, rows, r]`` and ``[num_experts, r, cols]``, whose product is an update's direction."""
        A = adapter.lora_A.unflatten(0, (-1, adapter.r))
        B = adapter.lora_B.unflatten(1, (adapter.r, -1)).permute(2, 0, 1)
        return (A.transpose(1, 2), B.transpose(1, 2)) if self.stores_transposed else (B, A)

    def _path_from_base_layer(self) -> str:
        parts, module = [self.parameter_name], self.base_layer
        while isinstance(module, AdapterLayer):
            parts.insert(0, "base_layer")
            module = module.base_layer
        return ".".join(parts)

    def extra_repr(self) -> str:
        return f"parameter_name={self.parameter_name!r}, {self._state()}"


def _bare(module: nn.Module) -> nn.Module:
    while isinstance(module, AdapterLayer):
        module = module.base_layer
    return module


def _is_transposed(module: nn.Module, weight: Tensor) -> bool:
    return weight.dim() == 3 and bool(getattr(module, "is_transposed", False))


def _sizes(module: nn.Module, name: str) -> tuple[int, int, int]:
    """``(num_experts, out_features, in_features)``."""
    weight = module._parameters[name]
    num_experts, rows, cols = (1, *weight.shape) if weight.dim() == 2 else weight.shape
    return (num_experts, cols, rows) if _is_transposed(module, weight) else (num_experts, rows, cols)
