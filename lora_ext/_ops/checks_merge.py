"""Checks of the arguments of merge ops, like those of lora_ext/_ops/checks.py."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from lora_ext._ops.checks import (
    argument_name,
    check_accumulation_dtype,
    check_contiguous_matrix,
    check_factors,
    dtype_name,
)
from lora_ext._ops.refusals import refusal
from lora_ext._ops.tensor_arguments import check_tensors

MERGE_SEGMENT = 256  # columns that share a record: csrc/common/merge_record.h
MAX_MERGED_SIZE = 2**30  # of rows and of columns, which the kernels count in 32 bits: csrc/bindings/merge_call.h


def merge_segments(in_features: int) -> int:
    return (in_features + MERGE_SEGMENT - 1) // MERGE_SEGMENT


def check_merge_layer(op: str, weight: Tensor, lora_A: Tensor, lora_B: Tensor, index: int | None = None) -> None:
    """Checks a weight to merge into and factors, of any dtype, that fit it; all on one device."""
    names = [argument_name(name, index) for name in ("weight", "lora_A", "lora_B")]
    check_tensors(op, dict(zip(names, (weight, lora_A, lora_B), strict=True)))
    check_factors(op, weight, lora_A, lora_B, index)
    check_merge_strides(op, weight, argument_name("weight", index))


def check_merge_strides(op: str, weight: Tensor, name: str) -> None:
    """Checks that the merge's kernels can write to ``weight``: rows of unit column stride that do not overlap."""
    if weight.shape[1] > 1 and weight.stride(1) != 1:
        raise refusal(op, "column_stride", name, weight.stride(1))
    if weight.shape[0] > 1 and weight.stride(0) < weight.shape[1]:
        raise refusal(op, "row_stride", name, weight.stride(0), weight.shape[1])
    if max(weight.shape) > MAX_MERGED_SIZE:
        raise refusal(op, "merge_size", name, list(weight.shape))


def check_merge(op: str, weights: Sequence[Tensor], lora_As: Sequence[Tensor], lora_Bs: Sequence[Tensor]) -> None:
    """Checks the lists of a merge op: equal lengths, one dtype, factors in the accumulation dtype.

    That no two arguments share memory is checked when an op runs, not when it is traced.
    """
    if not weights:
        raise refusal(op, "no_weights")
    if not len(weights) == len(lora_As) == len(lora_Bs):
        raise refusal(op, "merge_lengths", len(weights), len(lora_As), "lora_As", len(lora_Bs), "lora_Bs")
    for i, (weight, A, B) in enumerate(zip(weights, lora_As, lora_Bs, strict=True)):
        check_merge_layer(op, weight, A, B, i)
        if weight.dtype != weights[0].dtype:
            dtypes = dtype_name(weight.dtype), dtype_name(weights[0].dtype)
            raise refusal(op, "merge_dtypes", f"weights[{i}]", dtypes[0], "weights[0]", dtypes[1])
        check_accumulation_dtype(op, f"lora_As[{i}]", A, weight.dtype)


def check_record(op: str, weights: Sequence[Tensor], words: Sequence[Tensor], corrections: Sequence[Tensor]) -> None:
    """Checks each layer's words and corrections (csrc/common/merge_record.h), or that both lists are empty."""
    if not words and not corrections:
        return
    if not len(weights) == len(words) == len(corrections):
        raise refusal(op, "merge_lengths", len(weights), len(words), "words", len(corrections), "corrections")
    for i, (weight, layer_words, layer_corrections) in enumerate(zip(weights, words, corrections, strict=True)):
        shape = weight.shape[0], merge_segments(weight.shape[1])
        check_contiguous_matrix(op, f"words[{i}]", layer_words, torch.int16, shape)
        is_vector = layer_corrections.dtype == torch.int16 and layer_corrections.dim() == 1
        if not (is_vector and layer_corrections.is_contiguous()):
            raise refusal(op, "int16_vector", f"corrections[{i}]")
