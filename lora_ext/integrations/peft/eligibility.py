"""Decides whether the ops can run a PEFT layer, or why not; used by every forward and by report()."""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import NamedTuple

import torch
from peft.tuners.lora import LoraLayer
from torch import Tensor, nn
from torch.autograd import forward_ad

from lora_ext import _load
from lora_ext._ops.checks import FLOATING
from lora_ext.nn.base_layer import runs_alone

DISABLED = "now: the adapters are disabled, so only the base layer runs"
MERGED = "now: adapters are merged, so only the base layer runs"
NONE_ACTIVE = "now: the layer has none of the active adapters, so only the base layer runs"
_INVOKED, DORA = "ALoraLinearVariant", "DoraLinearVariant"
# torch.compiler.is_exporting() is True in all that TorchDynamo 2.11 traces; the flag behind it is not.
_HAS_FLAG = hasattr(torch.compiler, "_is_exporting_flag")
_PLAIN = ("MiCALinearVariant", "MiCAEmbeddingVariant")  # they freeze a factor, and compute what LoRA does
NOT_CAST = "now: PEFT is told not to cast inputs (disable_input_dtype_casting)"


class PeftAdapter(NamedTuple):
    """Arguments of the ops for an active adapter: ``lora_A [r, in]``, ``lora_B [out, r]``, scaled ``bias [out]``."""

    lora_A: Tensor
    lora_B: Tensor
    bias: Tensor | None
    scaling: float
    dropout_p: float
    is_invoked: bool = False  # acts from its invocation tokens on (aLoRA)
    magnitude: Tensor | None = None  # of a DoRA adapter, [out]


def is_eligible_call(x: object) -> bool:
    """Returns whether ``x`` is a plain tensor on a supported device, and no transform needs to see PyTorch's ops.

    Such transforms are forward-mode differentiation, torch.func, tracing and exporting.
    """
    if type(x) is not Tensor and type(x) is not nn.Parameter:
        return False
    if not (x.is_cpu or (x.is_cuda and not _load.cuda_unavailable_reason)):
        return False
    if torch.compiler.is_compiling():
        return not (torch.compiler._is_exporting_flag if _HAS_FLAG else torch.compiler.is_exporting())
    return (
        forward_ad._current_level < 0
        and torch._C._functorch.peek_interpreter_stack() is None
        and torch._C._get_tracing_state() is None
    )


def why_not_now(layer: LoraLayer) -> str:
    """Returns why the layer runs only its base, or ""."""
    return DISABLED if layer.disable_adapters else MERGED if layer.merged_adapters else ""


def active_adapters(layer: LoraLayer) -> list[PeftAdapter] | str:
    """Returns the active adapters of a linear layer, or why PEFT's forward runs instead; a DoRA adapter is alone."""
    adapters = adapters_named(layer, layer.active_adapters, with_dora=True)
    if isinstance(adapters, str):
        return adapters
    if len(adapters) > 1:
        for name, adapter in adapters.items():
            if adapter.magnitude is not None:
                return f"now: adapter {name!r} is DoRA, and is one of {len(adapters)} active adapters"
    return list(adapters.values()) or NONE_ACTIVE


def adapters_named(layer: LoraLayer, names: Iterable[str], with_dora: bool = False) -> dict[str, PeftAdapter] | str:
    """Returns those of the adapters ``names`` that a linear layer has, or why PEFT's forward runs instead."""
    if reason := why_not_now(layer):
        return reason
    if not layer.cast_input_dtype_enabled:
        return NOT_CAST
    children = layer._modules
    lora_As, lora_Bs, dropouts = (children[name]._modules for name in ("lora_A", "lora_B", "lora_dropout"))
    adapters = {}
    for name in names:
        if name not in lora_As:
            continue
        variant = variant_of(layer, name)
        if variant not in (("", _INVOKED, DORA) if with_dora else ("", _INVOKED)):
            return f"adapter {name!r} is a variant of LoRA ({variant})"
        lora_A, lora_B, dropout = lora_As[name], lora_Bs[name], dropouts[name]
        for role, module in (("lora_A", lora_A), ("lora_B", lora_B)):
            if reason := _why_not_module(module):
                return f"{role} of adapter {name!r} {reason}"
        A, B = lora_A._parameters["weight"], lora_B._parameters["weight"]
        if A.dtype != B.dtype or A.dtype not in FLOATING:
            return f"lora_A and lora_B of adapter {name!r} are {A.dtype} and {B.dtype}"
        if type(dropout) is nn.Dropout and 0.0 <= dropout.p < 1.0:
            dropout_p = dropout.p if dropout.training else 0.0
        elif type(dropout) is nn.Identity:
            dropout_p = 0.0
        else:
            return f"the dropout of adapter {name!r} is {dropout}"
        scaling, bias = layer.scaling[name], lora_B._parameters["bias"]
        if bias is not None:
            bias = bias * scaling
        if isinstance(scaling, Tensor):  # as PEFT's prepare_model_for_compiled_hotswap leaves it
            B, scaling = B * scaling, 1.0
        elif not -math.inf < scaling < math.inf:
            return f"the scaling of adapter {name!r} is {scaling}"
        elif scaling < 0.0:  # lora_linear refuses it
            B, scaling = -B, -scaling
        magnitude = None
        if variant == DORA:
            holder = layer._modules["lora_magnitude_vector"]._modules[name]
            magnitude = holder._parameters.get("weight")
            if type(magnitude) is not nn.Parameter or magnitude.device != A.device or not runs_alone(holder):
                return f"the magnitude of adapter {name!r} is not a plain parameter next to its factors"
            if bias is not None:
                return f"adapter {name!r} is DoRA with a bias (lora_bias)"
        adapters[name] = PeftAdapter(A, B, bias, scaling, dropout_p, variant == _INVOKED, magnitude)
    return adapters


def variant_of(layer: LoraLayer, name: str) -> str:
    """Returns the name of an adapter's variant in PEFT (DoRA, aLoRA, ...), or "" if it computes what LoRA does."""
    variant = layer.lora_variant.get(name)
    kind = "" if variant is None else type(variant).__name__
    return "" if kind in _PLAIN else kind


def _why_not_module(module: nn.Module) -> str:
    """Returns why a factor's weight cannot be used without calling its module, or ""."""
    if type(module) is not nn.Linear:
        return f"is a {type(module).__name__}, not an nn.Linear"
    weight = module._parameters.get("weight")
    if type(weight) is not nn.Parameter:
        return f"has a weight that is a {type(weight).__name__}, not a plain parameter"
    return "" if runs_alone(module) else "has hooks or a replaced forward"
