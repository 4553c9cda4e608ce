"""The typed functions of lora_grouped_ and lora_grouped_linear."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional as F

from lora_ext._ops import composite_grouped, errors, grouped
from lora_ext._ops.call_arguments import cast_to, draw_seed, drawn
from lora_ext._ops.checks import check_arguments


def lora_grouped_(
    y: Tensor,
    x: Tensor,
    lora_As: Tensor | Sequence[Tensor],
    lora_Bs: Tensor | Sequence[Tensor],
    group_of_row: Tensor,
    scalings: Tensor | Sequence[float],
    ranks: Tensor | None = None,
    dropout_p: float = 0.0,
    seed: Tensor | None = None,
) -> Tensor:
    """Adds to each row of ``y`` the update of the adapter that the row names, in place.

    ``y[i] += scalings[g] * dropout(x)[i] @ A[g].T @ B[g].T`` with ``g = group_of_row[i]``; nothing where ``g`` is -1.

    One call serves a batch whose rows belong to different adapters, or tokens that a router sends to experts. Rows may
    choose in any order and any number of them the same group. The rows of a group are processed together, and each
    chosen factor is read once.

    Args:
        y: ``[..., out_features]``, contiguous, float64, float32, bfloat16 or float16; changed in place as by
            :func:`lora_delta_`.
        x: ``[..., in_features]``, the same leading dimensions, dtype and device as ``y``; any strides. Under autocast
            it is cast to the dtype that the base layer returned.
        lora_As: The groups' ``lora_A``. A list whose entries are matrices ``[r, in_features]``, each a group, or stacks
            ``[slots, r, in_features]``, each as many groups as it has slots; groups are counted through the list. A
            tensor is a list of one entry. Entries may differ in ``r``. All have one of the four dtypes, and are rounded
            as in :func:`lora_linear`. Entries whose last dimension is not contiguous are copied.
        lora_Bs: The groups' ``lora_B``, entry by entry: ``[out_features, r]`` or ``[slots, out_features, r]``, dtype of
            ``lora_As``.
        group_of_row: int64, the group of each row, or -1. Its shape is that of the first dimensions of ``x``: for
            ``x [batch, sequence, in_features]``, ``[batch, sequence]``, or ``[batch]`` if all tokens of a sequence
            choose the same, or ``[]`` if all rows do. ``torch.repeat_interleave`` makes it from lengths of segments.
        scalings: For each group, any finite number: float64 ``[groups]`` on ``x``'s device, or a sequence of numbers.
        ranks: For each group the number of its ranks that are used, int64 ``[groups]``; None: all. With 0, a group adds
            nothing. It lets slots of one size hold adapters of different ranks.
        dropout_p: probability that an element of the adapters' input is zeroed, in [0, 1); quantised to 2**-16.
        seed: int64 tensor of one element on ``x``'s device; names the dropout mask: that of :func:`lora_delta_` for all
            of ``x``, whichever groups its rows choose. Drawn from the default generator when None.

    Returns:
        ``y``. The sum is taken in float32 (float64 for float64) and rounded once.

        Gradients flow to ``y``, ``x`` and the factors; ``scalings`` has none. The gradient of a factor, or of a slot,
        that no row chooses is zero. Sums have a fixed order: the same bits in every run, with any number of threads. On
        the CPU, ``y`` and the gradient of ``x`` have the bits of :func:`lora_delta_` on the same rows, and so have the
        gradients of the factors of groups of at most 32 rows; those of larger groups are sums in another order.

    Raises:
        ValueError, TypeError: naming the argument and both values. Of ``scalings`` and ``ranks``, only the values of
            chosen groups are checked. On CUDA no values are checked, since that would wait for the GPU: rows of a
            group or rank that does not exist become NaN, in ``y`` and in the gradient of ``x``.
        RuntimeError: as for :func:`lora_delta_`.
        torch.OutOfMemoryError: memory is short. ``y`` is unchanged after each of these errors.
    """
    lora_As = [lora_As] if isinstance(lora_As, Tensor) else lora_As
    lora_Bs = [lora_Bs] if isinstance(lora_Bs, Tensor) else lora_Bs
    if torch.compiler.is_compiling():
        groups = group_of_row, _as_numbers(x, scalings), ranks, dropout_p, drawn(x, dropout_p, seed)
        torch.ops.lora_ext.lora_grouped_(y, cast_to(y, x), lora_As, lora_Bs, *groups)
        return y
    try:
        scalings = _as_numbers(x, scalings)
        if dropout_p > 0.0 and seed is None:
            seed = draw_seed(x.device)
        if x.dtype != y.dtype:
            x = cast_to(y, x)
        grouped.lora_grouped_(y, x, lora_As, lora_Bs, group_of_row, scalings, ranks, dropout_p, seed)
    except errors.UNEXPLAINED as error:
        arguments = {"y": y, "x": x, "lora_As": lora_As, "lora_Bs": lora_Bs, "group_of_row": group_of_row}
        arguments |= {"scalings": scalings, "ranks": ranks, "dropout_p": dropout_p, "seed": seed}
        errors.explain(error, lora_grouped_, arguments)
        raise
    return y


def plus_lora_grouped(
    y: Tensor, x: Tensor, lora_A: Tensor, lora_B: Tensor, group_of_row: Tensor, scalings: Tensor
) -> Tensor:
    """Adds the rows' updates to ``y``: in place as :func:`lora_grouped_`, or out of place under torch.func.

    Use what is returned.
    """
    if not torch._C._are_functorch_transforms_active():
        return lora_grouped_(y, x, lora_A, lora_B, group_of_row, scalings)
    return composite_grouped.plus_lora_grouped(y, cast_to(y, x), [lora_A], [lora_B], group_of_row, scalings)


def _as_numbers(x: Tensor, scalings: Tensor | Sequence[float]) -> Tensor:
    """Returns the scalings of groups as the op takes them. Anything else than a list is left for the op to refuse."""
    if not isinstance(scalings, (list, tuple)):
        return scalings
    return torch.tensor(scalings, dtype=torch.float64, device=x.device)


def lora_grouped_linear(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    lora_As: Tensor | Sequence[Tensor],
    lora_Bs: Tensor | Sequence[Tensor],
    group_of_row: Tensor,
    scalings: Tensor | Sequence[float],
    ranks: Tensor | None = None,
) -> Tensor:
    """Computes a linear layer for a mixed batch: ``x @ weight.T + bias``, then :func:`lora_grouped_`.

    On the CPU, without gradients, it is one call, with our product by the weight where that is faster than PyTorch's.
    With gradients, in compiled graphs and on other devices it is the two.

    Args:
        x: ``[..., in_features]``, float64, float32, bfloat16 or float16; any strides.
        weight: ``[out_features, in_features]``, dtype and device of ``x``.
        bias: ``[out_features]``, dtype of ``x``, or None.
        lora_As: as for :func:`lora_grouped_`, and so are the next four.
        lora_Bs: the second factors.
        group_of_row: the group of each row.
        scalings: of the groups.
        ranks: of the groups, or None.

    Returns:
        ``[..., out_features]``, a new tensor. Gradients flow as through ``F.linear`` and :func:`lora_grouped_`. Bits
        are the same with any number of threads where the product by the weight is ours. PyTorch's is used for up to 32
        tokens and weights of less than a million elements, with gradients, and on processors where ours is not; there
        the bits are the same as far as those of ``F.linear`` are.

    Raises:
        ValueError, TypeError, torch.OutOfMemoryError: as for :func:`lora_grouped_`.
    """
    lora_As = [lora_As] if isinstance(lora_As, Tensor) else lora_As
    lora_Bs = [lora_Bs] if isinstance(lora_Bs, Tensor) else lora_Bs
    if torch.compiler.is_compiling():
        return lora_grouped_(F.linear(x, weight, bias), x, lora_As, lora_Bs, group_of_row, scalings, ranks)
    try:
        scalings = _as_numbers(x, scalings)
        y = grouped.lora_grouped_linear(x, weight, bias, lora_As, lora_Bs, group_of_row, scalings, ranks)
        if y is not None:
            return y
        if bias is not None and bias.shape != weight.shape[:1]:  # F.linear would broadcast it
            _check_linear(x, weight, bias, lora_As, lora_Bs, group_of_row, scalings, ranks)
        y = F.linear(x, weight, bias)
        return lora_grouped_(y, x, lora_As, lora_Bs, group_of_row, scalings, ranks)
    except errors.UNEXPLAINED as error:
        arguments = {"x": x, "weight": weight, "bias": bias, "lora_As": lora_As, "lora_Bs": lora_Bs}
        arguments |= {"group_of_row": group_of_row, "scalings": scalings, "ranks": ranks}
        errors.explain(error, lora_grouped_linear, arguments, _check_linear)
        raise


def _check_linear(x: Tensor, *others: object, **named: object) -> None:
    """Checks the call as a whole: with gradients it is two ops. Under autocast these see other dtypes."""
    if not torch.is_autocast_enabled(x.device.type):
        check_arguments("lora_grouped_linear", (x, *others, *named.values()))
