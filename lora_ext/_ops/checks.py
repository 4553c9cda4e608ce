"""Checks of the arguments of ops: dtypes, sizes and numbers.

The fake kernels run these checks when a graph is traced. In eager mode the compiled op checks first, at no Python cost,
and these run only once it has refused, to say why as a ``ValueError`` or ``TypeError``. Types and devices have been
checked before (:mod:`._arguments`, :mod:`._tensor_arguments`). :mod:`._checks_backward` is about the gradients' ops.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from lora_ext._ops.tensor_arguments import check_tensors

_LARGEST = torch.finfo(torch.float64).max  # Python's integers may be larger
FLOATING = (torch.float64, torch.float32, torch.bfloat16, torch.float16)
MAX_SIBLINGS = 8  # csrc/common/params.h


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def check_scaling(op: str, scaling: float, name: str = "scaling") -> None:
    if not -_LARGEST <= scaling <= _LARGEST:
        raise ValueError(f"{op}: {name} is {scaling}, want a finite number")


def check_dropout(op: str, dropout_p: float) -> None:
    if not 0.0 <= dropout_p < 1.0:
        raise ValueError(f"{op}: dropout_p is {dropout_p}, want 0 <= dropout_p < 1")


def check_factors(op: str, weight: Tensor, lora_A: Tensor, lora_B: Tensor, index: int | None = None) -> None:
    """weight [out, in], lora_A [r, in], lora_B [out, r]: two dimensions each, matching sizes."""
    weight_name, A_name, B_name = (argument_name(name, index) for name in ("weight", "lora_A", "lora_B"))
    for name, tensor in ((weight_name, weight), (A_name, lora_A), (B_name, lora_B)):
        check_matrix(op, name, tensor)
    check_factor_pair(op, lora_A, lora_B, index)
    if lora_A.shape[1] != weight.shape[1]:
        raise ValueError(f"{op}: {A_name} has in_features={lora_A.shape[1]} but {weight_name} has {weight.shape[1]}")
    if lora_B.shape[0] != weight.shape[0]:
        raise ValueError(f"{op}: {B_name} has out_features={lora_B.shape[0]} but {weight_name} has {weight.shape[0]}")


def check_factor_pair(op: str, lora_A: Tensor, lora_B: Tensor, index: int | None = None) -> None:
    A_name, B_name = argument_name("lora_A", index), argument_name("lora_B", index)
    check_same_dtype(op, B_name, lora_B, A_name, lora_A)
    if lora_A.shape[0] == 0:
        raise ValueError(f"{op}: {A_name} has rank 0, want at least 1")
    if lora_B.shape[1] != lora_A.shape[0]:
        raise ValueError(f"{op}: {B_name} has rank {lora_B.shape[1]} but {A_name} has {lora_A.shape[0]}")


def check_matrix(op: str, name: str, tensor: Tensor) -> None:
    if tensor.dim() != 2:
        raise ValueError(f"{op}: {name} has shape {list(tensor.shape)}, want 2 dimensions")
    check_floating(op, name, tensor)


def check_same_dtype(op: str, name: str, tensor: Tensor, like_name: str, like: Tensor) -> None:
    if tensor.dtype != like.dtype:
        raise TypeError(f"{op}: {name} has dtype {_name(tensor.dtype)} but {like_name} has {_name(like.dtype)}")


def check_floating(op: str, name: str, tensor: Tensor) -> None:
    if tensor.dtype not in FLOATING:
        raise TypeError(f"{op}: {name} has dtype {_name(tensor.dtype)}, want one of {', '.join(map(_name, FLOATING))}")


def argument_name(name: str, index: int | None) -> str:
    """An argument in a message: ``weight`` of an op on one layer, ``weights[1]`` of an op on a list of them."""
    if index is None:
        return name
    return f"{name}{'es' if name.endswith('s') else 's'}[{index}]"


def _check_layer(
    op: str,
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    lora_A: Tensor,
    lora_B: Tensor,
    scaling: float,
    index: int | None = None,
) -> None:
    check_factors(op, weight, lora_A, lora_B, index)
    weight_name, bias_name, scaling_name = (argument_name(name, index) for name in ("weight", "bias", "scaling"))
    if x.dim() == 0:
        raise ValueError(f"{op}: x has no dimension, want [..., in_features]")
    if x.shape[-1] != weight.shape[1]:
        raise ValueError(f"{op}: {weight_name} has in_features={weight.shape[1]} but x has {x.shape[-1]}")
    for name, tensor in ((weight_name, weight), (bias_name, bias)):
        if tensor is not None:
            check_same_dtype(op, name, tensor, "x", x)
    if bias is not None and tuple(bias.shape) != (weight.shape[0],):
        raise ValueError(f"{op}: {bias_name} has shape {list(bias.shape)}, want [{weight.shape[0]}]")
    check_scaling(op, scaling, scaling_name)
    if scaling < 0.0:
        raise ValueError(f"{op}: {scaling_name} is {scaling}, want at least 0")


def _check_seed(op: str, seed: Tensor) -> None:
    if seed.dtype != torch.int64 or seed.numel() != 1:
        raise ValueError(f"{op}: seed is {_name(seed.dtype)} {list(seed.shape)}, want an int64 tensor of one element")


def _check_dropout_and_seed(op: str, dropout_p: float, seed: Tensor | None) -> None:
    check_dropout(op, dropout_p)
    if dropout_p > 0.0:
        if seed is None:
            raise ValueError(f"{op}: dropout_p is {dropout_p} but seed is None, want an int64 tensor of one element")
        _check_seed(op, seed)


def check_dropout_mask(seed: Tensor, num_tokens: int, in_features: int, dropout_p: float) -> None:
    op = "lora_dropout_mask"
    _check_seed(op, seed)
    check_dropout(op, dropout_p)
    for name, size in (("num_tokens", num_tokens), ("in_features", in_features)):
        torch._check_value(size >= 0, lambda name=name, size=size: f"{op}: {name} is {size}, want at least 0")
    if (
        isinstance(num_tokens, int)
        and isinstance(in_features, int)
        and num_tokens * mask_row_bytes(in_features) >= 2**63
    ):
        raise ValueError(f"{op}: sizes are too large: num_tokens={num_tokens}, in_features={in_features}")


def mask_row_bytes(in_features: int) -> int:
    """Bytes of one row of the bit mask: whole 64-bit words. csrc/common/dropout.h."""
    return (in_features + 63) // 64 * 8


def count_tokens(x: Tensor) -> int:
    """Product of the leading dimensions of ``[..., features]``."""
    num_tokens = 1
    for size in x.shape[:-1]:
        num_tokens = num_tokens * size
    return num_tokens


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
    _check_layer(op, x, weight, bias, lora_A, lora_B, scaling)
    _check_dropout_and_seed(op, dropout_p, seed)


def check_delta(
    op: str, name: str, tensor: Tensor, x: Tensor | None, lora_A: Tensor, lora_B: Tensor, scaling: float
) -> None:
    """An adapter without a base layer: ``tensor [..., out_features]`` is the result, or its gradient."""
    for factor_name, factor in (("lora_A", lora_A), ("lora_B", lora_B)):
        check_matrix(op, factor_name, factor)
    check_factor_pair(op, lora_A, lora_B)
    check_scaling(op, scaling)
    if tensor.dim() == 0:
        raise ValueError(f"{op}: {name} has no dimension, want [..., out_features]")
    check_floating(op, name, tensor)
    if tensor.shape[-1] != lora_B.shape[0]:
        raise ValueError(f"{op}: lora_B has out_features={lora_B.shape[0]} but {name} has {tensor.shape[-1]}")
    if x is None:
        return
    if x.dim() != tensor.dim() or x.shape[:-1] != tensor.shape[:-1]:
        raise ValueError(f"{op}: x has shape {list(x.shape)} but {name} has {list(tensor.shape)}: want the same tokens")
    if x.shape[-1] != lora_A.shape[1]:
        raise ValueError(f"{op}: lora_A has in_features={lora_A.shape[1]} but x has {x.shape[-1]}")
    check_same_dtype(op, "x", x, name, tensor)


def check_lora_delta(
    y: Tensor,
    x: Tensor,
    lora_A: Tensor,
    lora_B: Tensor,
    scaling: float,
    dropout_p: float,
    seed: Tensor | None,
) -> None:
    op = "lora_delta_"
    check_delta(op, "y", y, x, lora_A, lora_B, scaling)
    _check_dropout_and_seed(op, dropout_p, seed)
    if not y.is_contiguous():
        raise ValueError(f"{op}: y has strides {list(y.stride())}, want a contiguous tensor: what a base layer returns")


def check_bottleneck(
    x: Tensor,
    down_weight: Tensor,
    down_bias: Tensor | None,
    up_weight: Tensor,
    up_bias: Tensor | None,
    activation: str,
    residual: Tensor | None,
) -> None:
    op = "bottleneck"
    base_name, base = ("x", x) if residual is None else ("residual", residual)
    for name, tensor in (("x", x), (base_name, base)):
        check_floating(op, name, tensor)
        if tensor.dim() == 0:
            raise ValueError(f"{op}: {name} has no dimension, want [..., features]")
    for name, weight in (("down_weight", down_weight), ("up_weight", up_weight)):
        check_matrix(op, name, weight)
    if down_weight.shape[0] == 0:
        raise ValueError(f"{op}: down_weight has size 0, want at least 1")
    if up_weight.shape[1] != down_weight.shape[0]:
        raise ValueError(f"{op}: up_weight has size {up_weight.shape[1]} but down_weight has {down_weight.shape[0]}")
    if x.shape[-1] != down_weight.shape[1]:
        raise ValueError(f"{op}: down_weight has in_features={down_weight.shape[1]} but x has {x.shape[-1]}")
    if base.shape[-1] != up_weight.shape[0]:
        raise ValueError(f"{op}: up_weight has out_features={up_weight.shape[0]} but {base_name} has {base.shape[-1]}")
    if base.shape[:-1] != x.shape[:-1]:
        raise ValueError(f"{op}: residual has shape {list(base.shape)} but x has {list(x.shape)}: want the same tokens")
    if accumulation_dtype(base.dtype) != accumulation_dtype(x.dtype):
        raise TypeError(f"{op}: residual has dtype {_name(base.dtype)} but x has {_name(x.dtype)}")
    for name, bias, size in (("down_bias", down_bias, len(down_weight)), ("up_bias", up_bias, len(up_weight))):
        if bias is None:
            continue
        check_floating(op, name, bias)
        if tuple(bias.shape) != (size,):
            raise ValueError(f"{op}: {name} has shape {list(bias.shape)}, want [{size}]")


def check_num_siblings(op: str, weights: Sequence[Tensor], **lists: Sequence) -> None:
    """Lists, all as long as weights."""
    for name, entries in {"weights": weights, **lists}.items():
        if not isinstance(entries, (list, tuple)):
            raise TypeError(f"{op}: {name} is a {type(entries).__name__}, want a list with one entry a layer")
    if not 1 <= len(weights) <= MAX_SIBLINGS:
        raise ValueError(f"{op}: weights has {len(weights)} entries, want 1 to {MAX_SIBLINGS}")
    for name, entries in lists.items():
        if len(entries) != len(weights):
            raise ValueError(f"{op}: {name} has {len(entries)} entries but weights has {len(weights)}")


def check_lora_linear_siblings(
    x: Tensor,
    weights: Sequence[Tensor],
    biases: Sequence[Tensor | None],
    lora_As: Sequence[Tensor],
    lora_Bs: Sequence[Tensor],
    scalings: Sequence[float],
    dropout_p: float,
    seed: Tensor | None,
) -> None:
    op = "lora_linear_siblings"
    check_num_siblings(op, weights, biases=biases, lora_As=lora_As, lora_Bs=lora_Bs, scalings=scalings)
    for i, layer in enumerate(zip(weights, biases, lora_As, lora_Bs, scalings, strict=True)):
        _check_layer(op, x, *layer, index=i)
        check_same_dtype(op, f"lora_As[{i}]", lora_As[i], "lora_As[0]", lora_As[0])
    _check_dropout_and_seed(op, dropout_p, seed)


# --- merging ----------------------------------------------------------------------------------------------------------

MERGE_SEGMENT = 256  # columns that share a record: csrc/common/merge_record.h
MAX_MERGED_SIZE = 2**30  # of rows and of columns, which the kernels count in 32 bits: csrc/bindings/merge_call.h


def merge_segments(in_features: int) -> int:
    return (in_features + MERGE_SEGMENT - 1) // MERGE_SEGMENT


def accumulation_dtype(dtype: torch.dtype) -> torch.dtype:
    return torch.float64 if dtype == torch.float64 else torch.float32


def check_merge_layer(op: str, weight: Tensor, lora_A: Tensor, lora_B: Tensor, index: int | None = None) -> None:
    """A weight that can be merged into, and factors that fit it; these in any dtype. All on one device."""
    names = [argument_name(name, index) for name in ("weight", "lora_A", "lora_B")]
    check_tensors(op, dict(zip(names, (weight, lora_A, lora_B), strict=True)))
    check_factors(op, weight, lora_A, lora_B, index)
    check_merge_strides(op, weight, argument_name("weight", index))


def check_merge_strides(op: str, weight: Tensor, name: str) -> None:
    """Where the merge's kernels can write: rows of unit column stride that do not overlap."""
    if weight.shape[1] > 1 and weight.stride(1) != 1:
        raise ValueError(f"{op}: {name} has column stride {weight.stride(1)}, want 1; merge a contiguous one")
    if weight.shape[0] > 1 and weight.stride(0) < weight.shape[1]:
        raise ValueError(
            f"{op}: {name} has row stride {weight.stride(0)} but {weight.shape[1]} columns: its rows overlap"
        )
    if max(weight.shape) > MAX_MERGED_SIZE:
        raise ValueError(f"{op}: {name} has shape {list(weight.shape)}, want at most 2**30 rows and columns")


def check_merge(op: str, weights: Sequence[Tensor], lora_As: Sequence[Tensor], lora_Bs: Sequence[Tensor]) -> None:
    """Checks the lists of a merge op: equal lengths, one dtype, factors in the accumulation dtype.

    That no two arguments share memory is checked when an op runs, not when it is traced.
    """
    if not weights:
        raise ValueError(f"{op}: weights is empty, want at least one")
    if not len(weights) == len(lora_As) == len(lora_Bs):
        raise ValueError(
            f"{op}: there are {len(weights)} weights, but {len(lora_As)} lora_As and {len(lora_Bs)} lora_Bs"
        )
    for i, (weight, A, B) in enumerate(zip(weights, lora_As, lora_Bs, strict=True)):
        check_merge_layer(op, weight, A, B, i)
        check_same_dtype(op, f"weights[{i}]", weight, "weights[0]", weights[0])
        acc = accumulation_dtype(weight.dtype)
        if A.dtype != acc:
            raise TypeError(f"{op}: lora_As[{i}] has dtype {_name(A.dtype)}, want the accumulation dtype {_name(acc)}")


def check_record(op: str, weights: Sequence[Tensor], words: Sequence[Tensor], corrections: Sequence[Tensor]) -> None:
    """For each layer the words of its segments and its corrections, or empty lists."""
    if not words and not corrections:
        return
    if not len(weights) == len(words) == len(corrections):
        raise ValueError(
            f"{op}: there are {len(weights)} weights, but {len(words)} words and {len(corrections)} corrections"
        )
    for i, (weight, own_words, own) in enumerate(zip(weights, words, corrections, strict=True)):
        shape = weight.shape[0], merge_segments(weight.shape[1])
        if own_words.dtype != torch.int16 or tuple(own_words.shape) != shape or not own_words.is_contiguous():
            raise ValueError(f"{op}: words[{i}] must be int16 {list(shape)}, contiguous")
        if own.dtype != torch.int16 or own.dim() != 1 or not own.is_contiguous():
            raise ValueError(f"{op}: corrections[{i}] must be an int16 vector, contiguous")
