"""Calls a module with low-rank updates of one of its parameters."""

from __future__ import annotations

import os
import threading
import weakref
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lora_ext.nn.weight_views.updates import ExpertUpdate, StackedUpdates
from lora_ext.nn.weight_views.view import WeightView

_UNREAD = "its module does not read the parameter as an attribute"
_GROUPED_PRODUCTS = ("batched_mm", "grouped_mm")

_locks: weakref.WeakKeyDictionary[nn.Module, threading.RLock] = weakref.WeakKeyDictionary()
if hasattr(os, "register_at_fork"):  # the child lacks the thread that holds a lock
    os.register_at_fork(after_in_child=_locks.clear)

# By module and parameter: why the last call made a tensor of the parameter's size, or "".
_last_reasons: weakref.WeakKeyDictionary[nn.Module, dict[str, str]] = weakref.WeakKeyDictionary()


def call_with_updates(
    call: Callable[..., Any],
    module: nn.Module,
    name: str,
    updates: list[ExpertUpdate],
    args: Sequence[Any],
    kwargs: Mapping[str, Any],
    is_transposed: bool,
) -> Any:
    """Returns ``call(*args, **kwargs)``; meanwhile the parameter ``name`` of ``module`` has ``updates``.

    The parameter itself is not touched. Calls of one module wait for each other.

    Args:
        call: calls ``module``, perhaps through other layers.
        is_transposed: the parameter is stored as ``[..., in_features, out_features]``.

    Raises:
        NeedsWholeError: the call must be made with the whole updated parameter; see :func:`why_whole`.
        ValueError: a router chose an expert that does not exist.
    """
    if torch.compiler.is_dynamo_compiling() and _loops_over_choices(module):
        from lora_ext.nn.weight_views.traced import uncompiled

        return uncompiled(call_with_updates, call, module, name, updates, args, kwargs, is_transposed)
    weight = module._parameters[name]
    if reason := _obstacle(module, name):
        _note(module, name, reason)
        raise NeedsWholeError(reason)
    if weight.dim() == 3:
        _check_choices(module, name, weight.shape[0], (*args, *kwargs.values()))
    stacked = StackedUpdates(weight, is_transposed, updates)
    if torch.compiler.is_compiling():
        result = _call(call, module, name, WeightView.of(stacked), args, kwargs)
    else:
        with _locks.setdefault(module, threading.RLock()):
            result = _call(call, module, name, WeightView.of(stacked), args, kwargs)
    if not stacked.is_read and any(isinstance(value, Tensor) and value.numel() for value in (*args, *kwargs.values())):
        _note(module, name, _UNREAD)
        raise NeedsWholeError(_UNREAD)
    _note(module, name, f"{stacked.whole[0]} needs it" if stacked.whole else "")
    return result


def call_with_tensor(
    call: Callable[..., Any],
    module: nn.Module,
    name: str,
    tensor: Tensor,
    args: Sequence[Any],
    kwargs: Mapping[str, Any],
) -> Any:
    """Returns ``call(*args, **kwargs)``; meanwhile ``module`` reads ``tensor`` as its parameter ``name``.

    The parameter stays in its place, where DeepSpeed's hooks look for it. The module's class must have no attribute of
    that name.
    """
    with _locks.setdefault(module, threading.RLock()):
        return _call(call, module, name, tensor, args, kwargs)


class NeedsWholeError(Exception):
    """A call must be made with the whole updated parameter."""


def why_whole(module: nn.Module, name: str) -> str | None:
    """Returns why the last call of ``module`` made a tensor of its parameter ``name``'s size; "": none; None: no call.

    Calls in compiled graphs are not noticed.
    """
    return _last_reasons.get(module, {}).get(name)


def _note(module: nn.Module, name: str, reason: str) -> None:
    if not torch.compiler.is_compiling():
        _last_reasons.setdefault(module, {})[name] = reason


def _call(
    call: Callable[..., Any],
    module: nn.Module,
    name: str,
    value: WeightView | Tensor,
    args: Sequence[Any],
    kwargs: Mapping[str, Any],
) -> Any:
    state = module.__dict__
    outer = state.get(name)  # of a call that this one is inside of
    state[name] = value  # found before the parameter, which stays in its place
    try:
        return call(*args, **kwargs)
    finally:
        state.pop(name, None)  # the module may have assigned to it
        if outer is not None:
            state[name] = outer


def _obstacle(module: nn.Module, name: str) -> str:
    """Returns why a call of ``module`` cannot use a view of its parameter, or ""."""
    if not torch.compiler.is_compiling() and why_whole(module, name) == _UNREAD:
        return _UNREAD
    if hasattr(type(module), name):
        return f"{type(module).__name__} has an attribute of its own called {name}"
    if torch._C._get_tracing_state() is not None:
        return "a trace needs to see PyTorch's functions"
    is_replaced = not torch.compiler.is_compiling() and F.linear is not torch._C._nn.linear
    if is_replaced and not _computes_grouped(module):
        return "another function is in the place of torch.nn.functional.linear (DeepSpeed's), which wants tensors"
    if torch.compiler.is_compiling() and is_experts_of_transformers(module) and not _computes_grouped(module):
        return f"experts_implementation={_implementation(module)!r} was not tried in compiled graphs"
    if torch.compiler.is_dynamo_compiling():
        from lora_ext.nn.weight_views.traced import can_trace_views

        if not can_trace_views():
            return f"PyTorch {torch.__version__} does not trace the stand-in for the parameter; 2.13 to 2.15 do"
    return ""


def is_experts_of_transformers(module: nn.Module) -> bool:
    """Returns whether Transformers' ``use_experts_implementation`` is about the class of ``module``."""
    return hasattr(type(module), "_apply_gate") and "is_transposed" in vars(module) and "has_bias" in vars(module)


def _computes_grouped(module: nn.Module) -> bool:
    """Returns whether Transformers' experts are called by a grouped or batched product, without linear functions."""
    return is_experts_of_transformers(module) and _implementation(module) in _GROUPED_PRODUCTS


def _loops_over_choices(module: nn.Module) -> bool:
    """Returns whether Transformers' experts are called in a loop over the router's choice, which breaks every graph."""
    return is_experts_of_transformers(module) and _implementation(module) in ("eager", None)


def _implementation(module: nn.Module) -> str | None:
    return getattr(getattr(module, "config", None), "_experts_implementation", None)


def _is_expert_parallel(module: nn.Module) -> bool:
    """Returns whether ``module`` may hold a part of the experts; a number beyond them then stands for the others.

    Before version 5.18, Transformers' experts do not say so.
    """
    known = vars(module).get("_is_expert_parallel")
    return torch.distributed.is_available() and torch.distributed.is_initialized() if known is None else known


def _check_choices(module: nn.Module, name: str, num_experts: int, values: Sequence[Any]) -> None:
    """Checks the numbers of experts among the arguments of Transformers' experts, on the CPU.

    Transformers' grouped product leaves rows of no expert uninitialised, and its loop drops some.
    """
    if torch.compiler.is_compiling() or torch._C._are_functorch_transforms_active():  # there are no values to see
        return
    if not is_experts_of_transformers(module) or _is_expert_parallel(module):
        return
    for value in values:
        if type(value) is Tensor and value.dtype in (torch.int64, torch.int32) and value.is_cpu and value.numel():
            least, most = (int(extreme) for extreme in value.aminmax())
            if least < 0 or most >= num_experts:
                raise ValueError(
                    f"{type(module).__name__}: the router chose expert {least if least < 0 else most}, but {name} has "
                    f"the experts 0 to {num_experts - 1}"
                )
