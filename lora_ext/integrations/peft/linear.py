"""The forward of PEFT's linear LoRA layers with the ops."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from lora_ext._common.sharded import is_fully_sharded
from lora_ext._ops.checks import FLOATING
from lora_ext.functional import lora_delta_, lora_linear
from lora_ext.integrations.peft.eligibility import Adapter, active_adapters, is_eligible_call
from lora_ext.nn.base_layer import own_copy, plain_linear
from lora_ext.nn.shared_inputs import Operands, SharesInputs, shared_inputs


class LinearForward(SharesInputs):
    """Overrides ``forward`` of a LoRA layer whose base maps ``[..., in_features]`` to ``[..., out_features]``.

    If the base is a plain matrix product, one op computes it with the first adapter; other adapters are added in place.
    Other base layers (quantised, with hooks, ...) are called, and all adapters are added to a copy of their result,
    which the base layer may keep.
    """

    def forward(self, x: Tensor, *args, **kwargs) -> Tensor:
        adapters = active_adapters(self)
        if args or kwargs or isinstance(adapters, str) or not is_eligible_call(x):
            return super().forward(x, *args, **kwargs)
        plain = plain_linear(self.base_layer)
        if plain is not None:
            weight, bias = plain
            if x.dtype != weight.dtype and not torch.is_autocast_enabled(x.device.type):
                return super().forward(x)
            if not torch.compiler.is_compiling() and (shared := shared_inputs(self)) is not None:
                operands = _operands(adapters, plain)
                if not isinstance(operands, str):
                    return shared.output(self, x, operands)
            first, *others = adapters
            bias = _sum_of_biases(bias, adapters, weight.dtype)
            y = lora_linear(x, weight, bias, first.lora_A, first.lora_B, first.scaling, first.dropout_p)
        else:
            if x.dtype not in FLOATING:
                return super().forward(x)
            others, y = adapters, self.base_layer(x)
            bias = _sum_of_biases(None, adapters, y.dtype)
            y = own_copy(self, y) if bias is None else (y + bias).contiguous()
        if others and x.dtype != y.dtype:
            x = x.to(y.dtype)
        for adapter in others:
            lora_delta_(y, x, adapter.lora_A, adapter.lora_B, adapter.scaling, adapter.dropout_p)
        return y

    def operands(self) -> Operands | str:
        if is_fully_sharded(self):
            return "FSDP2 gathers its parameters for its calls only"
        adapters = active_adapters(self)
        return adapters if isinstance(adapters, str) else _operands(adapters, plain_linear(self.base_layer))

    def forward_obstacle(self) -> str:
        """Returns why calls run PEFT's code, or ""."""
        adapters = active_adapters(self)
        return adapters if isinstance(adapters, str) else ""


def _sum_of_biases(bias: Tensor | None, adapters: list[Adapter], dtype: torch.dtype) -> Tensor | None:
    for adapter in adapters:
        if adapter.bias is not None:
            bias = adapter.bias.to(dtype) if bias is None else (bias + adapter.bias).to(dtype)
    return bias


def _operands(adapters: list[Adapter], plain: tuple[Tensor, Tensor | None] | None) -> Operands | str:
    if plain is None or type(plain[0]) is not nn.Parameter:
        return "its base layer is no plain nn.Linear, or has hooks or a forward of its own"
    if len(adapters) != 1:
        return f"{len(adapters)} adapters are in use"
    (adapter,) = adapters
    if adapter.bias is not None:
        return "its adapter has a bias (lora_bias)"
    if type(adapter.lora_B) is not nn.Parameter:  # made for the call
        return "its adapter's scaling is negative, or a tensor"
    return Operands(*plain, adapter.lora_A, adapter.lora_B, None, adapter.scaling, adapter.dropout_p)
