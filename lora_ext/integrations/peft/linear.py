"""The forward of PEFT's linear LoRA layers with the ops."""

from __future__ import annotations

import functools
from collections.abc import Mapping

import torch
from torch import Tensor, nn

from lora_ext._common.sharded import is_fully_sharded
from lora_ext._ops.checks import FLOATING
from lora_ext.functional import lora_delta_, lora_linear
from lora_ext.integrations.peft.eligibility import PeftAdapter, active_adapters, adapters_named, is_eligible_call
from lora_ext.nn import base_product, dora
from lora_ext.nn.base_layer import own_copy, plain_linear, runs_quantized_product
from lora_ext.nn.rows import RowChoice, RowUpdate, add_chosen, linear_with_chosen
from lora_ext.nn.shared_inputs import Operands, SharesInputs, frozen_product, neighbours_of
from lora_ext.nn.updates import Update, joined, sum_of_biases
from lora_ext.quantized import quantized_weight


class LinearForward(SharesInputs):
    """Overrides ``forward`` of a LoRA layer whose base maps ``[..., in_features]`` to ``[..., out_features]``.

    If the base is a plain matrix product, one op computes it with the active adapters that can be one update
    (:func:`~lora_ext.nn.updates.joined`). Other base layers (quantised, with hooks, ...) are called, and the adapters
    are added to a copy of their result, which the base layer may keep.
    """

    def forward(self, x: Tensor, *args, **kwargs) -> Tensor:
        if kwargs and (names := kwargs.get("adapter_names")) is not None:
            return self._forward_rows(x, names, *args, **kwargs)
        adapters = active_adapters(self)
        if args or kwargs.keys() - {_OFFSETS} or isinstance(adapters, str) or not is_eligible_call(x):
            return super().forward(x, *args, **kwargs)
        if any(adapter.is_invoked for adapter in adapters):
            offsets = kwargs.get(_OFFSETS)
            if torch.compiler.is_compiling() or not _are_offsets(offsets, x):
                return super().forward(x, **kwargs)
            if _before(offsets, x).count(0) < len(x):  # not all tokens, as in decoding
                return self._forward_invoked(x, adapters, offsets)
        plain = plain_linear(self.base_layer)
        if plain is None:
            if x.dtype not in FLOATING:
                return super().forward(x, **kwargs)
        elif x.dtype != plain[0].dtype and not torch.is_autocast_enabled(x.device.type):
            return super().forward(x, **kwargs)
        if adapters[0].magnitude is not None:
            return self._forward_dora(x, plain, adapters[0])
        if not torch.compiler.is_compiling() and (neighbours := neighbours_of(self)) is not None:
            operands = _operands(adapters, self.base_layer)
            if operands is not None:
                return neighbours.output(self, x, operands)
        updates = joined([Update(a.lora_A, a.lora_B, a.scaling, a.dropout_p) for a in adapters])
        biases = [adapter.bias for adapter in adapters if adapter.bias is not None]
        if plain is not None:
            weight, bias = plain
            first, *others = updates
            y = lora_linear(x, weight, sum_of_biases(bias, biases, weight.dtype), *first)
        else:
            others, y = updates, self.base_layer(x)
            bias = sum_of_biases(None, biases, y.dtype)
            y = own_copy(self, y) if bias is None else (y + bias).contiguous()
        if others and x.dtype != y.dtype:
            x = x.to(y.dtype)
        for update in others:
            lora_delta_(y, x, *update)
        return y

    def _forward_rows(self, x: Tensor, names: list[str], *args, **kwargs) -> Tensor:
        """PEFT's ``_mixed_batch_forward``: each row uses the adapter that ``names`` gives it."""
        self._check_forward_args(x, adapter_names=names)
        choice, offsets = _choice_of(tuple(names)), kwargs.get(_OFFSETS)
        adapters = adapters_named(self, choice.names)
        others = kwargs.keys() - {"adapter_names", _OFFSETS}
        if args or others or isinstance(adapters, str) or not is_eligible_call(x) or x.dtype not in FLOATING:
            return super().forward(x, *args, **kwargs)
        invoked = frozenset(name for name, adapter in adapters.items() if adapter.is_invoked)
        if invoked:
            if not _are_offsets(offsets, x):
                return super().forward(x, *args, **kwargs)
            before = [n if name in invoked else 0 for n, name in zip(_before(offsets, x), names, strict=True)]
            choice = _choice_of(tuple(names), invoked, tuple(before), x.shape[1])
        plain, updates = self._plain(x), _updates_of(adapters)
        if plain is not None:
            return linear_with_chosen(x, *plain, choice, updates, 1)
        y = own_copy(self, self.base_layer(x))
        return add_chosen(y, x.to(y.dtype), choice, updates, 1)

    def _forward_invoked(self, x: Tensor, adapters: list[PeftAdapter], offsets: list[int | None]) -> Tensor:
        """The forward of active adapters of which one or more act on the last ``offsets`` tokens of each row only."""
        names, before = ("active",) * len(x), tuple(_before(offsets, x))
        plain = self._plain(x)
        y = own_copy(self, self.base_layer(x)) if plain is None else base_product.product(x, *plain)
        x = x.to(y.dtype)
        for adapter in adapters:
            acts = (frozenset(names), before, x.shape[1]) if adapter.is_invoked else ()
            y = add_chosen(y, x, _choice_of(names, *acts), _updates_of({"active": adapter}), 1)
        return y

    def _forward_dora(self, x: Tensor, plain: tuple[Tensor, Tensor | None] | None, adapter: PeftAdapter) -> Tensor:
        """The forward of a DoRA adapter that is active alone."""
        update = dora.DoraUpdate(adapter.lora_A, adapter.lora_B, adapter.magnitude, adapter.scaling, adapter.dropout_p)
        if plain is not None:
            return dora.output(x, *plain, update)
        quantized = quantized_weight(self.base_layer) if runs_quantized_product(self.base_layer) else None
        if quantized is None:  # what such a base layer computes is not known
            return super().forward(x)
        base = self.base_layer
        return dora.output(x, quantized.dequantize(), base.bias, update, base)

    def _plain(self, x: Tensor) -> tuple[Tensor, Tensor | None] | None:
        """The base layer's weight and bias, if all that it does with ``x`` is to multiply."""
        plain = plain_linear(self.base_layer)
        fits = plain is not None and (x.dtype == plain[0].dtype or torch.is_autocast_enabled(x.device.type))
        return plain if fits else None

    def operands(self) -> Operands | None:
        adapters = active_adapters(self)
        if is_fully_sharded(self) or self._compiled_call_impl is not None or isinstance(adapters, str):
            return None  # FSDP2 gathers parameters for its own call only
        return _operands(adapters, self.base_layer)

    def why_not_forward(self) -> str:
        """Returns why calls run PEFT's code, or ""."""
        adapters = active_adapters(self)
        return adapters if isinstance(adapters, str) else ""


_OFFSETS = "alora_offsets"


def _are_offsets(offsets: object, x: Tensor) -> bool:
    """Returns whether ``offsets`` are those of the rows of ``x [rows, tokens, in_features]``."""
    return isinstance(offsets, list) and x.dim() == 3 and x.dtype in FLOATING and len(offsets) == len(x)


def _before(offsets: list[int | None], x: Tensor) -> list[int]:
    """Counts for each row the tokens before those on which aLoRA acts."""
    length = x.shape[1]
    return [length - min(offset or 0, length) for offset in offsets]


@functools.lru_cache(64)
def _choice_of(
    names: tuple[str, ...], invoked: frozenset[str] = frozenset(), before: tuple[int, ...] = (), length: int = 0
) -> RowChoice:
    """The same for all layers of a call. The arguments are those of :class:`_TokenChoice`."""
    return _TokenChoice(names, invoked, before, length) if invoked else RowChoice(names)


class _TokenChoice(RowChoice):
    """The adapters of rows of ``length`` tokens; those of ``invoked`` act from token ``before[row]`` on (aLoRA)."""

    def __init__(self, names: tuple[str, ...], invoked: frozenset[str], before: tuple[int, ...], length: int) -> None:
        super().__init__(names)
        self.invoked, self.before, self.length = invoked, before, length
        self._of_tokens: dict[tuple, Tensor] = {}

    def groups(self, present: tuple[str, ...], times: int, device: torch.device) -> Tensor:
        """Returns :meth:`RowChoice.groups`, or int64 ``[rows, tokens]`` if one of ``present`` acts on some tokens."""
        groups = super().groups(present, times, device)
        if self.invoked.isdisjoint(present):
            return groups
        found = self._of_tokens.get((present, device))
        if found is None:
            with torch.inference_mode(False):  # a later call may be recorded by autograd
                acts = torch.arange(self.length, device=device) >= torch.tensor(self.before, device=device)[:, None]
                found = self._of_tokens[present, device] = torch.where(acts, groups[:, None], -1)
        return found


def _updates_of(adapters: Mapping[str, PeftAdapter]) -> list[RowUpdate]:
    return [RowUpdate(name, a.lora_A, a.lora_B, a.scaling, a.dropout_p, a.bias) for name, a in adapters.items()]


def _operands(adapters: list[PeftAdapter], base_layer: nn.Module) -> Operands | None:
    base = frozen_product(base_layer)
    if base is None or len(adapters) != 1:
        return None
    (adapter,) = adapters
    if adapter.bias is not None or adapter.magnitude is not None or type(adapter.lora_B) is not nn.Parameter:
        return None  # lora_B is made for the call if the scaling is negative, or a tensor
    weight, bias, quantized, is_training = base
    lora_A, lora_B, scaling, dropout_p = adapter.lora_A, adapter.lora_B, adapter.scaling, adapter.dropout_p
    return Operands(weight, bias, lora_A, lora_B, None, scaling, dropout_p, quantized, is_training)
