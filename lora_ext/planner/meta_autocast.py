"""Makes ``torch.autocast("cpu")`` cast tensors on the meta device as autocast casts those of a real device."""

from __future__ import annotations

import functools
import re
import threading
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor
from torch._C import DispatchKey, DispatchKeySet
from torch._ops import OpOverload
from torch.utils._pytree import tree_leaves, tree_map

from lora_ext._ops.registration import num_cast_arguments

_KEY = DispatchKey.AutocastPrivateUse1  # of devices that extensions of PyTorch add
_AUTOCAST = DispatchKeySet(_KEY) | DispatchKeySet(DispatchKey.AutocastCPU)

# From ATen/autocast_mode.h and autocast_mode.cpp of PyTorch 2.13. The dispatcher says which operators autocast of a
# device changes; those of them that are in no list compute in float32.
_LOWER = re.compile(
    "_addmm_activation|_?convolution|_native_multi_head_attention|(_scaled_dot_product_flash|scaled_dot_product)_attention|"
    "_thnn_fused_(gru|lstm)_cell|add(bmm|mm|mv|r)|baddbmm|bmm|chain_matmul|conv[123]d|conv_tbc|conv_transpose[123]d|einsum|"
    "(gru|lstm|rnn_tanh|rnn_relu)_cell|linalg_multi_dot|linalg_vecdot|linear|matmul|mkldnn_rnn_layer|mm|mv|prelu"
)
_WIDEST = re.compile(
    "addcdiv|addcmul|atan2|bilinear|cat|cross|dot|grid_sampler|index_copy|index_put|scatter_add|stack|tensordot|vdot"
)
_RETURNS_FLOAT32 = re.compile("cumprod|cumsum|log_softmax|prod|softmax|sum")  # on CUDA, by their argument dtype


_one_thread = threading.RLock()  # kernels are registered for the whole process


@contextmanager
def meta_autocast(device: str) -> Iterator[None]:
    """Gives meta tensors the autocast of ``device``, ``"cuda"`` or ``"cpu"``, inside a ``with`` block.

    In the block ``torch.autocast("cpu", dtype)`` turns it on, for both devices. Checkpointing restores this autocast
    when it computes a layer again. As in PyTorch, copies of trained float32 parameters are kept until the outermost
    ``torch.autocast`` ends; other casts are kept only by autograd.

    PyTorch's autocast ignores meta tensors. The operators get kernels for a dispatch key that no tensor here has, and
    that this thread includes; other threads wait for the end of the block. ``torch.clear_autocast_cache``, which
    ``torch.autocast`` calls, is replaced.
    """
    copies: dict[int, tuple[Tensor, Tensor]] = {}  # by id(parameter): the parameter, which keeps the id, and its copy
    clear = torch.clear_autocast_cache

    def clear_all() -> None:
        copies.clear()
        clear()

    with _one_thread, ExitStack() as stack:
        libraries = {
            name: stack.enter_context(torch.library._scoped_library(name, "IMPL")) for name in ("_", "aten", "lora_ext")
        }
        libraries["_"].fallback(torch.library.fallthrough_kernel, _KEY.name)
        for op in _changed_operators(device):
            libraries["aten"].impl(op, _aten_kernel(op, device, copies), _KEY.name)
        for name, count in num_cast_arguments.items():
            op = getattr(torch.ops.lora_ext, name).default
            libraries["lora_ext"].impl(op, _lora_kernel(op, count), _KEY.name)
        stack.callback(setattr, torch, "clear_autocast_cache", clear)
        torch.clear_autocast_cache = clear_all
        stack.callback(torch.set_autocast_enabled, "privateuseone", False)  # the key is excluded, included or not
        torch.set_autocast_enabled("privateuseone", True)
        with torch._C._IncludeDispatchKeyGuard(_KEY):
            yield


def _changed_operators(device: str) -> list[OpOverload]:
    """Returns ATen's operators that autocast of ``device`` changes."""
    names = torch._C._dispatch_get_registrations_for_dispatch_key(f"Autocast{device.upper()}")
    split = (name.removeprefix("aten::").partition(".") for name in names if name.startswith("aten::"))
    return [getattr(getattr(torch.ops.aten, packet), overload or "default") for packet, _, overload in split]


def _aten_kernel(op: OpOverload, device: str, copies: dict[int, tuple[Tensor, Tensor]]) -> Callable:
    name, names = op._schema.name.removeprefix("aten::"), [argument.name for argument in op._schema.arguments]

    def cast(dtype: torch.dtype, value: Any) -> Any:
        if not _is_cast(value) or value.dtype == dtype:
            return value
        is_trained = value.dtype == torch.float32 and value.requires_grad and value.is_leaf and value._base is None
        if dtype == torch.float32 or not is_trained or not torch.is_autocast_cache_enabled():
            return value.to(dtype)
        if id(value) not in copies:
            with torch.enable_grad():
                copies[id(value)] = value, value.to(dtype)
        return copies[id(value)][1]

    def kernel(*arguments: Any, **named: Any) -> Any:
        is_on = torch.is_autocast_enabled("cpu")
        with torch._C._ExcludeDispatchKeyGuard(_AUTOCAST):
            if not is_on:
                return op(*arguments, **named)
            named |= zip(names, arguments, strict=False)
            if device == "cuda" and _RETURNS_FLOAT32.fullmatch(name):
                if _is_cast(named["self"]) and named.get("dtype") is None:
                    named["dtype"] = torch.float32
                return op(**named)
            dtype = torch.get_autocast_dtype("cpu") if _LOWER.fullmatch(name) else torch.float32
            if _WIDEST.fullmatch(name):
                tensors = filter(_is_cast, tree_leaves(named))
                dtype = functools.reduce(torch.promote_types, (tensor.dtype for tensor in tensors), torch.bfloat16)
            return op(**tree_map(functools.partial(cast, dtype), named))

    return kernel


def _lora_kernel(op: OpOverload, num_cast: int) -> Callable:
    def kernel(*arguments: Any) -> Any:
        is_on, dtype = torch.is_autocast_enabled("cpu"), torch.get_autocast_dtype("cpu")
        cast = lambda value: value.to(dtype) if is_on and _is_cast(value) else value  # noqa: E731
        with torch._C._ExcludeDispatchKeyGuard(_AUTOCAST):
            return op(*tree_map(cast, arguments[:num_cast]), *arguments[num_cast:])

    return kernel


def _is_cast(value: Any) -> bool:
    """Returns whether autocast may cast ``value``: floating-point tensors, except float64."""
    return isinstance(value, Tensor) and value.is_floating_point() and value.dtype != torch.float64
