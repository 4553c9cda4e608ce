"""Checks of the arguments of the backward ops, and of lora_shrink and lora_expand.

Users do not call these ops: the forward determines their arguments. But a traced or edited graph may hold anything, so
their fake kernels refuse what the compiled ops refuse (csrc/bindings/backward_call.h, shrink_expand_ops.h).
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from lora_ext._ops.checks import (
    argument_name,
    check_accumulation_dtype,
    check_bias,
    check_contiguous_matrix,
    check_delta,
    check_deltas,
    check_dropout,
    check_factors,
    check_floating,
    check_has_dimension,
    check_matrix,
    check_num_features,
    check_num_siblings,
    check_rank,
    check_same_dtype,
    check_scaling,
    count_tokens,
    mask_row_bytes,
)
from lora_ext._ops.refusals import refusal
from lora_ext.reference import dropout_threshold

_Layer = tuple[Tensor, Tensor, Tensor, Tensor, float]  # grad_y, weight, lora_A, lora_B, scaling


def check_lora_linear_backward(
    grad_y: Tensor,
    x: Tensor | None,
    weight: Tensor,
    lora_A: Tensor,
    lora_B: Tensor,
    xa: Tensor | None,
    mask: Tensor | None,
    scaling: float,
    dropout_p: float,
    output_mask: Sequence[bool],
) -> None:
    layers = [(grad_y, weight, lora_A, lora_B, scaling)]
    _check_backward("lora_linear_backward", layers, x, xa, mask, dropout_p, output_mask, takes_lists=False)


def check_lora_linear_siblings_backward(
    grad_ys: Sequence[Tensor],
    x: Tensor | None,
    weights: Sequence[Tensor],
    lora_As: Sequence[Tensor],
    lora_Bs: Sequence[Tensor],
    xa: Tensor | None,
    mask: Tensor | None,
    scalings: Sequence[float],
    dropout_p: float,
    output_mask: Sequence[bool],
) -> None:
    op = "lora_linear_siblings_backward"
    check_num_siblings(op, "weights", weights, grad_ys=grad_ys, lora_As=lora_As, lora_Bs=lora_Bs, scalings=scalings)
    layers = list(zip(grad_ys, weights, lora_As, lora_Bs, scalings, strict=True))
    _check_backward(op, layers, x, xa, mask, dropout_p, output_mask, takes_lists=True)


def check_lora_delta_backward(
    grad_y: Tensor,
    x: Tensor | None,
    lora_A: Tensor,
    lora_B: Tensor,
    xa: Tensor | None,
    mask: Tensor | None,
    scaling: float,
    dropout_p: float,
    output_mask: Sequence[bool],
) -> None:
    op = "lora_delta_backward"
    check_output_mask(op, output_mask, 3)
    check_is_there(op, "x", x, output_mask[1], "grad_lora_A")
    check_delta(op, "grad_y", grad_y, x if output_mask[1] else None, lora_A, lora_B, scaling)
    check_dropout(op, dropout_p)
    sizes = count_tokens(grad_y), lora_A.shape[1], lora_A.shape[0]
    check_saved(op, xa, mask, grad_y.dtype, sizes, dropout_p, output_mask, "rank")


def check_lora_delta_siblings_backward(
    grad_ys: Sequence[Tensor],
    x: Tensor | None,
    lora_As: Sequence[Tensor],
    lora_Bs: Sequence[Tensor],
    xa: Tensor | None,
    mask: Tensor | None,
    scalings: Sequence[float],
    dropout_p: float,
    output_mask: Sequence[bool],
) -> None:
    op = "lora_delta_siblings_backward"
    check_num_siblings(op, "grad_ys", grad_ys, lora_As=lora_As, lora_Bs=lora_Bs, scalings=scalings)
    check_output_mask(op, output_mask, 3)
    check_is_there(op, "x", x, output_mask[1], "grad_lora_A")
    check_deltas(op, "grad_y", grad_ys, None, lora_As, lora_Bs, scalings)
    num_tokens = count_tokens(grad_ys[0])
    for i, grad_y in enumerate(grad_ys):
        _check_num_tokens(op, f"grad_ys[{i}]", grad_y, "grad_ys[0]", num_tokens)
    if output_mask[1]:
        check_delta(op, "grad_y", grad_ys[0], x, lora_As[0], lora_Bs[0], scalings[0], 0)
    check_dropout(op, dropout_p)
    sizes = num_tokens, lora_As[0].shape[1], sum(lora_A.shape[0] for lora_A in lora_As)
    check_saved(op, xa, mask, grad_ys[0].dtype, sizes, dropout_p, output_mask, "total_rank")


def _check_backward(
    op: str,
    layers: Sequence[_Layer],
    x: Tensor | None,
    xa: Tensor | None,
    mask: Tensor | None,
    dropout_p: float,
    output_mask: Sequence[bool],
    takes_lists: bool,
) -> None:
    def named(name: str, i: int) -> str:
        return argument_name(name, i if takes_lists else None)

    _, first_weight, first_A, _, _ = layers[0]
    for i, (_, weight, lora_A, lora_B, scaling) in enumerate(layers):
        check_factors(op, weight, lora_A, lora_B, i if takes_lists else None)
        check_scaling(op, scaling, named("scaling", i))
        if weight.shape[1] != first_weight.shape[1]:
            names = named("weight", i), named("weight", 0)
            raise refusal(op, "features", names[0], "in_features", weight.shape[1], names[1], first_weight.shape[1])
        check_same_dtype(op, named("weight", i), weight, named("weight", 0), first_weight)
        check_same_dtype(op, named("lora_A", i), lora_A, named("lora_A", 0), first_A)
    num_tokens = count_tokens(layers[0][0])
    for i, (grad_y, weight, *_) in enumerate(layers):
        _check_tokens(op, named("grad_y", i), grad_y, named("weight", i), weight, weight.shape[0], "out_features")
        _check_num_tokens(op, named("grad_y", i), grad_y, named("grad_y", 0), num_tokens)
    check_dropout(op, dropout_p)
    check_output_mask(op, output_mask, 3)
    in_features = first_weight.shape[1]
    check_is_there(op, "x", x, output_mask[1], "grad_lora_A")
    if output_mask[1]:
        _check_tokens(op, "x", x, named("weight", 0), first_weight, in_features, "in_features")
        _check_num_tokens(op, "x", x, named("grad_y", 0), num_tokens)
    sizes = num_tokens, in_features, sum(lora_A.shape[0] for _, _, lora_A, _, _ in layers)
    check_saved(
        op, xa, mask, first_weight.dtype, sizes, dropout_p, output_mask, "total_rank" if takes_lists else "rank"
    )


def _check_tokens(
    op: str, name: str, tensor: Tensor, weight_name: str, weight: Tensor, features: int, features_name: str
) -> None:
    """Checks that ``tensor`` is ``[..., features]`` in the weight's dtype."""
    check_has_dimension(op, name, tensor, features_name)
    check_num_features(op, name, tensor, weight_name, features, features_name)
    check_same_dtype(op, name, tensor, weight_name, weight)


def _check_num_tokens(op: str, name: str, tensor: Tensor, like_name: str, num_tokens: int) -> None:
    if count_tokens(tensor) != num_tokens:
        raise refusal(op, "num_tokens", name, count_tokens(tensor), like_name, num_tokens)


def check_output_mask(op: str, output_mask: Sequence[bool], entries: int) -> None:
    if len(output_mask) != entries:
        raise refusal(op, "length", "output_mask", len(output_mask), entries)


def check_is_there(op: str, name: str, tensor: Tensor | None, is_read: bool, gradient: str) -> None:
    if is_read and tensor is None:
        raise refusal(op, "not_saved", gradient, name)


def check_saved(
    op: str,
    xa: Tensor | None,
    mask: Tensor | None,
    dtype: torch.dtype,
    sizes: tuple[int, int, int],
    dropout_p: float,
    output_mask: Sequence[bool],
    rank_name: str,
) -> None:
    """Checks xa and the mask where they are read. sizes: num_tokens, in_features, total rank; dtype: the layer's."""
    num_tokens, in_features, total_rank = sizes
    check_is_there(op, "xa", xa, output_mask[2], "grad_lora_B")
    if output_mask[2]:
        if tuple(xa.shape) != (num_tokens, total_rank):
            raise refusal(op, "saved_xa", rank_name, [num_tokens, total_rank])
        check_accumulation_dtype(op, "xa", xa, dtype)
    if (output_mask[0] or output_mask[1]) and dropout_threshold(dropout_p) > 0:
        if mask is None:
            raise refusal(op, "no_mask", dropout_p)
        check_contiguous_matrix(op, "mask", mask, torch.uint8, (num_tokens, mask_row_bytes(in_features)))


# --- lora_shrink and lora_expand --------------------------------------------------------------------------------------


def check_lora_shrink(x: Tensor, lora_A: Tensor) -> None:
    _check_factor("lora_shrink", "lora_A", lora_A, 0)
    _check_features("lora_shrink", "x", x, "lora_A", lora_A.shape[1], "in_features")


def check_lora_expand(base: Tensor, xa: Tensor, lora_B: Tensor, bias: Tensor | None) -> None:
    op = "lora_expand"
    _check_factor(op, "lora_B", lora_B, 1)
    _check_features(op, "base", base, "lora_B", lora_B.shape[0], "out_features")
    _check_low_rank(op, "xa", xa, "lora_B", lora_B.shape[1], "base", base)
    if bias is not None:
        check_same_dtype(op, "bias", bias, "base", base)
        check_bias(op, "bias", bias, lora_B.shape[0])


def check_lora_shrink_backward(
    grad_xa: Tensor, x: Tensor, lora_A: Tensor, base: Tensor | None, output_mask: Sequence[bool]
) -> None:
    op = "lora_shrink_backward"
    check_output_mask(op, output_mask, 2)
    _check_factor(op, "lora_A", lora_A, 0)
    _check_features(op, "x", x, "lora_A", lora_A.shape[1], "in_features")
    _check_low_rank(op, "grad_xa", grad_xa, "lora_A", lora_A.shape[0], "x", x)
    if base is None:
        return
    if base.dim() == 0 or base.numel() != x.numel() or base.shape[-1] != x.shape[-1]:
        raise refusal(op, "other_shape", "base", list(base.shape), "x", list(x.shape))
    check_same_dtype(op, "base", base, "x", x)


def check_lora_expand_backward(grad_y: Tensor, xa: Tensor | None, lora_B: Tensor, output_mask: Sequence[bool]) -> None:
    op = "lora_expand_backward"
    check_output_mask(op, output_mask, 2)
    _check_factor(op, "lora_B", lora_B, 1)
    _check_features(op, "grad_y", grad_y, "lora_B", lora_B.shape[0], "out_features")
    check_is_there(op, "xa", xa, output_mask[1], "grad_lora_B")
    if xa is not None:
        _check_low_rank(op, "xa", xa, "lora_B", lora_B.shape[1], "grad_y", grad_y)


def _check_factor(op: str, name: str, factor: Tensor, rank_dim: int) -> None:
    check_matrix(op, name, factor)
    check_rank(op, name, factor.shape[rank_dim])


def _check_features(op: str, name: str, tensor: Tensor, factor_name: str, features: int, features_name: str) -> None:
    """Checks that ``tensor`` is ``[..., features]`` of a dtype that the kernels know."""
    check_has_dimension(op, name, tensor, features_name)
    check_floating(op, name, tensor)
    check_num_features(op, name, tensor, factor_name, features, features_name)


def _check_low_rank(
    op: str, name: str, tensor: Tensor, factor_name: str, rank: int, like_name: str, like: Tensor
) -> None:
    """Checks that ``tensor`` is ``[..., rank]`` in the accumulation dtype of ``like``, with its tokens."""
    _check_features(op, name, tensor, factor_name, rank, "rank")
    _check_num_tokens(op, name, tensor, like_name, count_tokens(like))
    check_accumulation_dtype(op, name, tensor, like.dtype)
