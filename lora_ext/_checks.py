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
MAX_SIBLINGS = 8  # csrc/common/params.h


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def check_scaling(op: str, scaling: float, name: str = "scaling") -> None:
    if not math.isfinite(scaling):
        raise ValueError(f"{op}: {name} is {scaling}, want a finite number")


def check_dropout(op: str, dropout_p: float) -> None:
    if not 0.0 <= dropout_p < 1.0:
        raise ValueError(f"{op}: dropout_p is {dropout_p}, want 0 <= dropout_p < 1")


def check_factors(op: str, weight: Tensor, lora_A: Tensor, lora_B: Tensor, index: int | None = None) -> None:
    """weight [out, in], lora_A [r, in], lora_B [out, r]: two dimensions each, matching sizes, one device."""
    weight_name, A_name, B_name = (_argument(name, index) for name in ("weight", "lora_A", "lora_B"))
    for name, tensor in ((weight_name, weight), (A_name, lora_A), (B_name, lora_B)):
        _check_matrix(op, name, tensor, weight_name, weight)
    _check_factor_pair(op, lora_A, lora_B, index)
    if lora_A.shape[1] != weight.shape[1]:
        raise ValueError(f"{op}: {A_name} has in_features={lora_A.shape[1]} but {weight_name} has {weight.shape[1]}")
    if lora_B.shape[0] != weight.shape[0]:
        raise ValueError(f"{op}: {B_name} has out_features={lora_B.shape[0]} but {weight_name} has {weight.shape[0]}")


def _check_factor_pair(op: str, lora_A: Tensor, lora_B: Tensor, index: int | None = None) -> None:
    A_name, B_name = _argument("lora_A", index), _argument("lora_B", index)
    if lora_A.dtype != lora_B.dtype:
        raise TypeError(f"{op}: {B_name} has dtype {_name(lora_B.dtype)} but {A_name} has {_name(lora_A.dtype)}")
    if lora_A.shape[0] == 0:
        raise ValueError(f"{op}: {A_name} has rank 0, want at least 1")
    if lora_B.shape[1] != lora_A.shape[0]:
        raise ValueError(f"{op}: {B_name} has rank {lora_B.shape[1]} but {A_name} has {lora_A.shape[0]}")


def _check_matrix(op: str, name: str, tensor: Tensor, like_name: str, like: Tensor) -> None:
    if tensor.dim() != 2:
        raise ValueError(f"{op}: {name} has shape {list(tensor.shape)}, want 2 dimensions")
    _check_floating(op, name, tensor)
    if tensor.device != like.device:
        raise ValueError(f"{op}: {name} is on {tensor.device} but {like_name} is on {like.device}")


def _check_floating(op: str, name: str, tensor: Tensor) -> None:
    if tensor.dtype not in FLOATING:
        raise TypeError(f"{op}: {name} has dtype {_name(tensor.dtype)}, want one of {', '.join(map(_name, FLOATING))}")


def _argument(name: str, index: int | None) -> str:
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
    weight_name, bias_name, scaling_name = (_argument(name, index) for name in ("weight", "bias", "scaling"))
    if x.dim() == 0:
        raise ValueError(f"{op}: x has no dimension, want [..., in_features]")
    if x.shape[-1] != weight.shape[1]:
        raise ValueError(f"{op}: {weight_name} has in_features={weight.shape[1]} but x has {x.shape[-1]}")
    for name, tensor in ((weight_name, weight), (bias_name, bias)):
        if tensor is not None and tensor.dtype != x.dtype:
            raise TypeError(f"{op}: {name} has dtype {_name(tensor.dtype)} but x has {_name(x.dtype)}")
        if tensor is not None and tensor.device != x.device:
            raise ValueError(f"{op}: {name} is on {tensor.device} but x is on {x.device}")
    if bias is not None and tuple(bias.shape) != (weight.shape[0],):
        raise ValueError(f"{op}: {bias_name} has shape {list(bias.shape)}, want [{weight.shape[0]}]")
    check_scaling(op, scaling, scaling_name)
    if scaling < 0.0:
        raise ValueError(f"{op}: {scaling_name} is {scaling}, want at least 0")


def _check_dropout_and_seed(op: str, x: Tensor, dropout_p: float, seed: Tensor | None) -> None:
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
    _check_dropout_and_seed(op, x, dropout_p, seed)


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
    for name, factor in (("lora_A", lora_A), ("lora_B", lora_B)):
        _check_matrix(op, name, factor, "y", y)
    _check_factor_pair(op, lora_A, lora_B)
    check_scaling(op, scaling)
    if y.dim() == 0:
        raise ValueError(f"{op}: y has no dimension, want [..., out_features]")
    _check_floating(op, "y", y)
    if y.shape[-1] != lora_B.shape[0]:
        raise ValueError(f"{op}: lora_B has out_features={lora_B.shape[0]} but y has {y.shape[-1]}")
    if x.dim() != y.dim() or x.shape[:-1] != y.shape[:-1]:
        raise ValueError(f"{op}: x has shape {list(x.shape)} but y has {list(y.shape)}: want the same tokens")
    if x.shape[-1] != lora_A.shape[1]:
        raise ValueError(f"{op}: lora_A has in_features={lora_A.shape[1]} but x has {x.shape[-1]}")
    if x.dtype != y.dtype:
        raise TypeError(f"{op}: x has dtype {_name(x.dtype)} but y has {_name(y.dtype)}")
    if x.device != y.device:
        raise ValueError(f"{op}: x is on {x.device} but y is on {y.device}")
    _check_dropout_and_seed(op, x, dropout_p, seed)
    if not y.is_contiguous():
        raise ValueError(f"{op}: y has strides {list(y.stride())}, want a contiguous tensor: what a base layer returns")


def check_bottleneck(
    x: Tensor,
    down_weight: Tensor,
    down_bias: Tensor | None,
    up_weight: Tensor,
    up_bias: Tensor | None,
    residual: Tensor | None,
) -> None:
    op = "bottleneck"
    base_name, base = ("x", x) if residual is None else ("residual", residual)
    for name, tensor in (("x", x), (base_name, base)):
        _check_floating(op, name, tensor)
        if tensor.dim() == 0:
            raise ValueError(f"{op}: {name} has no dimension, want [..., features]")
    for name, weight in (("down_weight", down_weight), ("up_weight", up_weight)):
        _check_matrix(op, name, weight, "x", x)
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
    if base.device != x.device:
        raise ValueError(f"{op}: residual is on {base.device} but x is on {x.device}")
    for name, bias, size in (("down_bias", down_bias, len(down_weight)), ("up_bias", up_bias, len(up_weight))):
        if bias is None:
            continue
        _check_floating(op, name, bias)
        if tuple(bias.shape) != (size,):
            raise ValueError(f"{op}: {name} has shape {list(bias.shape)}, want [{size}]")
        if bias.device != x.device:
            raise ValueError(f"{op}: {name} is on {bias.device} but x is on {x.device}")


def check_num_siblings(
    weights: Sequence[Tensor],
    biases: Sequence[Tensor | None],
    lora_As: Sequence[Tensor],
    lora_Bs: Sequence[Tensor],
    scalings: Sequence[float],
) -> None:
    """Lists, all as long as weights."""
    op = "lora_linear_siblings"
    lists = {"weights": weights, "biases": biases, "lora_As": lora_As, "lora_Bs": lora_Bs, "scalings": scalings}
    for name, entries in lists.items():
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
    check_num_siblings(weights, biases, lora_As, lora_Bs, scalings)
    for i, layer in enumerate(zip(weights, biases, lora_As, lora_Bs, scalings, strict=True)):
        _check_layer(op, x, *layer, index=i)
        if lora_As[i].dtype != lora_As[0].dtype:
            raise TypeError(
                f"{op}: lora_As[{i}] has dtype {_name(lora_As[i].dtype)} but lora_As[0] has {_name(lora_As[0].dtype)}"
            )
    _check_dropout_and_seed(op, x, dropout_p, seed)


# --- merging ----------------------------------------------------------------------------------------------------------

MERGE_SEGMENT = 256  # columns that share a record: csrc/common/merge_record.h


def merge_segments(in_features: int) -> int:
    return (in_features + MERGE_SEGMENT - 1) // MERGE_SEGMENT


def accumulation_dtype(dtype: torch.dtype) -> torch.dtype:
    return torch.float64 if dtype == torch.float64 else torch.float32


def check_merge_layer(op: str, weight: Tensor, lora_A: Tensor, lora_B: Tensor, index: int | None = None) -> None:
    """A weight that can be merged into, and factors that fit it; these in any dtype."""
    check_factors(op, weight, lora_A, lora_B, index)
    check_merge_strides(op, weight, _argument("weight", index))


def check_merge_strides(op: str, weight: Tensor, name: str) -> None:
    """Where the merge's kernels can write: rows of unit column stride that do not overlap."""
    if weight.shape[1] > 1 and weight.stride(1) != 1:
        raise ValueError(f"{op}: {name} has column stride {weight.stride(1)}, want 1; merge a contiguous one")
    if weight.shape[0] > 1 and weight.stride(0) < weight.shape[1]:
        raise ValueError(
            f"{op}: {name} has row stride {weight.stride(0)} but {weight.shape[1]} columns: its rows overlap"
        )


def check_merge(op: str, weights: Sequence[Tensor], lora_As: Sequence[Tensor], lora_Bs: Sequence[Tensor]) -> None:
    """What the merge ops take: lists of equal length, one dtype and device, factors in the accumulation dtype."""
    if not weights:
        raise ValueError(f"{op}: weights is empty, want at least one")
    if not len(weights) == len(lora_As) == len(lora_Bs):
        raise ValueError(
            f"{op}: there are {len(weights)} weights, but {len(lora_As)} lora_As and {len(lora_Bs)} lora_Bs"
        )
    for i, (weight, A, B) in enumerate(zip(weights, lora_As, lora_Bs, strict=True)):
        check_merge_layer(op, weight, A, B, i)
        for what in ("dtype", "device"):
            ours, first = getattr(weight, what), getattr(weights[0], what)
            if ours != first:
                raise ValueError(f"{op}: weights[{i}] has {what} {ours} but weights[0] has {first}")
        acc = accumulation_dtype(weight.dtype)
        if A.dtype != acc:
            raise TypeError(f"{op}: lora_As[{i}] has dtype {_name(A.dtype)}, want the accumulation dtype {_name(acc)}")
