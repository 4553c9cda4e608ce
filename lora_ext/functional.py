"""The ops as typed functions, which choose defaults, call the op and explain refusals."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from lora_ext._ops import composite, errors, linear
from lora_ext._ops.bottleneck import bottleneck
from lora_ext._ops.call_arguments import cast_to, draw_seed, drawn
from lora_ext._ops.checks import refusal
from lora_ext._ops.grouped_calls import lora_grouped_, lora_grouped_linear
from lora_ext._ops.in_place import check_inference, count_change
from lora_ext._ops.nested import by_values
from lora_ext.merging.weights import MergeRecord, lora_merge_, lora_unmerge_

__all__ = [
    "MergeRecord",
    "bottleneck",
    "draw_seed",
    "lora_delta_",
    "lora_delta_siblings",
    "lora_grouped_",
    "lora_grouped_linear",
    "lora_linear",
    "lora_linear_siblings",
    "lora_merge_",
    "lora_unmerge_",
]


def lora_linear(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    lora_A: Tensor,
    lora_B: Tensor,
    scaling: float,
    dropout_p: float = 0.0,
    seed: Tensor | None = None,
) -> Tensor:
    """A linear layer with a low-rank update (Hu et al. 2021, arXiv 2106.09685, eq. 3).

    ``y = x @ weight.T + bias + scaling * dropout(x) @ lora_A.T @ lora_B.T``

    Args:
        x: ``[..., in_features]``, float64, float32, bfloat16 or float16; any leading dimensions, any strides. May be
            nested (jagged), as may the result.
        weight: ``[out_features, in_features]``, dtype and device of ``x``. Frozen: its gradient is computed only if it
            requires one.
        bias: ``[out_features]``, dtype of ``x``, or None.
        lora_A: ``[r, in_features]``, in any of the four dtypes. Where the processor multiplies the 16 bits of ``x`` (on
            CUDA; bfloat16 with AVX512-BF16 or AMX), wider factors are rounded to its dtype as they are read, as under
            autocast, and their gradients are float32 sums.
        lora_B: ``[out_features, r]``, dtype of ``lora_A``.
        scaling: usually ``lora_alpha / r``; at least 0.
        dropout_p: probability that an element of the adapter's input is zeroed, in [0, 1); quantised to 2**-16.
        seed: int64 tensor of one element on ``x``'s device; names the dropout mask. Drawn from the default generator
            when None. The same seed gives the same mask on every device and with any number of threads.

    Returns:
        ``[..., out_features]``, dtype of ``x``. Products accumulate in float32 (float64 for float64).

    Raises:
        ValueError, TypeError: naming the argument and both values.
        torch.OutOfMemoryError: memory is short.
    """
    if torch.compiler.is_compiling() and not x.is_nested:
        seed = drawn(x, dropout_p, seed)
        return torch.ops.lora_ext.lora_linear(x, weight, bias, lora_A, lora_B, scaling, dropout_p, seed)[0]
    try:
        if dropout_p > 0.0 and seed is None:
            seed = draw_seed(x.device)
        if x.is_nested:
            layer = weight, bias, lora_A, lora_B, scaling, dropout_p, seed
            return by_values("lora_linear", x, lambda tokens: lora_linear(tokens, *layer))
        return linear.lora_linear(x, weight, bias, lora_A, lora_B, scaling, dropout_p, seed)
    except errors.UNEXPLAINED as error:
        arguments = {"x": x, "weight": weight, "bias": bias, "lora_A": lora_A, "lora_B": lora_B, "scaling": scaling}
        arguments |= {"dropout_p": dropout_p, "seed": seed}
        errors.explain(error, lora_linear, arguments)
        raise


def lora_delta_(
    y: Tensor,
    x: Tensor,
    lora_A: Tensor,
    lora_B: Tensor,
    scaling: float,
    dropout_p: float = 0.0,
    seed: Tensor | None = None,
) -> Tensor:
    """Adds an adapter's update to the output of a base layer of any kind, in place.

    ``y += scaling * dropout(x) @ lora_A.T @ lora_B.T``

    For base layers that are not a plain matrix product: quantised, tensor-parallel, third-party modules. If the base is
    ``x @ weight.T + bias``, :func:`lora_linear` saves the pass over ``y``.

    Args:
        y: ``[..., out_features]``, contiguous, float64, float32, bfloat16 or float16; changed in place. Its gradient
            passes through. The op that produced it must not need it for its backward (autograd checks that).
        x: ``[..., in_features]``, the same leading dimensions, dtype and device as ``y``; any strides. Under autocast
            it is cast to the dtype that the base layer returned.
        lora_A: as in :func:`lora_linear`.
        lora_B: as in :func:`lora_linear`.
        scaling: any finite number.
        dropout_p: as in :func:`lora_linear`.
        seed: as in :func:`lora_linear`, with the same mask for the same seed.

    Returns:
        ``y``. The sum is taken in float32 (float64 for float64) and rounded once.

    Raises:
        ValueError, TypeError: naming the argument and both values.
        RuntimeError: PyTorch's in-place ops would refuse ``y`` too: a leaf that requires grad, a view of one, one of
            the views that ``split`` returned, ...; or an inference tensor outside of inference mode.
        torch.OutOfMemoryError: memory is short. ``y`` is unchanged after each of these errors.
    """
    if torch.compiler.is_compiling():
        seed = drawn(x, dropout_p, seed)
        torch.ops.lora_ext.lora_delta_(y, cast_to(y, x), lora_A, lora_B, scaling, dropout_p, seed)
        return y
    try:
        if dropout_p > 0.0 and seed is None:
            seed = draw_seed(x.device)
        if x.dtype != y.dtype:
            x = cast_to(y, x)
        check_inference("lora_delta_", "y", y)
        torch.ops.lora_ext.lora_delta_.default(y, x, lora_A, lora_B, scaling, dropout_p, seed)
        if torch.is_inference_mode_enabled() and not y.is_inference():  # there the op's autograd kernel is not called
            count_change(y)
    except errors.UNEXPLAINED as error:
        arguments = {"y": y, "x": x, "lora_A": lora_A, "lora_B": lora_B, "scaling": scaling}
        arguments |= {"dropout_p": dropout_p, "seed": seed}
        errors.explain(error, lora_delta_, arguments)
        raise
    return y


def plus_lora_delta(
    y: Tensor,
    x: Tensor,
    lora_A: Tensor,
    lora_B: Tensor,
    scaling: float,
    dropout_p: float = 0.0,
    seed: Tensor | None = None,
) -> Tensor:
    """Adds an adapter's update to ``y``: in place as :func:`lora_delta_`, or out of place where ``y`` cannot change.

    It cannot if it is nested, or if samples of ``torch.func.vmap`` share it. Use what is returned.
    """
    if y.is_nested:

        def update(tokens: Tensor) -> Tensor:
            zeros = tokens.new_zeros(*tokens.shape[:-1], len(lora_B), dtype=y.dtype)
            return lora_delta_(zeros, tokens, lora_A, lora_B, scaling, dropout_p, seed)

        return y + by_values("lora_delta_", x, update)
    if not torch._C._are_functorch_transforms_active():
        return lora_delta_(y, x, lora_A, lora_B, scaling, dropout_p, seed)
    x_dropped = composite.dropped(cast_to(y, x), dropout_p, drawn(x, dropout_p, seed))
    xa = composite.scale(scaling, dropout_p) * torch.ops.lora_ext.lora_shrink(x_dropped, lora_A)
    return torch.ops.lora_ext.lora_expand(y, xa, lora_B)


def lora_linear_siblings(
    x: Tensor,
    weights: Sequence[Tensor],
    biases: Sequence[Tensor | None],
    lora_As: Sequence[Tensor],
    lora_Bs: Sequence[Tensor],
    scalings: Sequence[float],
    dropout_p: float = 0.0,
    seed: Tensor | None = None,
) -> list[Tensor]:
    """Computes several layers that read one ``x`` (q/k/v, gate/up), each as :func:`lora_linear` does.

    ``ys[i] = x @ weights[i].T + biases[i] + scalings[i] * dropout(x) @ lora_As[i].T @ lora_Bs[i].T``

    One call reads ``x`` once for all layers, forward and backward, and writes its gradient once, summed over the
    layers. The layers share one dropout mask; separate layers, as in PEFT, draw one each. With the same ``seed``,
    ``ys`` and the gradients of the factors equal those of separate calls; the gradient of ``x`` is their sum, rounded
    fewer times.

    Args:
        x: ``[..., in_features]``, float64, float32, bfloat16 or float16; any leading dimensions, any strides.
        weights: 1 to 8 layers' ``[out_features, in_features]``, dtype and device of ``x``; ``out_features`` may differ.
            Frozen: a gradient is computed only if one is required.
        biases: for each layer ``[out_features]``, dtype of ``x``, or None.
        lora_As: for each layer ``[r, in_features]``, all of one of the four dtypes; ``r`` may differ.
        lora_Bs: for each layer ``[out_features, r]``, dtype of ``lora_As``.
        scalings: for each layer, usually ``lora_alpha / r``; at least 0.
        dropout_p: as in :func:`lora_linear`, for all layers.
        seed: as in :func:`lora_linear`, for all layers.

    Returns:
        For each layer ``[..., out_features]``, dtype of ``x``. Products accumulate in float32 (float64 for float64).
        Layers whose output is unused cost nothing in the backward.

    Raises:
        ValueError, TypeError: naming the argument, the layer and both values.
        torch.OutOfMemoryError: memory is short.
    """
    if torch.compiler.is_compiling():
        seed = drawn(x, dropout_p, seed)
        op = torch.ops.lora_ext.lora_linear_siblings
        return op(x, weights, biases, [], lora_As, lora_Bs, scalings, dropout_p, seed)[0]
    try:
        if dropout_p > 0.0 and seed is None:
            seed = draw_seed(x.device)
        return linear.lora_linear_siblings(x, weights, biases, [], lora_As, lora_Bs, scalings, dropout_p, seed)
    except errors.UNEXPLAINED as error:
        arguments = {"x": x, "weights": weights, "biases": biases, "lora_As": lora_As, "lora_Bs": lora_Bs}
        arguments |= {"scalings": scalings, "dropout_p": dropout_p, "seed": seed}
        errors.explain(error, lora_linear_siblings, arguments)
        raise


def lora_delta_siblings(
    bases: Sequence[Tensor],
    x: Tensor,
    lora_As: Sequence[Tensor],
    lora_Bs: Sequence[Tensor],
    scalings: Sequence[float],
    dropout_p: float = 0.0,
    seed: Tensor | None = None,
) -> list[Tensor]:
    """Adds adapters to what base layers of any kind returned that read one ``x``, out of place.

    ``ys[i] = bases[i] + scalings[i] * dropout(x) @ lora_As[i].T @ lora_Bs[i].T``

    :func:`lora_linear_siblings` for base layers that are no plain matrix products: one call reads ``x`` once for all
    layers, forward and backward, and all layers share one dropout mask, that of :func:`lora_delta_` for the same seed.

    Args:
        bases: for each of 1 to 8 layers ``[..., out_features]``, float64, float32, bfloat16 or float16, all of one
            dtype; ``out_features`` may differ. Unchanged; their gradients pass through.
        x: ``[..., in_features]``, the same leading dimensions, dtype and device as ``bases``; any strides. Under
            autocast it is cast to the dtype that the base layers returned.
        lora_As: as in :func:`lora_linear_siblings`.
        lora_Bs: as in :func:`lora_linear_siblings`.
        scalings: for each layer any finite number.
        dropout_p: as in :func:`lora_linear_siblings`.
        seed: as in :func:`lora_linear_siblings`.

    Returns:
        For each layer a new tensor like its base. The sum is taken in float32 (float64 for float64) and rounded once.

    Raises:
        ValueError, TypeError: naming the argument, the layer and both values.
        torch.OutOfMemoryError: memory is short.
    """
    if torch.compiler.is_compiling():
        seed = drawn(x, dropout_p, seed)
        op = torch.ops.lora_ext.lora_linear_siblings
        return op(cast_to(bases[0], x), [], [], bases, lora_As, lora_Bs, scalings, dropout_p, seed)[0]
    try:
        if dropout_p > 0.0 and seed is None:
            seed = draw_seed(x.device)
        if isinstance(bases, (list, tuple)) and not bases:
            raise refusal("lora_delta_siblings", "length", "bases", 0, "1 to 8")
        if x.dtype != bases[0].dtype:
            x = cast_to(bases[0], x)
        return linear.lora_linear_siblings(x, [], [], bases, lora_As, lora_Bs, scalings, dropout_p, seed)
    except errors.UNEXPLAINED as error:
        arguments = {"bases": bases, "x": x, "lora_As": lora_As, "lora_Bs": lora_Bs, "scalings": scalings}
        arguments |= {"dropout_p": dropout_p, "seed": seed}
        errors.explain(error, lora_delta_siblings, arguments)
        raise
