"""A frozen linear layer that packs several projections, and low-rank adapters of some of them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lora_ext._common.arguments import checked
from lora_ext.nn.active import ActiveAdapters
from lora_ext.nn.adapter import Device, LoraAdapter
from lora_ext.nn.layer import Matrix
from lora_ext.nn.linear import LoraLinear, linear_sizes
from lora_ext.quantized import quantized_weight

if TYPE_CHECKING:
    from lora_ext.config import LoraConfig


class PackedAdapter(LoraAdapter):
    """One adapter for each enabled part of a packed projection, as loralib's ``MergedLinear`` has them.

    ``lora_A [r * num_enabled, in_features]`` and ``lora_B [out_features / num_parts * num_enabled, r]`` concatenate the
    factors of the enabled parts.

    Args:
        in_features: of the whole layer.
        out_features: of the whole layer.
        enable_lora: for each equal part, whether it is adapted.
        r: rank of each part's update. Other arguments are those of :class:`LoraAdapter`.
    """

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
                f"PackedAdapter: enable_lora has {len(enabled)} parts, want a divisor of out_features={out_features}"
            )
        if arguments.get("lora_bias"):
            raise ValueError("PackedAdapter: lora_bias is True, but enable_lora adapts parts only; remove one of them")
        num_enabled = sum(enabled)
        shapes = (r * num_enabled, in_features), (out_features // len(enabled) * num_enabled, r)
        super().__init__(in_features, out_features, r, lora_alpha, shapes=shapes, **arguments)
        self.enable_lora = enabled

    def parts(self) -> dict[int, tuple[Tensor, Tensor]]:
        """Maps each enabled part's number to ``lora_A [r, in_features]``, ``lora_B [out_features / num_parts, r]``."""
        enabled = [i for i, on in enumerate(self.enable_lora) if on]
        factors = zip(self.lora_A.split(self.r), self.lora_B.chunk(len(enabled)), strict=True)
        return dict(zip(enabled, factors, strict=True))


class LoraPackedLinear(LoraLinear):
    """A linear layer whose weight packs ``num_parts`` equal projections: GPT-2's ``c_attn``, fused qkv.

    Adapters are :class:`PackedAdapter`. They run the op of :class:`LoraLinear`: ``lora_B`` is expanded to a small
    block-diagonal matrix, ``[out_features, r * num_enabled]``. Merging writes the enabled parts only.

    Args:
        base_layer: as in :class:`LoraLinear`, and so are ``adapter``, ``adapter_name`` and ``active``.
        num_parts: the number of equal parts of ``out_features``.

    Raises:
        ValueError: ``out_features`` is not a multiple of ``num_parts``.
    """

    @checked
    def __init__(
        self,
        base_layer: nn.Module,
        num_parts: int,
        adapter: PackedAdapter | None = None,
        adapter_name: str = "default",
        active: ActiveAdapters | None = None,
    ) -> None:
        super().__init__(base_layer, None, adapter_name, active)
        if num_parts < 1 or self.out_features % num_parts:
            raise ValueError(
                f"LoraPackedLinear: num_parts is {num_parts}, want a divisor of out_features={self.out_features}"
            )
        self.num_parts = num_parts
        self._add_first(adapter, adapter_name, active)

    @classmethod
    def new_adapter(cls, base_layer: nn.Module, config: LoraConfig, path: str, device: Device = None) -> LoraAdapter:
        sizes, enable_lora = linear_sizes(base_layer), config.enable_lora_for(path)
        return PackedAdapter.from_config(config, path, *sizes, base_layer.weight, device, enable_lora=enable_lora)

    def operands(self) -> None:
        return None  # lora_B is expanded for a call

    def factor_shapes(self, adapter: PackedAdapter) -> dict[str, tuple[int, ...]]:
        if not isinstance(adapter, PackedAdapter):
            raise TypeError(f"LoraPackedLinear: the adapter is a {type(adapter).__name__}, want a PackedAdapter")
        if len(adapter.enable_lora) != self.num_parts:
            raise ValueError(
                f"LoraPackedLinear: enable_lora has {len(adapter.enable_lora)} parts, want {self.num_parts}"
            )
        num_enabled = sum(adapter.enable_lora)
        return {
            "lora_A": (adapter.r * num_enabled, self.in_features),
            "lora_B": (self.out_features // self.num_parts * num_enabled, adapter.r),
        }

    def matrices(self) -> dict[str, Matrix]:
        matrices = super().matrices()
        if matrices["weight"].quantized is not None:  # quantised as a whole
            return matrices
        weight = matrices.pop("weight")
        views = weight.view.chunk(self.num_parts, dim=1 if self.stores_transposed else 0)
        return {f"weight[{i}]": weight._replace(view=view) for i, view in enumerate(views)} | matrices

    def factors(self, name: str) -> dict[str, tuple[Tensor, Tensor, float]]:
        adapter = self.adapters[name]
        if quantized_weight(self.base_layer) is not None:
            return {"weight": (adapter.lora_A, self._full_lora_B(name, adapter.lora_B), adapter.scaling)}
        parts = adapter.parts()
        if self.stores_transposed:
            parts = {i: (B.T, A.T) for i, (A, B) in parts.items()}
        return {f"weight[{i}]": (A, B, adapter.scaling) for i, (A, B) in parts.items()}

    def _full_lora_B(self, name: str, lora_B: Tensor) -> Tensor:
        return spread_blocks(lora_B, self.adapters[name].enable_lora)

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, num_parts={self.num_parts}"


def spread_blocks(lora_B: Tensor, enable_lora: Sequence[bool]) -> Tensor:
    """Expands ``[rows * num_enabled, r]`` to ``[rows * num_parts, r * num_enabled]``: a block per part, else zero."""
    num_enabled, r = sum(enable_lora), lora_B.shape[1]
    blocks = iter(lora_B.chunk(num_enabled))
    zeros = lora_B.new_zeros(lora_B.shape[0] // num_enabled, r * num_enabled)
    parts, before = [], 0
    for on in enable_lora:
        parts.append(F.pad(next(blocks), (before * r, (num_enabled - 1 - before) * r)) if on else zeros)
        before += on
    return torch.cat(parts)


def gather_blocks(spread: Tensor, enable_lora: Sequence[bool]) -> Tensor:
    """Inverts :func:`spread_blocks`. ValueError: a number outside the blocks is not zero."""
    num_enabled = sum(enable_lora)
    r = spread.shape[1] // num_enabled
    enabled = [part for part, on in zip(spread.chunk(len(enable_lora)), enable_lora, strict=True) if on]
    gathered = torch.cat([part[:, i * r : (i + 1) * r] for i, part in enumerate(enabled)])
    if spread.count_nonzero() != gathered.count_nonzero():
        raise ValueError("there are numbers outside the blocks")
    return gathered
