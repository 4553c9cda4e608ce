"""Checks of the arguments of ops: dtypes, sizes and numbers.

The fake kernels run these checks when a graph is traced. In eager mode the compiled op checks first, at no Python cost;
these run only once it has refused, to raise a ``ValueError`` or ``TypeError``. They are in the order of the compiled
checks (csrc/bindings/checks.h, layer_arguments.h, forward_call.h, merge_call.h), with the texts of csrc/refusals.h, so
that both say the same. Types and devices are checked before (:mod:`lora_ext._common.arguments`,
:mod:`lora_ext._ops.tensor_arguments`). Other checks: :mod:`lora_ext._ops.checks_backward` (also of lora_shrink and
lora_expand), :mod:`lora_ext._ops.checks_grouped` and :mod:`lora_ext._ops.checks_merge`.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from lora_ext._ops.refusals import refusal

_LARGEST = torch.finfo(torch.float64).max  # Python's integers may be larger
FLOATING = (torch.float64, torch.float32, torch.bfloat16, torch.float16)
MAX_SIBLINGS = 8  # csrc/common/params.h


def dtype_name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def check_scaling(op: str, scaling: float, name: str = "scaling") -> None:
    if not -_LARGEST <= scaling <= _LARGEST:
        raise refusal(op, "not_finite", name, scaling)


def check_dropout(op: str, dropout_p: float) -> None:
    if not 0.0 <= dropout_p < 1.0:
        raise refusal(op, "dropout", dropout_p)


def check_factors(op: str, weight: Tensor, lora_A: Tensor, lora_B: Tensor, index: int | None = None) -> None:
    """Checks ``weight [out, in]``, ``lora_A [r, in]`` and ``lora_B [out, r]``: dimensions, dtypes, matching sizes."""
    weight_name, A_name, B_name = (argument_name(name, index) for name in ("weight", "lora_A", "lora_B"))
    for name, tensor in ((weight_name, weight), (A_name, lora_A), (B_name, lora_B)):
        check_matrix(op, name, tensor)
    check_factor_pair(op, lora_A, lora_B, index)
    if lora_A.shape[1] != weight.shape[1]:
        raise refusal(op, "features", A_name, "in_features", lora_A.shape[1], weight_name, weight.shape[1])
    if lora_B.shape[0] != weight.shape[0]:
        raise refusal(op, "features", B_name, "out_features", lora_B.shape[0], weight_name, weight.shape[0])


def check_factor_pair(op: str, lora_A: Tensor, lora_B: Tensor, index: int | None = None) -> None:
    A_name, B_name = argument_name("lora_A", index), argument_name("lora_B", index)
    check_same_dtype(op, B_name, lora_B, A_name, lora_A)
    check_rank(op, A_name, lora_A.shape[0])
    if lora_B.shape[1] != lora_A.shape[0]:
        raise refusal(op, "rank", B_name, lora_B.shape[1], A_name, lora_A.shape[0])


def check_matrix(op: str, name: str, tensor: Tensor) -> None:
    if tensor.dim() != 2:
        raise refusal(op, "dimensions", name, list(tensor.shape), 2)
    check_floating(op, name, tensor)


def check_rank(op: str, name: str, rank: int) -> None:
    if rank < 1:
        raise refusal(op, "no_rank", name)


def check_has_dimension(op: str, name: str, tensor: Tensor, features_name: str) -> None:
    if tensor.dim() == 0:
        raise refusal(op, "no_dimension", name, features_name)


def check_num_features(op: str, name: str, tensor: Tensor, like_name: str, features: int, features_name: str) -> None:
    """Checks that ``tensor [..., features]`` has as many features as ``like_name``, another argument, says."""
    if tensor.shape[-1] != features:
        raise refusal(op, "features", like_name, features_name, features, name, tensor.shape[-1])


def check_leading_shape(op: str, name: str, tensor: Tensor, like_name: str, like: Tensor) -> None:
    """Checks that ``tensor`` has the tokens of ``like``: the same dimensions, except the last."""
    if tensor.dim() != like.dim() or tensor.shape[:-1] != like.shape[:-1]:
        raise refusal(op, "leading_shape", name, list(tensor.shape), like_name, list(like.shape))


def check_accumulation_dtype(op: str, name: str, tensor: Tensor, dtype: torch.dtype) -> None:
    acc = accumulation_dtype(dtype)
    if tensor.dtype != acc:
        raise refusal(op, "accumulation_dtype", name, dtype_name(tensor.dtype), dtype_name(acc))


def is_contiguous(tensor: Tensor) -> bool:
    """Returns whether the tensor is contiguous. Wrappers of torch.func count as such: no kernel reads them."""
    return torch._C._functorch.is_functorch_wrapped_tensor(tensor) or tensor.is_contiguous()


def check_contiguous_matrix(op: str, name: str, tensor: Tensor, dtype: torch.dtype, shape: tuple[int, int]) -> None:
    if tensor.dtype != dtype or tuple(tensor.shape) != shape or not is_contiguous(tensor):
        raise refusal(op, "contiguous_matrix", name, dtype_name(dtype), list(shape))


def check_bias(op: str, name: str, bias: Tensor, out_features: int) -> None:
    if tuple(bias.shape) != (out_features,):
        raise refusal(op, "shape", name, list(bias.shape), [out_features])


def check_same_dtype(op: str, name: str, tensor: Tensor, like_name: str, like: Tensor) -> None:
    if tensor.dtype != like.dtype:
        raise refusal(op, "other_dtype", name, dtype_name(tensor.dtype), like_name, dtype_name(like.dtype))


def check_floating(op: str, name: str, tensor: Tensor) -> None:
    if tensor.dtype not in FLOATING:
        raise refusal(op, "dtype", name, dtype_name(tensor.dtype))


def argument_name(name: str, index: int | None) -> str:
    """Returns an argument's name in messages: ``weight`` of an op on one layer, ``weights[1]`` of an op on lists."""
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
    check_has_dimension(op, "x", x, "in_features")
    check_num_features(op, "x", x, weight_name, weight.shape[1], "in_features")
    check_same_dtype(op, weight_name, weight, "x", x)
    if bias is not None:
        check_same_dtype(op, bias_name, bias, "x", x)
        check_bias(op, bias_name, bias, weight.shape[0])
    check_scaling(op, scaling, scaling_name)
    if scaling < 0.0:
        raise refusal(op, "negative", scaling_name, scaling)


def _check_seed(op: str, seed: Tensor) -> None:
    if seed.dtype != torch.int64 or seed.numel() != 1:
        raise refusal(op, "seed", dtype_name(seed.dtype), list(seed.shape))


def check_dropout_and_seed(op: str, dropout_p: float, seed: Tensor | None) -> None:
    check_dropout(op, dropout_p)
    if dropout_p > 0.0:
        if seed is None:
            raise refusal(op, "no_seed", dropout_p)
        _check_seed(op, seed)


def check_dropout_mask(seed: Tensor, num_tokens: int, in_features: int, dropout_p: float) -> None:
    op = "lora_dropout_mask"
    _check_seed(op, seed)
    check_dropout(op, dropout_p)
    for name, size in (("num_tokens", num_tokens), ("in_features", in_features)):
        torch._check_value(size >= 0, lambda name=name, size=size: str(refusal(op, "negative", name, size)))
    if (
        isinstance(num_tokens, int)
        and isinstance(in_features, int)
        and num_tokens * mask_row_bytes(in_features) >= 2**63
    ):
        raise refusal(op, "mask_too_large", num_tokens, in_features)


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
    check_dropout_and_seed(op, dropout_p, seed)


def check_delta(
    op: str,
    name: str,
    tensor: Tensor,
    x: Tensor | None,
    lora_A: Tensor,
    lora_B: Tensor,
    scaling: float,
    index: int | None = None,
) -> None:
    """Checks an adapter without a base layer. ``tensor [..., out_features]`` is the result, or its gradient."""
    name, A_name, B_name, scaling_name = (argument_name(n, index) for n in (name, "lora_A", "lora_B", "scaling"))
    for factor_name, factor in ((A_name, lora_A), (B_name, lora_B)):
        check_matrix(op, factor_name, factor)
    check_factor_pair(op, lora_A, lora_B, index)
    check_scaling(op, scaling, scaling_name)
    check_has_dimension(op, name, tensor, "out_features")
    check_floating(op, name, tensor)
    check_num_features(op, name, tensor, B_name, lora_B.shape[0], "out_features")
    if x is None:
        return
    check_leading_shape(op, "x", x, name, tensor)
    check_num_features(op, "x", x, A_name, lora_A.shape[1], "in_features")
    check_same_dtype(op, "x", x, name, tensor)


def check_deltas(
    op: str,
    name: str,
    tensors: Sequence[Tensor],
    x: Tensor | None,
    lora_As: Sequence[Tensor],
    lora_Bs: Sequence[Tensor],
    scalings: Sequence[float],
) -> None:
    """Checks the adapters of a list of layers without base layers, of which the later ones agree with the first."""
    check_num_siblings(op, f"{name}s", tensors, lora_As=lora_As, lora_Bs=lora_Bs, scalings=scalings)
    for i, (tensor, lora_A, lora_B, scaling) in enumerate(zip(tensors, lora_As, lora_Bs, scalings, strict=True)):
        check_delta(op, name, tensor, x, lora_A, lora_B, scaling, i)
        A_names = f"lora_As[{i}]", "lora_As[0]"
        check_same_dtype(op, f"{name}s[{i}]", tensor, f"{name}s[0]", tensors[0])
        check_same_dtype(op, A_names[0], lora_A, A_names[1], lora_As[0])
        if lora_A.shape[1] != lora_As[0].shape[1]:
            raise refusal(op, "features", A_names[0], "in_features", lora_A.shape[1], A_names[1], lora_As[0].shape[1])


def check_lora_delta_siblings(
    bases: Sequence[Tensor],
    x: Tensor,
    lora_As: Sequence[Tensor],
    lora_Bs: Sequence[Tensor],
    scalings: Sequence[float],
    dropout_p: float,
    seed: Tensor | None,
) -> None:
    op = "lora_delta_siblings"
    check_deltas(op, "base", bases, x, lora_As, lora_Bs, scalings)
    check_dropout_and_seed(op, dropout_p, seed)


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
    check_dropout_and_seed(op, dropout_p, seed)
    if not is_contiguous(y):
        raise refusal(op, "not_contiguous", "y", list(y.stride()))


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
        check_has_dimension(op, name, tensor, "features")
    for name, weight in (("down_weight", down_weight), ("up_weight", up_weight)):
        check_matrix(op, name, weight)
    if down_weight.shape[0] == 0:
        raise ValueError(f"{op}: down_weight has size 0, want at least 1")
    if up_weight.shape[1] != down_weight.shape[0]:
        raise ValueError(f"{op}: up_weight has size {up_weight.shape[1]} but down_weight has {down_weight.shape[0]}")
    check_num_features(op, "x", x, "down_weight", down_weight.shape[1], "in_features")
    check_num_features(op, base_name, base, "up_weight", up_weight.shape[0], "out_features")
    if base.shape[:-1] != x.shape[:-1]:
        raise refusal(op, "leading_shape", "residual", list(base.shape), "x", list(x.shape))
    if accumulation_dtype(base.dtype) != accumulation_dtype(x.dtype):
        raise refusal(op, "other_dtype", "residual", dtype_name(base.dtype), "x", dtype_name(x.dtype))
    for name, bias, size in (("down_bias", down_bias, len(down_weight)), ("up_bias", up_bias, len(up_weight))):
        if bias is None:
            continue
        check_floating(op, name, bias)
        check_bias(op, name, bias, size)


def check_num_siblings(op: str, first_name: str, first: Sequence[Tensor], **lists: Sequence) -> None:
    """Checks that all lists are as long as ``first``."""
    for name, entries in {first_name: first, **lists}.items():
        if not isinstance(entries, (list, tuple)):
            raise TypeError(f"{op}: {name} is a {type(entries).__name__}, want a list with one entry per layer")
    if not 1 <= len(first) <= MAX_SIBLINGS:
        raise refusal(op, "length", first_name, len(first), f"1 to {MAX_SIBLINGS}")
    for name, entries in lists.items():
        if len(entries) != len(first):
            raise refusal(op, "length_like", name, len(entries), first_name, len(first))


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
    check_num_siblings(op, "weights", weights, biases=biases, lora_As=lora_As, lora_Bs=lora_Bs, scalings=scalings)
    for i, layer in enumerate(zip(weights, biases, lora_As, lora_Bs, scalings, strict=True)):
        _check_layer(op, x, *layer, index=i)
        check_same_dtype(op, f"lora_As[{i}]", lora_As[i], "lora_As[0]", lora_As[0])
    check_dropout_and_seed(op, dropout_p, seed)


def accumulation_dtype(dtype: torch.dtype) -> torch.dtype:
    return torch.float64 if dtype == torch.float64 else torch.float32
