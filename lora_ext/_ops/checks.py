"""Checks of the arguments of ops.

The compiled ops check their arguments, at no Python cost (csrc/bindings/op_checks.h). The same checks are ops of their
own, ``lora_ext_check::<op>``, on every device: :func:`check_arguments` runs them where no kernel runs, in fake kernels
and in plain PyTorch, so that a traced graph refuses what a call refuses, in the same words. Here are also the checks of
public functions that are more than one op, with the texts of csrc/refusals.h.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from lora_ext import _load
from lora_ext._ops.refusals import refusal, refusal_of_op
from lora_ext._ops.tensor_arguments import check_tensors, is_wrapper, tensors_of

_LARGEST = torch.finfo(torch.float64).max  # Python's integers may be larger
FLOATING = tuple(getattr(torch, name) for name in _load.dtypes())  # csrc/common/dtype.h
_MERGE_SEGMENT = 256  # columns that share a record: csrc/common/merge_record.h
_MAX_MERGED_SIZE = 2**30  # of rows and of columns, which the kernels count in 32 bits


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
        values = [_described(value) for value in values]
    if text := getattr(torch.ops.lora_ext_check, name).default(*values):
        raise refusal_of_op(RuntimeError(text)) or RuntimeError(text)


def _described(value: object) -> object:
    """Returns tensors without memory in place of tensors. Wrappers count as contiguous."""
    if isinstance(value, (list, tuple)):
        return [_described(entry) for entry in value]
    if not isinstance(value, Tensor):
        return value
    if is_wrapper(value):
        return torch.empty(value.shape, dtype=value.dtype, device="meta")
    return torch.empty_strided(value.shape, value.stride(), dtype=value.dtype, device="meta")


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
    tensors = {"weight": weight, "lora_A": lora_A, "lora_B": lora_B}
    check_tensors(op, tensors)
    for name, tensor in tensors.items():
        check_matrix(op, name, tensor)
    if lora_B.dtype != lora_A.dtype:
        raise refusal(op, "other_dtype", "lora_B", dtype_name(lora_B.dtype), "lora_A", dtype_name(lora_A.dtype))
    if lora_A.shape[0] < 1:
        raise refusal(op, "no_rank", "lora_A")
    if lora_B.shape[1] != lora_A.shape[0]:
        raise refusal(op, "rank", "lora_B", lora_B.shape[1], "lora_A", lora_A.shape[0])
    if lora_A.shape[1] != weight.shape[1]:
        raise refusal(op, "features", "lora_A", "in_features", lora_A.shape[1], "weight", weight.shape[1])
    if lora_B.shape[0] != weight.shape[0]:
        raise refusal(op, "features", "lora_B", "out_features", lora_B.shape[0], "weight", weight.shape[0])
    check_merge_strides(op, weight, "weight")


def check_merge_strides(op: str, weight: Tensor, name: str) -> None:
    """Checks that the merge's kernels can write to ``weight``: rows of unit column stride that do not overlap."""
    if weight.shape[1] > 1 and weight.stride(1) != 1:
        raise refusal(op, "column_stride", name, weight.stride(1))
    if weight.shape[0] > 1 and weight.stride(0) < weight.shape[1]:
        raise refusal(op, "row_stride", name, weight.stride(0), weight.shape[1])
    if max(weight.shape) > _MAX_MERGED_SIZE:
        raise refusal(op, "merge_size", name, list(weight.shape))
