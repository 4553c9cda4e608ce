"""A frozen linear layer and its DoRA adapters."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from lora_ext import functional
from lora_ext._common.arguments import checked
from lora_ext._common.sharded import is_elsewhere, is_sharded
from lora_ext._ops.dora import rescale, row_norms, scale_of_rows
from lora_ext.nn.adapter import Device, LoraAdapter, materialised
from lora_ext.nn.base_layer import is_conv1d, plain_linear, why_weight_unusable
from lora_ext.nn.layer import Matrix
from lora_ext.nn.linear import OverLinear, linear_sizes
from lora_ext.nn.tensor_parallel import split_dim
from lora_ext.quantized import QuantizedWeight, quantized_weight
from lora_ext.quantized.rescaled import RescaledWeight

if TYPE_CHECKING:
    from lora_ext.config import LoraConfig


class DoraUpdate(NamedTuple):
    """An active DoRA adapter.

    Attributes:
        lora_A, lora_B: ``[r, in_features]`` and ``[out_features, r]``.
        magnitude: ``[out_features]``, the norms that the rows of the updated weight are scaled to.
        scaling: of the low-rank update.
        dropout_p: probability that an element of the adapter's input is zeroed.
    """

    lora_A: Tensor
    lora_B: Tensor
    magnitude: Tensor
    scaling: float
    dropout_p: float

    def factor(self, weight: Tensor) -> Tensor:
        """Returns what each feature of the updated weight's product is multiplied by."""
        return scale_of_rows(self.magnitude, row_norms(weight, self.lora_A, self.lora_B, self.scaling))


def output(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    update: DoraUpdate,
    base_layer: Callable[[Tensor], Tensor] | None = None,
) -> Tensor:
    """Returns ``factor * (x @ weight.T + scaling * x @ lora_A.T @ lora_B.T) + bias``.

    With dropout, the adapter changes the dropped-out input's part of the output only, as in PEFT:
    ``(x - d) @ weight.T + factor * (d @ weight.T + scaling * d @ lora_A.T @ lora_B.T) + bias`` with ``d = dropout(x)``.

    Args:
        x: ``[..., in_features]``, dtype of ``weight``, or under autocast any.
        weight: ``[out_features, in_features]``, dequantised for the norms if it is quantised.
        base_layer: multiplies by the weight and adds the ``bias``, where a product here would compute something else.
    """
    factor, low_rank = update.factor(weight), (update.lora_A, update.lora_B, update.scaling)
    dropped = F.dropout(x, update.dropout_p) if update.dropout_p else x
    if base_layer is None:
        z = functional.lora_linear(dropped, weight, None, *low_rank)
    else:
        z = base_layer(dropped)
        z = z.clone() if bias is None else z - bias.to(z.dtype)
        z = functional.plus_lora_delta(z, dropped.to(device=z.device, dtype=z.dtype), *low_rank)
    if not update.dropout_p:
        return rescale(z, factor, bias)
    rest = x - dropped
    return rescale(z, factor, F.linear(rest, weight, bias) if base_layer is None else base_layer(rest))


class DoraAdapter(LoraAdapter):
    """A low-rank update, and a magnitude for each row of the updated weight (Liu et al. 2024, arXiv 2402.09353).

    ``lora_magnitude_vector`` is ``[out_features]``, in the dtype of the factors. :meth:`measure` sets it to the norms
    of the rows; until then it is 1.

    Args: as in :class:`LoraAdapter`; there is no ``lora_bias``.
    """

    has_magnitude = True

    @checked
    def __init__(self, in_features: int, out_features: int, r: int, lora_alpha: float, **arguments: Any) -> None:
        if arguments.get("lora_bias"):
            raise ValueError("DoraAdapter: lora_bias is True, but a DoRA adapter has no bias; leave it out")
        super().__init__(in_features, out_features, r, lora_alpha, **arguments)
        self.lora_magnitude_vector = nn.Parameter(self.lora_B.new_ones(out_features))

    @torch.no_grad()
    def measure(self, weight: Tensor) -> None:
        """Sets the magnitudes to the norms of the rows of ``weight + scaling * lora_B @ lora_A``."""
        norms = row_norms(weight, self.lora_A.to(weight.device), self.lora_B.to(weight.device), self.scaling)
        self.lora_magnitude_vector.copy_(norms)


class DoraLinear(OverLinear):
    """A frozen linear layer whose adapters train the magnitude of each row of the weight apart from its direction.

    ``y = factor * (x @ weight.T + scaling * x @ lora_A.T @ lora_B.T) + bias``, where ``factor`` is the magnitude of a
    row over the norm of that row of ``weight + scaling * lora_B @ lora_A``. The gradient takes these norms for
    constants (section 4.3 of the paper). With dropout see :func:`output`. A quantised weight is
    dequantised in every call, for the norms. One adapter is active at a time. A merge keeps a copy of the weight.

    Args: as in :class:`~lora_ext.nn.LoraLinear`; adapters are :class:`DoraAdapter`.
    """

    @classmethod
    def why_not(cls, module: nn.Module, config: LoraConfig) -> str | None:
        if split_dim(module) is not None:
            return "its weight is split over devices (tensor parallelism), and use_dora needs whole rows"
        if is_elsewhere(module._parameters.get("weight")):
            return "ZeRO-3 has partitioned its weight, from which use_dora takes the magnitudes"
        if (reason := super().why_not(module, config)) is not None or quantized_weight(module) is not None:
            return reason
        return why_weight_unusable(module, reads_values=True)

    @classmethod
    def new_adapter(cls, base_layer: nn.Module, config: LoraConfig, path: str, device: Device = None) -> DoraAdapter:
        adapter = DoraAdapter.from_config(config, path, *linear_sizes(base_layer), base_layer.weight, device)
        if not (adapter.lora_A.is_meta or base_layer.weight.is_meta):
            adapter.measure(_values(base_layer))
        return adapter

    def add_adapter(self, name: str, adapter: LoraAdapter) -> None:
        if not getattr(adapter, "has_magnitude", False):
            raise TypeError(f"DoraLinear: the adapter is a {type(adapter).__name__}, want a DoraAdapter")
        super().add_adapter(name, adapter)

    def factor_shapes(self, adapter: LoraAdapter) -> dict[str, tuple[int, ...]]:
        return super().factor_shapes(adapter) | {"lora_magnitude_vector": (self.out_features,)}

    def file_tensors(self, path: str, adapter: DoraAdapter) -> dict[str, Tensor]:
        magnitude = {f"{path}.lora_magnitude_vector": adapter.lora_magnitude_vector}
        return super().file_tensors(path, adapter) | magnitude

    # --- forward -----------------------------------------------------------------------------------------------------

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        names = self._applied_to_all()
        if not names:
            return self.base_layer(x, *args, **kwargs)
        if len(names) > 1:
            raise RuntimeError(f"DoraLinear: {list(names)} are active; use one DoRA adapter at a time (set_adapter)")
        weight = self.base_layer._parameters.get("weight")
        if is_elsewhere(weight) or is_sharded(weight):
            raise RuntimeError(
                "DoraLinear: ZeRO-3 has partitioned the weight, or FSDP2 shards the base layer apart, but the norms of "
                "rows need the whole weight; use ZeRO-2, or call fully_shard on the layer or a module around it"
            )
        update = self._update(names[0])
        plain = None if args or kwargs else plain_linear(self.base_layer)
        if plain is not None:
            return output(x, *plain, update)
        call = (lambda given: self.base_layer(given, *args, **kwargs)) if args or kwargs else self.base_layer
        return output(x, _values(self.base_layer), self.bias, update, call)

    def _update(self, name: str) -> DoraUpdate:
        held = materialised(self.adapters[name])
        dropout_p = held.lora_dropout if self.training else 0.0
        return DoraUpdate(held.lora_A, held.lora_B, held.lora_magnitude_vector, held.scaling, dropout_p)

    # --- merging -----------------------------------------------------------------------------------------------------

    def why_not_merge(self) -> str | None:
        if is_sharded(self.base_layer.weight):
            return "its weight is sharded, and a DoRA adapter needs whole rows"
        if self._merged is not None:
            return (
                f"{self.merged_adapters[0]!r} is merged into it, and a DoRA adapter is merged alone; unmerge that first"
            )
        return super().why_not_merge()

    def matrices(self) -> dict[str, Matrix]:
        view = self.base_layer.weight
        return {"weight": Matrix(self.base_layer, "weight", view, self._rescaled())}

    def _rescaled(self, factor: Tensor | None = None) -> RescaledWeight:
        return RescaledWeight(self.base_layer, quantized_weight(self.base_layer), factor)

    def weight_to_merge(self, matrix: Matrix, names: list[str]) -> QuantizedWeight:
        if len(names) > 1:
            raise ValueError(
                f"DoraLinear: {names} would be merged into one weight; a DoRA adapter is merged alone: unmerge first"
            )
        return self._rescaled(self._update(names[0]).factor(_values(self.base_layer)))

    def factors(self, name: str) -> dict[str, tuple[Tensor, Tensor, float]]:
        """Returns what a merge adds to the weight, whose rows it multiplies by factors before."""
        if self._merged is not None:
            raise RuntimeError(
                f"DoraLinear: {self.merged_adapters[0]!r} is merged, and a DoRA adapter's update depends on the weight "
                "before; call unmerge first"
            )
        adapter = self.adapters[name]
        with torch.no_grad():
            factor = self._update(name).factor(_values(self.base_layer))
        lora_B = factor.unsqueeze(1) * adapter.lora_B
        return {"weight": (adapter.lora_A, lora_B.to(adapter.lora_B.dtype), adapter.scaling)}


def _values(base_layer: nn.Module) -> Tensor:
    """Returns the weight of ``base_layer`` as ``[out_features, in_features]``, dequantised if it is quantised."""
    if (quantized := quantized_weight(base_layer)) is not None:
        return quantized.dequantize()
    return base_layer.weight.T if is_conv1d(base_layer) else base_layer.weight
