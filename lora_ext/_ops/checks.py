"""Checks of the arguments of ops, and refusals: the texts of csrc/refusals.h, which the compiled ops share.

The compiled ops check their arguments, at no Python cost (csrc/bindings/checks.h). The same checks are ops of their
own, ``lora_ext_check::<op>``, on every device: :func:`check_arguments` runs them where no kernel runs, in fake kernels
and in plain PyTorch, so that a traced graph refuses what a call refuses, in the same words. Here are also the checks of
public functions that are more than one op.
"""

from __future__ import annotations

import functools
import re
from collections.abc import Iterator, Mapping, Sequence

import torch
from torch import Tensor

from lora_ext import _load

_LARGEST = torch.finfo(torch.float64).max  # Python's integers may be larger
FLOATING = tuple(getattr(torch, name) for name in _load.dtypes())  # csrc/common/dtype.h
_MERGE_SEGMENT = 256  # columns that share a record: csrc/common/merge_record.h
_functorch = torch._C._functorch


def accumulation_dtype(dtype: torch.dtype) -> torch.dtype:
    return torch.float64 if dtype == torch.float64 else torch.float32


def mask_row_bytes(in_features: int) -> int:
    """Bytes of one row of the bit mask: whole 64-bit words. csrc/common/dropout.h."""
    return (in_features + 63) // 64 * 8


def merge_segments(in_features: int) -> int:
    return (in_features + _MERGE_SEGMENT - 1) // _MERGE_SEGMENT


def count_tokens(x: Tensor) -> int:
    """Product of the leading dimensions of ``[..., features]``."""
    num_tokens = 1
    for size in x.shape[:-1]:
        num_tokens = num_tokens * size
    return num_tokens


# --- refusals ---------------------------------------------------------------------------------------------------------

_ERRORS: dict[str, type[Exception]] = {"ValueError": ValueError, "TypeError": TypeError}
_REFUSALS = {name: (_ERRORS[error], text) for name, (error, text) in _load.refusals().items()}


def refusal(op: str, name: str, *parts: object) -> Exception:
    """Returns the exception for a refusal of csrc/refusals.h. ``parts`` replace the ``{}`` of its text, in order."""
    error, text = _REFUSALS[name]
    return error(f"{op}: {text.format(*parts)}")


def refusal_of_op(error: Exception, caller: str | None = None) -> Exception | None:
    """Returns the exception for a refusal that a compiled op raised as a RuntimeError; None for any other error.

    ``caller``: the function to name in place of the op.
    """
    for kind, text in _REFUSALS.values():
        pattern = ".*".join(re.escape(part) for part in text.split("{}"))
        if refused := re.fullmatch(rf"(\w+): ({pattern})", str(error), re.DOTALL):
            return kind(f"{caller or refused[1]}: {refused[2]}")
    return None


# --- all tensors of an op, whether it uses them or not ----------------------------------------------------------------
# PyTorch also calls the fake kernels for real tensors if one argument is a meta tensor: they would return uninitialised
# memory. So they check every tensor of every call, as csrc/bindings/arguments.h does for the compiled ops.


def tensors_of(arguments: Mapping[str, object]) -> Iterator[tuple[str, Tensor]]:
    """Yields the tensors among arguments and in lists, each with its name in messages: ``weight``, ``weights[1]``."""
    for name, value in arguments.items():
        if isinstance(value, Tensor):
            yield name, value
        elif isinstance(value, (list, tuple)):
            yield from ((f"{name}[{i}]", entry) for i, entry in enumerate(value) if isinstance(entry, Tensor))


def is_wrapper(tensor: Tensor) -> bool:
    """Returns whether it is a batch or a level of torch.func, which has no storage and which no kernel reads."""
    return _functorch.is_functorch_wrapped_tensor(tensor) or _functorch.is_legacy_batchedtensor(tensor)


def check_tensors(op: str, arguments: Mapping[str, object]) -> None:
    """Raises TypeError for a tensor that is not dense or that PyTorch quantised, ValueError for one on another device
    than the first tensor.
    """
    first: tuple[str, Tensor] | None = None
    for label, tensor in tensors_of(arguments):
        if tensor.is_nested:
            raise TypeError(f"{op}: {label} is a nested tensor, want a dense one")
        if tensor.layout is not torch.strided:
            raise TypeError(
                f"{op}: {label} has layout {str(tensor.layout).removeprefix('torch.')}, want a dense tensor"
            )
        if tensor.is_quantized:
            raise refusal(op, "dtype", label, str(tensor.dtype).removeprefix("torch."))
        first = first or (label, tensor)
        if not _is_same(tensor.device, first[1].device):
            raise refusal(op, "device", label, tensor.device, first[0], first[1].device)


_NOT_SAVED = "Inference tensors cannot be saved for backward"  # PyTorch's words


def explain_inference(op: str, arguments: Mapping[str, object], error: Exception) -> None:
    """Raises RuntimeError with the names of the inference tensors, if ``error`` is that autograd cannot keep one."""
    if str(error).startswith(_NOT_SAVED):
        refuse_to_keep(op, [label for label, tensor in tensors_of(arguments) if tensor.is_inference()])


def refuse_to_keep(op: str, labels: Sequence[str]) -> None:
    """Raises RuntimeError: autograd cannot keep these inference tensors."""
    are = "is an inference tensor" if len(labels) == 1 else "are inference tensors"
    raise RuntimeError(
        f"{op}: {', '.join(labels)} {are}, which autograd cannot keep for the backward; "
        f"pass {', '.join(f'{label}.clone()' for label in labels)}"
    ) from None


def _is_same(device: torch.device, other: torch.device) -> bool:
    """Returns whether the two are one device: cpu:0 is the CPU."""
    return device == other or (device.type == other.type and device.type in ("cpu", "meta"))


def check_not_lazy(op: str, label: str, tensor: Tensor) -> None:
    """Raises ValueError if a tensor that an op would change is a lazy view."""
    if tensor.is_neg() or tensor.is_conj() or tensor._is_zerotensor():
        raise ValueError(f"{op}: {label} is a lazy view, whose memory holds other values; pass {label}.clone()")


# --- the checks of the compiled ops -----------------------------------------------------------------------------------


def check_arguments(name: str, values: Sequence[object]) -> None:
    """Raises ValueError or TypeError for what the compiled op ``name`` would refuse of its arguments.

    Sizes that are symbols (``dynamic=True``) are left for the compiled op to refuse.
    """
    tensors = [tensor for _, tensor in tensors_of(dict(enumerate(values)))]
    if any(type(size) is torch.SymInt for tensor in tensors for size in (*tensor.shape, *tensor.stride())):
        return
    if any(type(value) in (torch.SymInt, torch.SymFloat) for value in values):
        return
    if any(map(is_wrapper, tensors)):
        values = [_without_wrappers(value) for value in values]
    if text := getattr(torch.ops.lora_ext_check, name).default(*values):
        raise refusal_of_op(RuntimeError(text)) or RuntimeError(text)


def _without_wrappers(value: object) -> object:
    """Returns garbage of the same shape in place of a wrapper, which counts as contiguous."""
    if isinstance(value, (list, tuple)):
        return [_without_wrappers(entry) for entry in value]
    if not (isinstance(value, Tensor) and is_wrapper(value)):
        return value
    return torch.empty(value.shape, dtype=value.dtype, device=value.device)


# --- functions that are more than one op ------------------------------------------------------------------------------


def dtype_name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def check_scaling(op: str, scaling: float, name: str = "scaling") -> None:
    if not -_LARGEST <= scaling <= _LARGEST:
        raise refusal(op, "not_finite", name, scaling)


def check_floating(op: str, name: str, tensor: Tensor) -> None:
    if tensor.dtype not in FLOATING:
        raise refusal(op, "dtype", name, dtype_name(tensor.dtype))


def check_matrix(op: str, name: str, tensor: Tensor) -> None:
    if tensor.dim() != 2:
        raise refusal(op, "dimensions", name, list(tensor.shape), 2)
    check_floating(op, name, tensor)


def check_merge_layer(op: str, weight: Tensor, lora_A: Tensor, lora_B: Tensor) -> None:
    """Checks a weight to merge into and factors, of any dtype, that fit it; all on one device."""
    check_tensors(op, {"weight": weight, "lora_A": lora_A, "lora_B": lora_B})
    check_floating(op, "lora_A", lora_A)
    if lora_B.dtype != lora_A.dtype:
        raise refusal(op, "other_dtype", "lora_B", dtype_name(lora_B.dtype), "lora_A", dtype_name(lora_A.dtype))
    check_merge(op, "weight", weight, lora_A.shape, lora_B.shape)


def check_merge(op: str, label: str, weight: Tensor, shape_A: Sequence[int], shape_B: Sequence[int]) -> None:
    """Checks what lora_merge_ does for a weight, which messages call ``label``, and factors of these shapes."""
    text = _why_no_merge(weight.shape, weight.stride(), weight.dtype, tuple(shape_A), tuple(shape_B))
    for name, shown in (("weights[0]", label), ("lora_As[0]", "lora_A"), ("lora_Bs[0]", "lora_B")):
        text = text.replace(name, shown)
    if text:
        raise refusal_of_op(RuntimeError(text), op)


@functools.lru_cache
def _why_no_merge(shape: tuple, stride: tuple, dtype: torch.dtype, shape_A: tuple, shape_B: tuple) -> str:
    """Returns why lora_merge_ refuses such a weight and factors, or "". Cached: layers of a model have few shapes."""
    acc = accumulation_dtype(dtype)
    weight = torch.empty_strided(shape, stride, dtype=dtype, device="meta")
    factors = [[torch.empty(shape, dtype=acc, device="meta")] for shape in (shape_A, shape_B)]
    return torch.ops.lora_ext_check.lora_merge_.default([weight], *factors)
