"""The ops as typed functions, which choose defaults, call the op and explain refusals."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor, distributed
from torch.nn import functional as F

from lora_ext._common.arguments import check_types
from lora_ext._ops import errors, grouped, linear, plain, plain_grouped
from lora_ext._ops.bottleneck import ACTIVATIONS, check_bottleneck, compute_bottleneck
from lora_ext._ops.checks import check_arguments, refusal
from lora_ext._ops.fast_path import cast_to
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

_INT64_MAX = torch.iinfo(torch.int64).max
_RANGE = 2**62  # of the seeds of a rank other than 0
_GOLDEN_RATIO = 0x9E3779B97F4A7C15  # spreads consecutive ranks over all bits


def draw_seed(device: torch.device, rank: int | None = None) -> Tensor:
    """A fresh dropout seed, int64 ``[]``, from PyTorch's default generator of ``device`` (``torch.manual_seed``).

    In a process group the rank is mixed in: ranks seeded alike, as trainers do, still draw different masks. Rank 0
    draws the masks of a single process. ``rank``: another number to mix in.
    """
    if rank is None:
        rank = distributed.get_rank() if distributed.is_available() and distributed.is_initialized() else 0
    if rank == 0:
        low, high = 0, _INT64_MAX
    else:  # one kernel: a range that begins elsewhere
        low = rank * _GOLDEN_RATIO % _RANGE
        high = low + _RANGE
    return torch.randint(low, high, (), dtype=torch.int64, device=device)


def _drawn(x: Tensor, dropout_p: float, seed: Tensor | None) -> Tensor | None:
    """Returns ``seed``, or a fresh one if dropout needs one and there is none."""
    return draw_seed(x.device) if dropout_p > 0.0 and seed is None else seed


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
    try:
        seed = _drawn(x, dropout_p, seed)
        if x.is_nested:
            layer = weight, bias, lora_A, lora_B, scaling, dropout_p, seed
            return _by_values("lora_linear", x, lambda tokens: lora_linear(tokens, *layer))
        return linear.lora_linear(x, weight, bias, lora_A, lora_B, scaling, dropout_p, seed)[0]
    except errors.UNEXPLAINED as error:
        errors.explain(error, lora_linear, locals())
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
    try:
        seed = _drawn(x, dropout_p, seed)
        if x.dtype != y.dtype:
            x = cast_to(y, x)
        linear.lora_delta_(y, x, lora_A, lora_B, scaling, dropout_p, seed)
    except errors.UNEXPLAINED as error:
        errors.explain(error, lora_delta_, locals())
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

        return y + _by_values("lora_delta_", x, update)
    if not torch._C._are_functorch_transforms_active():
        return lora_delta_(y, x, lora_A, lora_B, scaling, dropout_p, seed)
    seed = _drawn(x, dropout_p, seed)
    x_dropped = plain.dropped(cast_to(y, x), dropout_p, seed)
    xa = plain.scale(scaling, dropout_p) * torch.ops.lora_ext.lora_shrink(x_dropped, lora_A)
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
    try:
        seed = _drawn(x, dropout_p, seed)
        return linear.lora_linear_siblings(x, weights, biases, [], lora_As, lora_Bs, scalings, dropout_p, seed)[0]
    except errors.UNEXPLAINED as error:
        errors.explain(error, lora_linear_siblings, locals())
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
    try:
        seed = _drawn(x, dropout_p, seed)
        if isinstance(bases, (list, tuple)) and not bases:
            raise refusal("lora_delta_siblings", "length", "bases", 0, "1 to 8")
        if x.dtype != bases[0].dtype:
            x = cast_to(bases[0], x)
        return linear.lora_linear_siblings(x, [], [], bases, lora_As, lora_Bs, scalings, dropout_p, seed)[0]
    except errors.UNEXPLAINED as error:
        errors.explain(error, lora_delta_siblings, locals())
        raise


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
    try:
        scalings = _as_numbers(x, scalings)
        seed = _drawn(x, dropout_p, seed)
        if x.dtype != y.dtype:
            x = cast_to(y, x)
        grouped.lora_grouped_(y, x, lora_As, lora_Bs, group_of_row, scalings, ranks, dropout_p, seed)
    except errors.UNEXPLAINED as error:
        errors.explain(error, lora_grouped_, locals())
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
    return plain_grouped.plus_lora_grouped(y, cast_to(y, x), [lora_A], [lora_B], group_of_row, scalings)


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
    try:
        scalings = _as_numbers(x, scalings)
        if torch.compiler.is_compiling():
            return lora_grouped_(F.linear(x, weight, bias), x, lora_As, lora_Bs, group_of_row, scalings, ranks)
        call = grouped.lora_grouped_linear if x.device.type == "cpu" else grouped.linear_and_grouped
        return call(x, weight, bias, lora_As, lora_Bs, group_of_row, scalings, ranks)
    except errors.UNEXPLAINED as error:
        errors.explain(error, lora_grouped_linear, locals(), _check_linear)
        raise


def _check_linear(x: Tensor, *others: object, **named: object) -> None:
    """Checks the call as a whole: with gradients it is two ops. Under autocast these see other dtypes."""
    if not torch.is_autocast_enabled(x.device.type):
        check_arguments("lora_grouped_linear", (x, *others, *named.values()))


def bottleneck(
    x: Tensor,
    down_weight: Tensor,
    down_bias: Tensor | None,
    up_weight: Tensor,
    up_bias: Tensor | None,
    activation: str = "relu",
    residual: Tensor | None = None,
) -> Tensor:
    """Applies two narrow linear layers with an activation between them, and a residual connection.

    ``y = residual + activation(x @ down_weight.T + down_bias) @ up_weight.T + up_bias``

    The forward reads ``x`` and ``residual`` once and writes ``y`` once; no other tensor of their size exists. If ``x``
    is the residual, the backward adds both gradients in one pass.

    Args:
        x: ``[..., in_features]``, float64, float32, bfloat16 or float16; any leading dimensions, any strides.
        down_weight: ``[size, in_features]``, in any of the four dtypes; rounded as the factors of
            :func:`lora_linear`.
        down_bias: ``[size]`` or None.
        up_weight: ``[out_features, size]``, in any of the four dtypes.
        up_bias: ``[out_features]`` or None; rounded to the dtype of the result.
        activation: one of relu, gelu, silu, identity.
        residual: ``[..., out_features]`` with the tokens of ``x``, and its accumulation dtype (float64 for float64,
            else float32); None: ``x``.

    Returns:
        ``[..., out_features]``, dtype of the residual. The hidden features are float32 (float64 for float64), and so
        are the sums, each rounded once.

    Raises:
        ValueError, TypeError: naming the argument and both values.
        torch.OutOfMemoryError: memory is short.
    """
    if not isinstance(activation, str):
        check_types(bottleneck, {"activation": activation})
    if activation not in ACTIVATIONS:
        raise ValueError(f"bottleneck: activation is {activation!r}, want one of {', '.join(ACTIVATIONS)}")
    tensors = (x, down_weight, down_bias, up_weight, up_bias, residual)
    if torch.compiler.is_compiling() and not x.is_nested:
        check_bottleneck(*tensors)
        return compute_bottleneck(*tensors, activation)
    try:
        if x.is_nested and (residual is None or residual is x):
            layer = down_weight, down_bias, up_weight, up_bias, activation
            return _by_values("bottleneck", x, lambda tokens: bottleneck(tokens, *layer))
        return compute_bottleneck(*tensors, activation)
    except errors.UNEXPLAINED as error:
        errors.explain(error, bottleneck, locals(), check_bottleneck)
        raise


def _by_values(op: str, x: Tensor, function: Callable[[Tensor], Tensor]) -> Tensor:
    """Applies ``function`` (``[..., in_features]`` to ``[..., out_features]``) to the tokens of a nested tensor.

    As in nn.Linear, a jagged result shares the offsets of ``x``, so that PyTorch knows that both have one shape.

    Raises:
        ValueError: the features have different lengths.
    """
    if x.dim() < 2 or (x.layout is torch.jagged and x._ragged_idx == x.dim() - 1):
        raise ValueError(f"{op}: x is a nested tensor whose last dimension is jagged, want one of features")
    if x.layout is not torch.jagged:
        parts = x.unbind()
        values = function(torch.cat([part.reshape(-1, part.shape[-1]) for part in parts]))
        tokens = values.split([part.shape[:-1].numel() for part in parts])
        shaped = (t.reshape(*part.shape[:-1], t.shape[-1]) for t, part in zip(tokens, parts, strict=True))
        return torch.nested.as_nested_tensor(list(shaped))
    return torch.nested.nested_tensor_from_jagged(
        function(x.values()),
        x.offsets(),
        x.lengths(),
        x._ragged_idx,
        min_seqlen=x._maybe_min_seqlen,
        max_seqlen=x._maybe_max_seqlen,
    )
