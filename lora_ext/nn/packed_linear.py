"""A frozen linear layer that is several projections side by side, and low-rank adapters of some of them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lora_ext._common.arguments import checked
from lora_ext.nn.adapter import LoraAdapter
from lora_ext.nn.layer import ActiveAdapters, Matrix
from lora_ext.nn.linear import LoraLinear, add_lora_biases, add_updates, linear_sizes

if TYPE_CHECKING:
    from lora_ext.config import LoraConfig


class PackedAdapter(LoraAdapter):
    """One adapter for each enabled part of a packed projection, as loralib's ``MergedLinear`` has them.

    ``lora_A [r * num_enabled, in_features]`` and ``lora_B [out_features / num_parts * num_enabled, r]`` hold the parts'
    factors one after the other.

    Args:
        in_features, out_features: of the whole layer.
        enable_lora: for each of its equal parts, whether it is adapted.
        r: rank of each part's update.
        Others as of :class:`LoraAdapter`.
    """

    has_plain_rank = False

    @checked
    def __init__(
        self,
        in_features: int,
        out_features: int,
        r: int,
        lora_alpha: float,
        *,
        enable_lora: Sequence[bool],
        **arguments,
    ) -> None:
        enabled = tuple(enable_lora)
        if not any(enabled):
            raise ValueError(f"PackedAdapter: enable_lora is {list(enable_lora)}, want at least one True")
        if out_features % len(enabled):
            raise ValueError(
                f"PackedAdapter: enable_lora has {len(enabled)} parts, which out_features={out_features} is no "
                "multiple of"
            )
        if arguments.get("lora_bias"):
            raise ValueError("PackedAdapter: lora_bias is True, which goes with a whole layer; take out enable_lora")
        num_enabled = sum(enabled)
        shapes = (r * num_enabled, in_features), (out_features // len(enabled) * num_enabled, r)
        super().__init__(in_features, out_features, r, lora_alpha, shapes=shapes, **arguments)
        self.enable_lora = enabled

    def parts(self) -> dict[int, tuple[Tensor, Tensor]]:
        """``lora_A [r, in_features]`` and ``lora_B [out_features / num_parts, r]`` of each enabled part, by number."""
        enabled = [i for i, on in enumerate(self.enable_lora) if on]
        factors = zip(self.lora_A.split(self.r), self.lora_B.chunk(len(enabled)), strict=True)
        return dict(zip(enabled, factors, strict=True))

    def block_diagonal(self) -> Tensor:
        """``[out_features, r * num_enabled]``, which with ``lora_A`` makes an ordinary update of the whole layer."""
        return spread_blocks(self.lora_B, self.enable_lora)


class LoraPackedLinear(LoraLinear):
    """A linear layer whose weight holds ``num_parts`` equal projections side by side: GPT-2's ``c_attn``, fused qkv.

    Adapters are :class:`PackedAdapter`, which update some of the parts, or plain ones, which update all together. Parts
    that are off have no parameters; an update is never made as a matrix of the weight's size. Both kinds are computed
    by the op of :class:`LoraLinear`, in one pass over the input and one over the output: ``lora_B`` is spread to block
    diagonal form, ``[out_features, r * num_enabled]``, which is small. Merging writes the enabled parts only.

    Args:
        base_layer: as of :class:`LoraLinear`.
        num_parts: equal parts of ``out_features``.
        adapter, adapter_name, active: as of :class:`LoraLinear`.

    Raises:
        ValueError: ``out_features`` is no multiple of ``num_parts``.
    """

    @checked
    def __init__(
        self,
        base_layer: nn.Module,
        num_parts: int,
        adapter: LoraAdapter | None = None,
        adapter_name: str = "default",
        active: ActiveAdapters | None = None,
    ) -> None:
        super().__init__(base_layer, None, adapter_name, active)
        if num_parts < 1 or self.out_features % num_parts:
            raise ValueError(
                f"LoraPackedLinear: num_parts is {num_parts}, which out_features={self.out_features} is no multiple of"
            )
        self.num_parts = num_parts
        if adapter is not None:
            self.add_adapter(adapter_name, adapter)
            if active is None:
                self.active.names = (adapter_name,)

    @classmethod
    def new_adapter(
        cls, base_layer: nn.Module, config: LoraConfig, path: str, device: torch.device | None = None
    ) -> LoraAdapter:
        enable_lora = config.enable_lora_for(path)
        if enable_lora is None:
            return super().new_adapter(base_layer, config, path, device)
        sizes = linear_sizes(base_layer)
        return PackedAdapter.from_config(config, path, *sizes, base_layer.weight, device, enable_lora=enable_lora)

    def factor_shapes(self, adapter: LoraAdapter) -> dict[str, tuple[int, ...]]:
        if not isinstance(adapter, PackedAdapter):
            return super().factor_shapes(adapter)
        if len(adapter.enable_lora) != self.num_parts:
            raise ValueError(
                f"LoraPackedLinear: enable_lora has {len(adapter.enable_lora)} parts, but the layer {self.num_parts}"
            )
        num_enabled = sum(adapter.enable_lora)
        return {
            "lora_A": (adapter.r * num_enabled, self.in_features),
            "lora_B": (self.out_features // self.num_parts * num_enabled, adapter.r),
        }

    def matrices(self) -> dict[str, Matrix]:
        matrices = super().matrices()
        weight = matrices.pop("weight")
        views = weight.view.chunk(self.num_parts, dim=self._parts_dim)
        return {f"weight[{i}]": weight._replace(view=view) for i, view in enumerate(views)} | matrices

    def factors(self, name: str) -> dict[str, tuple[Tensor, Tensor, float]]:
        adapter = self.adapters[name]
        if isinstance(adapter, PackedAdapter):
            parts = adapter.parts()
        else:
            parts = {i: (adapter.lora_A, B) for i, B in enumerate(adapter.lora_B.chunk(self.num_parts))}
        if self.stores_transposed:
            parts = {i: (B.T, A.T) for i, (A, B) in parts.items()}
        factors = {f"weight[{i}]": (A, B, adapter.scaling) for i, (A, B) in parts.items()}
        return {**factors, **self._bias_factors(adapter)}

    def delta_weight(self, name: str | None = None, key: str | None = None) -> Tensor:
        """As of :class:`LoraLayer`; of all parts, unless ``key`` says of which."""
        if key is not None:
            return super().delta_weight(name, key)
        if name is None:
            (name,) = self.active_adapters or (None,)
        self._check_exists(name)
        factors, parts = self.factors(name), []
        for key, matrix in self.matrices().items():
            if key in factors and key != "bias":
                parts.append(super().delta_weight(name, key))
            elif key != "bias":
                parts.append(self.adapters[name].lora_A.new_zeros(matrix.view.shape))
        return torch.cat(parts, dim=self._parts_dim)

    @property
    def _parts_dim(self) -> int:
        return 1 if self.stores_transposed else 0

    def forward(self, x: Tensor) -> Tensor:
        names = self._applied()
        if not names:
            return self.base_layer(x)
        base, adapters = self.base_layer, [self.adapters[name] for name in names]
        weight = base.weight.T if self.stores_transposed else base.weight
        updates = [
            (
                adapter.lora_A,
                adapter.block_diagonal() if isinstance(adapter, PackedAdapter) else adapter.lora_B,
                adapter.scaling,
                adapter.lora_dropout if self.training else 0.0,
            )
            for adapter in adapters
        ]
        return add_updates(x, weight, add_lora_biases(base.bias, weight.dtype, adapters), updates)

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, num_parts={self.num_parts}"


def spread_blocks(lora_B: Tensor, enable_lora: Sequence[bool]) -> Tensor:
    """``[rows * num_enabled, r]`` as ``[rows * num_parts, r * num_enabled]``: a block a part, zero elsewhere."""
    num_enabled, r = sum(enable_lora), lora_B.shape[1]
    blocks = iter(lora_B.chunk(num_enabled))
    none = lora_B.new_zeros(lora_B.shape[0] // num_enabled, r * num_enabled)
    parts, before = [], 0
    for on in enable_lora:
        parts.append(F.pad(next(blocks), (before * r, (num_enabled - 1 - before) * r)) if on else none)
        before += on
    return torch.cat(parts)


def gather_blocks(spread: Tensor, enable_lora: Sequence[bool]) -> Tensor:
    """The inverse of :func:`spread_blocks`.

    Raises:
        ValueError: there are other numbers than zero outside of the blocks.
    """
    num_enabled = sum(enable_lora)
    r = spread.shape[1] // num_enabled
    enabled = [part for part, on in zip(spread.chunk(len(enable_lora)), enable_lora, strict=True) if on]
    gathered = torch.cat([part[:, i * r : (i + 1) * r] for i, part in enumerate(enabled)])
    if spread.count_nonzero() != gathered.count_nonzero():
        raise ValueError("there are numbers outside of the blocks")
    return gathered
