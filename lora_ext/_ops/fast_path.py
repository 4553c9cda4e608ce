"""Questions about a call: who is to see it, autograd, a transform, a mode, ...; and the fast path.

Calls that go to autograd and then to the kernel, which nothing else is to see, may skip the dispatcher's way through
Python, which costs microseconds. And calls of two layers in the same state compute the same from the same arguments, so
that layers that read one tensor can be computed together.
"""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

import torch
from torch import Tensor
from torch.autograd import forward_ad
from torch.overrides import has_torch_function_variadic


def _dispatch_state() -> tuple[int, int]:
    """Returns the dispatch keys that this thread includes and excludes, as bits."""
    return _included().raw_repr(), _excluded().raw_repr() | _NAMED


def _keys(*names: str) -> int:
    keys = torch._C.DispatchKeySet(getattr(torch._C.DispatchKey, names[0]))
    for name in names[1:]:
        keys = keys | torch._C.DispatchKeySet(getattr(torch._C.DispatchKey, name))
    return keys.raw_repr()


_included, _excluded = torch._C._dispatch_tls_local_include_set, torch._C._dispatch_tls_local_exclude_set
_named = torch._C._parse_dispatch_key("Named")  # None: newer releases have no such key
# Excluded in the backward of torch 2.11; it concerns tensors with names only.
_NAMED = 0 if _named is None else torch._C.DispatchKeySet(_named).raw_repr()
with ThreadPoolExecutor(1) as _new_thread:  # this one may be within autocast, inference mode, a transform, ...
    _PLAIN_INCLUDED, _PLAIN_EXCLUDED = _new_thread.submit(_dispatch_state).result()


def takes_fast_path(*tensors: Tensor | None) -> bool:
    """Returns whether this thread's calls go to autograd and then to the kernel, and nothing else is to see them.

    Autocast, inference mode, modes and transforms, tracing: all of them change the dispatch keys of the thread. Tensors
    of a subclass may see calls, too.
    """
    return (
        _included().raw_repr() == _PLAIN_INCLUDED
        and _excluded().raw_repr() | _NAMED == _PLAIN_EXCLUDED
        and forward_ad._current_level < 0
        and not has_torch_function_variadic(*tensors)
    )


_AUTOCAST = _keys("AutocastCPU", "AutocastCUDA")
_MODES = _keys("Python", "PythonTLSSnapshot")


def autocast_device(tensor: Tensor) -> str:
    """Returns the device type whose autocast applies to ``tensor``; the CPU's to meta tensors, which have none."""
    kind = tensor.device.type
    return "cpu" if kind == "meta" else kind


def cast_to(y: Tensor, x: Tensor) -> Tensor:
    """Casts ``x`` to the dtype that the base layer returned, under autocast only."""
    return x.to(y.dtype) if x.dtype != y.dtype and torch.is_autocast_enabled(autocast_device(x)) else x


def call_state(x: Tensor) -> tuple | None:
    """Returns the state of ``x`` and all else that decides, next to the arguments, what a call with ``x`` computes.

    None if more than autocast or a dispatch mode distinguishes the state from the plain one (:func:`takes_fast_path`),
    or if ``x`` is a subclass or an inference tensor.
    """
    if type(x) is not Tensor or x.is_inference() or forward_ad._current_level >= 0:
        return None
    autocast, (included, excluded) = None, _dispatch_state()
    if included != _PLAIN_INCLUDED and included & ~_MODES != _PLAIN_INCLUDED:
        return None
    if excluded != _PLAIN_EXCLUDED:
        if excluded | _AUTOCAST != _PLAIN_EXCLUDED | _AUTOCAST:
            return None
        autocast = torch.get_autocast_dtype(autocast_device(x))
    stream = _stream(x) if x.is_cuda else None
    return included, excluded, autocast, torch.is_grad_enabled(), x._version, x.requires_grad, stream


def _stream(x: Tensor) -> tuple[torch.cuda.Stream, bool]:
    """Returns where kernels on ``x`` go now, and whether a graph captures it: an earlier call is not in the graph."""
    return torch.cuda.current_stream(x.device), torch.cuda.is_current_stream_capturing()


def lean_apply(function: type[torch.autograd.Function], num_tensors: int) -> Callable:
    """Returns ``function.apply`` without what that does for torch.func, for the fast path; tensors come first."""
    lean = super(torch.autograd.Function, function).apply

    def apply(*arguments):
        for tensor in arguments[:num_tensors]:
            if tensor is not None and _is_wrapper(tensor):  # left by a transform that has ended
                return function.apply(*arguments)
        return lean(*arguments)

    return apply


_is_wrapper = torch._C._functorch.is_functorch_wrapped_tensor

# --- autograd and transforms ------------------------------------------------------------------------------------------

below_autograd = torch._C._AutoDispatchBelowAutograd


def any_requires_grad(*tensors: Tensor | None) -> bool:
    """Returns whether autograd records an op with these tensors. A None from the user is left for the op to refuse."""
    if torch.is_grad_enabled():
        for tensor in tensors:  # takes half the time of any()
            if tensor is not None and tensor.requires_grad:
                return True
    return False


def has_tangent(*tensors: Tensor | None) -> bool:
    """Returns whether one of the tensors has a tangent (forward-mode differentiation), which is lost below autograd."""
    return forward_ad._current_level >= 0 and any(
        tensor is not None and forward_ad.unpack_dual(tensor).tangent is not None for tensor in tensors
    )


def is_transformed(*tensors: Tensor | None) -> bool:
    """Returns whether a function of these must use PyTorch's operations only: for a transform, batch or tangent."""
    return not torch.compiler.is_compiling() and (
        torch._C._are_functorch_transforms_active()
        or has_tangent(*tensors)
        or any(tensor is not None and torch._C._functorch.is_legacy_batchedtensor(tensor) for tensor in tensors)
    )


def call_backward(op: Callable, *arguments: object) -> tuple:
    """Calls a backward op: below autograd if no gradient's gradient is wanted."""
    if torch.is_grad_enabled() or forward_ad._current_level >= 0 or torch._C._are_functorch_transforms_active():
        return op(*arguments)
    with below_autograd():
        return op(*arguments)
