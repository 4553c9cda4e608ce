"""A frozen convolution and its low-rank adapters."""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING

import torch.nn.functional as F
from torch import Tensor, nn

from lora_ext.nn.adapter import Device, LoraAdapter
from lora_ext.nn.adapter_layer import innermost
from lora_ext.nn.base_layer import why_not_merge
from lora_ext.nn.layer import AddsToOutput, Matrix
from lora_ext.nn.rows import RowChoice
from lora_ext.nn.updates import Update, expand_onto, joined

if TYPE_CHECKING:
    from lora_ext.config import LoraConfig

_CONVOLVE = {nn.Conv1d: F.conv1d, nn.Conv2d: F.conv2d, nn.Conv3d: F.conv3d}


class LoraConv(AddsToOutput):
    """``base_layer(x) + scaling * conv1x1(conv(dropout(x), lora_A), lora_B)`` with the base layer frozen.

    The convolution with ``lora_A``, ``[r, in_channels, *kernel_size]``, has the base layer's stride, padding, padding
    mode and dilation. ``lora_B``, ``[out_channels, r / groups, 1, ...]``, is grouped like the base layer. ``lora_A`` is
    not: with ``groups > 1`` it sees all channels, as in PEFT, and the update cannot be merged, as a grouped
    convolution's weight cannot express it.

    Args: as in :class:`~lora_ext.nn.LoraLinear`; ``base_layer`` is an ``nn.Conv1d``, ``nn.Conv2d`` or ``nn.Conv3d``.
    """

    base_kinds = "an nn.Conv1d, nn.Conv2d or nn.Conv3d"
    known_kinds = tuple(_CONVOLVE)

    @classmethod
    def adapts(cls, module: nn.Module) -> bool:
        return isinstance(module, cls.known_kinds)

    def why_not_merge(self) -> str | None:
        return super().why_not_merge() or why_not_merge(self.base_layer, *_CONVOLVE, methods=("_conv_forward",))

    @classmethod
    def new_adapter(cls, base_layer: nn.Module, config: LoraConfig, path: str, device: Device = None) -> LoraAdapter:
        """Makes an adapter for ``base_layer``. ValueError: the rank is not a multiple of the layer's groups."""
        rank = config.rank_for(path)
        if rank % base_layer.groups:
            raise ValueError(
                f"{cls.__name__}: the rank {rank} of {path!r} is not a multiple of its groups={base_layer.groups}; "
                "choose another rank (rank_pattern), or exclude the layer"
            )
        sizes, shapes = (base_layer.in_channels, base_layer.out_channels), _shapes(base_layer, rank)
        return LoraAdapter.from_config(config, path, *sizes, base_layer.weight, device, shapes=shapes)

    def factor_shapes(self, adapter: LoraAdapter) -> dict[str, tuple[int, ...]]:
        return dict(zip(("lora_A", "lora_B"), _shapes(self.convolution, adapter.r), strict=True))

    @property
    def convolution(self) -> nn.Module:
        """The base layer itself."""
        return innermost(self.base_layer)

    @property
    def in_features(self) -> int:
        """The number of input channels."""
        return self.convolution.in_channels

    @property
    def out_features(self) -> int:
        """The number of output channels."""
        return self.convolution.out_channels

    def _forward_rows(self, choice: RowChoice, x: Tensor) -> Tensor:
        if x.dim() != len(self.convolution.kernel_size) + 2:
            raise ValueError(
                f"{type(self).__name__}: adapter_names needs a batch, but the layer's input is {list(x.shape)}"
            )
        return super()._forward_rows(choice, x)

    def _add(self, y: Tensor, x: Tensor, adapters: list[LoraAdapter], may_change: bool) -> Tensor:
        dims = len(self.convolution.kernel_size)
        for adapter in adapters:
            if adapter.lora_bias is not None:
                bias = (adapter.scaling * adapter.lora_bias).to(y.dtype)
                y = y + bias.view(-1, *[1] * dims)
        updates = [Update(a.lora_A, a.lora_B, a.scaling, a.lora_dropout if self.training else 0.0) for a in adapters]
        for update in joined(updates) if self.convolution.groups == 1 else updates:
            y = self._add_update(y, x, update, may_change)
        return y

    def _add_update(self, y: Tensor, x: Tensor, update: Update, may_change: bool) -> Tensor:
        base = self.convolution
        x = F.dropout(x, update.dropout_p).to(update.lora_A.dtype)
        xa = _conv_of(base, x, update.lora_A)
        size = slice(-len(base.kernel_size), None)
        if xa.shape[size] != y.shape[size]:
            raise ValueError(
                f"{type(self).__name__}: base_layer returned {list(y.shape)}, but a convolution with its stride, "
                f"padding and dilation returns the size {list(xa.shape[size])}; exclude this module"
            )
        lora_B = update.lora_B.to(xa.dtype)  # under autocast xa has another dtype
        if base.groups > 1:
            update_of_y = _CONVOLVE[_kind(base)](xa, lora_B, groups=base.groups)
            return y.add(update_of_y.to(y.dtype), alpha=update.scaling)
        if y.dim() == len(base.kernel_size) + 1:  # no batch dimension
            y, xa = y.unsqueeze(0), xa.unsqueeze(0)
            return expand_onto(y, xa, lora_B.flatten(1), update.scaling, dim=1, may_change=may_change).squeeze(0)
        return expand_onto(y, xa, lora_B.flatten(1), update.scaling, dim=1, may_change=may_change)

    # --- merging -----------------------------------------------------------------------------------------------------

    def matrices(self) -> dict[str, Matrix]:
        matrices = super().matrices()
        rows = self.weight.permute(self._order())
        matrices["weight"] = matrices["weight"]._replace(view=rows.view(len(rows), -1))
        return matrices

    def factors(self, name: str) -> dict[str, tuple[Tensor, Tensor, float]]:
        if self.base_layer.groups > 1:
            raise ValueError(
                f"{type(self).__name__}: an update of a convolution with groups={self.base_layer.groups} cannot be "
                "merged, as its lora_A sees the channels of all groups; run unmerged"
            )
        adapter = self.adapters[name]
        weight = adapter.lora_A.permute(self._order()).flatten(1), adapter.lora_B.flatten(1), adapter.scaling
        return {"weight": weight, **self._bias_factors(adapter)}

    def _order(self) -> list[int]:
        """Dimension 0, then the weight's other dimensions in memory order: channels may be last."""
        weight = self.weight
        return [0, *sorted(range(1, weight.dim()), key=lambda dim: -weight.stride(dim) * (weight.shape[dim] > 1))]

    def _apply(self, fn, recurse: bool = True):
        order = self._order()
        super()._apply(fn, recurse)
        if self._merged is not None and self._order() != order:
            lost = "was converted to another memory format while merged, which cannot be undone"
            self._merged = dataclasses.replace(self._merged, lost=lost)
        return self

    def extra_repr(self) -> str:
        return f"in_channels={self.in_features}, out_channels={self.out_features}, {self._repr_of_state()}"


def _kind(module: nn.Module) -> type[nn.Module]:
    return next(kind for kind in _CONVOLVE if isinstance(module, kind))


def _conv_of(base: nn.Module, x: Tensor, weight: Tensor) -> Tensor:
    """Returns the convolution of ``x`` with ``weight``, with the stride, padding and dilation of ``base``."""
    padding = base.padding
    if base.padding_mode != "zeros":
        x, padding = F.pad(x, base._reversed_padding_repeated_twice, base.padding_mode), 0
    return _CONVOLVE[_kind(base)](x, weight, None, base.stride, padding, base.dilation)


def _shapes(base: nn.Module, rank: int) -> tuple[tuple[int, ...], tuple[int, ...]]:
    ones = (1,) * len(base.kernel_size)
    return (rank, base.in_channels, *base.kernel_size), (base.out_channels, rank // base.groups, *ones)
