"""What a user may pass to an op, and the words for what they may not.

The fake kernels run these checks when a graph is traced. In eager mode the compiled op checks first, at no Python cost,
and these run only once it has refused, to say why as a ``ValueError`` or ``TypeError``.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

FLOATING = (torch.float64, torch.float32, torch.bfloat16, torch.float16)


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def check_scaling(op: str, scaling: float) -> None:
    if not math.isfinite(scaling):
        raise ValueError(f"{op}: scaling is {scaling}, want a finite number")


def check_dropout(op: str, dropout_p: float) -> None:
    if not 0.0 <= dropout_p < 1.0:
        raise ValueError(f"{op}: dropout_p is {dropout_p}, want 0 <= dropout_p < 1")


def check_factors(op: str, weight: Tensor, lora_A: Tensor, lora_B: Tensor) -> None:
    """weight [out, in], lora_A [r, in], lora_B [out, r]: two dimensions each, matching sizes, one device."""
    for name, tensor in (("weight", weight), ("lora_A", lora_A), ("lora_B", lora_B)):
        if tensor.dim() != 2:
            raise ValueError(f"{op}: {name} has shape {list(tensor.shape)}, want 2 dimensions")
        if tensor.dtype not in FLOATING:
            raise TypeError(
                f"{op}: {name} has dtype {_name(tensor.dtype)}, want one of {', '.join(map(_name, FLOATING))}"
            )
        if tensor.device != weight.device:
            raise ValueError(f"{op}: {name} is on {tensor.device} but weight is on {weight.device}")
    if lora_A.dtype != lora_B.dtype:
        raise TypeError(f"{op}: lora_B has dtype {_name(lora_B.dtype)} but lora_A has {_name(lora_A.dtype)}")
    if lora_A.shape[0] == 0:
        raise ValueError(f"{op}: lora_A has rank 0, want at least 1")
    if lora_A.shape[1] != weight.shape[1]:
        raise ValueError(f"{op}: lora_A has in_features={lora_A.shape[1]} but weight has {weight.shape[1]}")
    if lora_B.shape[0] != weight.shape[0]:
        raise ValueError(f"{op}: lora_B has out_features={lora_B.shape[0]} but weight has {weight.shape[0]}")
    if lora_B.shape[1] != lora_A.shape[0]:
        raise ValueError(f"{op}: lora_B has rank {lora_B.shape[1]} but lora_A has {lora_A.shape[0]}")


def check_lora_linear(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    lora_A: Tensor,
    lora_B: Tensor,
    scaling: float,
    dropout_p: float,
    seed: Tensor | None,
) -> None:
    op = "lora_linear"
    check_factors(op, weight, lora_A, lora_B)
    if x.dim() == 0:
        raise ValueError(f"{op}: x has no dimension, want [..., in_features]")
    if x.shape[-1] != weight.shape[1]:
        raise ValueError(f"{op}: weight has in_features={weight.shape[1]} but x has {x.shape[-1]}")
    for name, tensor in (("weight", weight), ("bias", bias)):
        if tensor is not None and tensor.dtype != x.dtype:
            raise TypeError(f"{op}: {name} has dtype {_name(tensor.dtype)} but x has {_name(x.dtype)}")
        if tensor is not None and tensor.device != x.device:
            raise ValueError(f"{op}: {name} is on {tensor.device} but x is on {x.device}")
    if bias is not None and tuple(bias.shape) != (weight.shape[0],):
        raise ValueError(f"{op}: bias has shape {list(bias.shape)}, want [{weight.shape[0]}]")
    check_scaling(op, scaling)
    if scaling < 0.0:
        raise ValueError(f"{op}: scaling is {scaling}, want at least 0")
    check_dropout(op, dropout_p)
    if dropout_p > 0.0:
        if seed is None:
            raise ValueError(f"{op}: dropout_p is {dropout_p} but seed is None, want an int64 tensor of one element")
        if seed.dtype != torch.int64 or seed.numel() != 1:
            raise ValueError(
                f"{op}: seed is {_name(seed.dtype)} {list(seed.shape)}, want an int64 tensor of one element"
            )
        if seed.device != x.device:
            raise ValueError(f"{op}: seed is on {seed.device} but x is on {x.device}")


# --- merging ----------------------------------------------------------------------------------------------------------

MERGE_SEGMENT = 256  # columns that share a record: csrc/common/merge_record.h


def merge_segments(in_features: int) -> int:
    return (in_features + MERGE_SEGMENT - 1) // MERGE_SEGMENT


def accumulation_dtype(dtype: torch.dtype) -> torch.dtype:
    return torch.float64 if dtype == torch.float64 else torch.float32


def check_merge_weight(op: str, weight: Tensor) -> None:
    if weight.shape[1] > 1 and weight.stride(1) != 1:
        raise ValueError(f"{op}: weight has column stride {weight.stride(1)}, want 1; merge a contiguous one")
    if weight.shape[0] > 1 and weight.stride(0) < weight.shape[1]:
        raise ValueError(
            f"{op}: weight has row stride {weight.stride(0)} but {weight.shape[1]} columns: its rows overlap"
        )


def check_merge(op: str, weights: Sequence[Tensor], lora_A: Sequence[Tensor], lora_B: Sequence[Tensor]) -> None:
    """What the merge ops take: lists of equal length, one dtype and device, factors in the accumulation dtype."""
    if not weights:
        raise ValueError(f"{op}: weights is empty, want at least one")
    if not len(weights) == len(lora_A) == len(lora_B):
        raise ValueError(f"{op}: there are {len(weights)} weights, but {len(lora_A)} lora_A and {len(lora_B)} lora_B")
    for weight, A, B in zip(weights, lora_A, lora_B, strict=True):
        check_factors(op, weight, A, B)
        check_merge_weight(op, weight)
        if weight.dtype != weights[0].dtype:
            raise TypeError(f"{op}: weights differ in dtype: {_name(weights[0].dtype)} and {_name(weight.dtype)}")
        if weight.device != weights[0].device:
            raise ValueError(f"{op}: weights are on {weights[0].device} and {weight.device}")
        acc = accumulation_dtype(weight.dtype)
        if A.dtype != acc:
            raise TypeError(f"{op}: lora_A has dtype {_name(A.dtype)}, want {_name(acc)} beside {_name(weight.dtype)}")
