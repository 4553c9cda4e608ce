"""Checks of the arguments of lora_grouped_ and its backward, in the order of csrc/bindings/grouped_call.h.

The values of group_of_row, ranks and scalings are checked by the compiled op alone: a fake kernel has none.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from lora_ext._ops.checks import (
    argument_name,
    check_bias,
    check_dropout,
    check_dropout_and_seed,
    check_floating,
    check_has_dimension,
    check_leading_shape,
    check_matrix,
    check_num_features,
    check_same_dtype,
    count_tokens,
    dtype_name,
    is_contiguous,
)
from lora_ext._ops.checks_backward import check_is_there, check_output_mask, check_saved
from lora_ext._ops.refusals import refusal


def num_slots(factor: Tensor) -> int:
    """Returns the number of groups of an entry: a matrix is one."""
    return factor.shape[0] if factor.dim() == 3 else 1


def largest_rank(lora_As: Sequence[Tensor]) -> int:
    return max(lora_A.shape[-2] for lora_A in lora_As)


def check_lora_grouped(
    y: Tensor,
    x: Tensor,
    lora_As: Sequence[Tensor],
    lora_Bs: Sequence[Tensor],
    group_of_row: Tensor,
    scalings: Tensor,
    ranks: Tensor | None,
    dropout_p: float,
    seed: Tensor | None,
) -> None:
    op = "lora_grouped_"
    _check_grouped(op, "y", y, x, lora_As, lora_Bs, group_of_row, scalings, ranks)
    check_dropout_and_seed(op, dropout_p, seed)
    if not is_contiguous(y):
        raise refusal(op, "not_contiguous", "y", list(y.stride()))


def check_lora_grouped_linear(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    lora_As: Sequence[Tensor],
    lora_Bs: Sequence[Tensor],
    group_of_row: Tensor,
    scalings: Tensor,
    ranks: Tensor | None,
) -> None:
    op = "lora_grouped_linear"
    check_entries(op, lora_As, lora_Bs)
    check_matrix(op, "weight", weight)
    in_features, out_features = lora_As[0].shape[-1], lora_Bs[0].shape[-2]
    if in_features != weight.shape[1]:
        raise refusal(op, "features", "lora_As[0]", "in_features", in_features, "weight", weight.shape[1])
    if out_features != weight.shape[0]:
        raise refusal(op, "features", "lora_Bs[0]", "out_features", out_features, "weight", weight.shape[0])
    check_has_dimension(op, "x", x, "in_features")
    check_num_features(op, "x", x, "weight", in_features, "in_features")
    check_same_dtype(op, "x", x, "weight", weight)
    if bias is not None:
        check_same_dtype(op, "bias", bias, "x", x)
        check_bias(op, "bias", bias, out_features)
    y = x.new_empty((*x.shape[:-1], out_features), device="meta")
    _check_grouped(op, "y", y, None, lora_As, lora_Bs, group_of_row, scalings, ranks)


def check_lora_grouped_backward(
    grad_y: Tensor,
    x: Tensor | None,
    lora_As: Sequence[Tensor],
    lora_Bs: Sequence[Tensor],
    group_of_row: Tensor,
    scalings: Tensor,
    ranks: Tensor | None,
    xa: Tensor | None,
    mask: Tensor | None,
    dropout_p: float,
    output_mask: Sequence[bool],
) -> None:
    op = "lora_grouped_backward"
    check_output_mask(op, output_mask, 1 + 2 * len(lora_As))
    want_x, want_A, want_B = (
        output_mask[0],
        any(output_mask[1 : 1 + len(lora_As)]),
        any(output_mask[1 + len(lora_As) :]),
    )
    check_is_there(op, "x", x, want_A, "grad_lora_A")
    _check_grouped(op, "grad_y", grad_y, x if want_A else None, lora_As, lora_Bs, group_of_row, scalings, ranks)
    check_dropout(op, dropout_p)
    sizes = count_tokens(grad_y), lora_As[0].shape[-1], largest_rank(lora_As)
    check_saved(op, xa, mask, grad_y.dtype, sizes, dropout_p, (want_x, want_A, want_B), "rank")


def _check_grouped(
    op: str,
    name: str,
    tensor: Tensor,
    x: Tensor | None,
    lora_As: Sequence[Tensor],
    lora_Bs: Sequence[Tensor],
    group_of_row: Tensor,
    scalings: Tensor,
    ranks: Tensor | None,
) -> None:
    """Checks a grouped call. ``tensor [..., out_features]`` is the result, or its gradient."""
    check_entries(op, lora_As, lora_Bs)
    check_has_dimension(op, name, tensor, "out_features")
    check_floating(op, name, tensor)
    check_num_features(op, name, tensor, "lora_Bs[0]", lora_Bs[0].shape[-2], "out_features")
    if x is not None:
        check_leading_shape(op, "x", x, name, tensor)
        check_num_features(op, "x", x, "lora_As[0]", lora_As[0].shape[-1], "in_features")
        check_same_dtype(op, "x", x, name, tensor)
    _check_wanted_dtype(op, "group_of_row", group_of_row, torch.int64)
    dims = group_of_row.dim()
    if dims >= tensor.dim() or group_of_row.shape != tensor.shape[:dims]:
        raise refusal(op, "group_of_row", list(group_of_row.shape), name, list(tensor.shape))
    num_groups = sum(map(num_slots, lora_As))
    for numbers_name, numbers, dtype in (("scalings", scalings, torch.float64), ("ranks", ranks, torch.int64)):
        if numbers is None:
            continue
        _check_wanted_dtype(op, numbers_name, numbers, dtype)
        if tuple(numbers.shape) != (num_groups,):
            raise refusal(op, "group_numbers", numbers_name, list(numbers.shape), [num_groups])


def check_entries(op: str, lora_As: Sequence[Tensor], lora_Bs: Sequence[Tensor]) -> None:
    if not lora_As:
        raise refusal(op, "empty_list", "lora_As")
    if len(lora_Bs) != len(lora_As):
        raise refusal(op, "length_like", "lora_Bs", len(lora_Bs), "lora_As", len(lora_As))
    for i, (A, B) in enumerate(zip(lora_As, lora_Bs, strict=True)):
        A_name, B_name = argument_name("lora_A", i), argument_name("lora_B", i)
        for name, factor in ((A_name, A), (B_name, B)):
            if factor.dim() not in (2, 3):
                raise refusal(op, "dimensions", name, list(factor.shape), "2 or 3")
            check_floating(op, name, factor)
        check_same_dtype(op, A_name, A, "lora_As[0]", lora_As[0])
        check_same_dtype(op, B_name, B, A_name, A)
        if B.dim() != A.dim():
            raise refusal(op, "other_dimensions", B_name, list(B.shape), A_name, list(A.shape))
        if num_slots(B) != num_slots(A):
            raise refusal(op, "slots", B_name, num_slots(B), A_name, num_slots(A))
        if B.shape[-1] != A.shape[-2]:
            raise refusal(op, "rank", B_name, B.shape[-1], A_name, A.shape[-2])
        first_A, first_B = lora_As[0], lora_Bs[0]
        if A.shape[-1] != first_A.shape[-1]:
            raise refusal(op, "features", A_name, "in_features", A.shape[-1], "lora_As[0]", first_A.shape[-1])
        if B.shape[-2] != first_B.shape[-2]:
            raise refusal(op, "features", B_name, "out_features", B.shape[-2], "lora_Bs[0]", first_B.shape[-2])


def _check_wanted_dtype(op: str, name: str, tensor: Tensor, dtype: torch.dtype) -> None:
    if tensor.dtype != dtype:
        raise refusal(op, "wanted_dtype", name, dtype_name(tensor.dtype), dtype_name(dtype))
