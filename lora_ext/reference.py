"""The ops' maths in plain PyTorch: the oracle of tests and benchmarks.

Written for clarity, not speed. Every function has a compiled counterpart in ``torch.ops.lora_ext`` and accepts any
device and dtype. Pass float64 tensors for the reference value of a low-precision result.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

_M0, _M1 = 0xD2511F53, 0xCD9E8D57
_W0, _W1 = 0x9E3779B9, 0xBB67AE85
_U32 = 0xFFFFFFFF


def _mul_hi_lo(multiplier: int, value: Tensor) -> tuple[Tensor, Tensor]:
    """High and low 32 bits of ``multiplier * value``, both below 2**32 and held in int64, without overflowing int64."""
    low_product = (multiplier & 0xFFFF) * value
    high_product = (multiplier >> 16) * value + (low_product >> 16)
    return high_product >> 16, ((high_product & 0xFFFF) << 16) | (low_product & 0xFFFF)


def philox4x32(counter: tuple[Tensor, Tensor, Tensor, Tensor], seed: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Philox4x32-7 (Salmon et al., SC'11): four random words for each counter.

    Args:
        counter: four int64 tensors of one shape that hold 32-bit words; the results are the same.
        seed: a key of 64 bits.
    """
    c0, c1, c2, c3 = counter
    k0, k1 = seed & _U32, (seed >> 32) & _U32
    for _ in range(7):
        hi0, lo0 = _mul_hi_lo(_M0, c0)
        hi1, lo1 = _mul_hi_lo(_M1, c2)
        c0, c1, c2, c3 = hi1 ^ c1 ^ k0, lo1, hi0 ^ c3 ^ k1, lo0
        k0, k1 = (k0 + _W0) & _U32, (k1 + _W1) & _U32
    return c0, c1, c2, c3


def dropout_threshold(dropout_p: float) -> int:
    """``dropout_p`` in units of 2**-16, the resolution of the mask; 0 means no dropout."""
    return min(int(dropout_p * 65536.0 + 0.5), 65535)


def random_numbers(seed: int, rows: int, cols: int, first_row: int = 0) -> Tensor:
    """The 16-bit random numbers of the mask and of stochastic rounding: int64 ``[rows, cols]`` on the CPU."""
    num_blocks = (cols + 7) // 8
    block = torch.arange(num_blocks).expand(rows, num_blocks)
    row = torch.arange(first_row, first_row + rows).unsqueeze(1).expand(rows, num_blocks)
    words = philox4x32((block, torch.zeros_like(block), row & _U32, row >> 32), seed)
    return torch.stack([half for word in words for half in (word & 0xFFFF, word >> 16)], dim=-1).flatten(1)[:, :cols]


def dropout_keep(seed: int, num_tokens: int, in_features: int, dropout_p: float) -> Tensor:
    """The mask that csrc/common/dropout.h defines: bool ``[num_tokens, in_features]`` on the CPU, True = kept."""
    return random_numbers(seed, num_tokens, in_features) >= dropout_threshold(dropout_p)


def round_stochastically(values: Tensor, dtype: torch.dtype, numbers: Tensor) -> Tensor:
    """Rounds finite float32 ``values`` to bfloat16 or float16 with 16-bit random ``numbers`` of the same shape.

    A value becomes the neighbour farther from zero if its distance from the other one, in units of their distance, plus
    the random number / 2**16 (for float16 / 2**13, of its upper 13 bits) is at least 1.
    """
    exact, digits = values.double().abs(), 7 if dtype is torch.bfloat16 else 10
    least = torch.finfo(dtype).smallest_normal
    unit = torch.ldexp(torch.ones_like(exact), torch.frexp(exact.clamp_min(least)).exponent - 1 - digits)
    units = (numbers.double() / 2**16) if dtype is torch.bfloat16 else (numbers >> 3).double() / 2**13
    return (torch.floor(exact / unit + units) * unit).copysign(values.double()).to(dtype)


def unpack_mask(mask: Tensor, in_features: int) -> Tensor:
    """Unpacks the op's mask, bits ``uint8 [num_tokens, bytes]``, into booleans ``[num_tokens, in_features]``."""
    bits = (mask.unsqueeze(-1) >> torch.arange(8, dtype=torch.uint8, device=mask.device)) & 1
    return bits.flatten(1)[:, :in_features].bool()


def lora_delta(
    x: Tensor,
    lora_A: Tensor,
    lora_B: Tensor,
    scaling: float,
    dropout_p: float = 0.0,
    seed: Tensor | None = None,
) -> Tensor:
    """``scaling * dropout(x) @ lora_A.T @ lora_B.T`` in the wider of the two dtypes, as PEFT computes it.

    Args:
        x: ``[..., in_features]``.
        lora_A: ``[r, in_features]``.
        lora_B: ``[out_features, r]``.
        seed: int64 ``[]``, of the dropout mask; only read with dropout.

    Returns:
        ``[..., out_features]`` in the wider of the dtypes of ``x`` and ``lora_A``.
    """
    x_dropped = x
    threshold = dropout_threshold(dropout_p)
    if threshold > 0:
        assert seed is not None
        keep = dropout_keep(int(seed), x.shape[:-1].numel(), x.shape[-1], dropout_p).view(x.shape).to(x.device)
        x_dropped = x * keep * (65536.0 / (65536.0 - threshold))
    wide = torch.promote_types(x.dtype, lora_A.dtype)
    return scaling * (x_dropped.to(wide) @ lora_A.to(wide).T @ lora_B.to(wide).T)


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
    """``x @ weight.T + bias + scaling * dropout(x) @ lora_A.T @ lora_B.T``; differentiable by autograd.

    ``weight`` is ``[out_features, in_features]``, ``bias [out_features]``; the others are those of :func:`lora_delta`.
    """
    y = torch.nn.functional.linear(x, weight, bias)
    return (y + lora_delta(x, lora_A, lora_B, scaling, dropout_p, seed)).to(x.dtype)


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
    """Applies :func:`lora_linear` for each layer, with the same dropout mask; differentiable by autograd."""
    layers = zip(weights, biases, lora_As, lora_Bs, scalings, strict=True)
    return [lora_linear(x, *layer, dropout_p, seed) for layer in layers]


def lora_grouped(
    x: Tensor,
    lora_As: Sequence[Tensor],
    lora_Bs: Sequence[Tensor],
    group_of_row: Tensor,
    scalings: Tensor,
    ranks: Tensor | None = None,
    dropout_p: float = 0.0,
    seed: Tensor | None = None,
) -> Tensor:
    """Returns what ``lora_grouped_`` adds to y: :func:`lora_delta` of each group's rows, with one mask for all.

    The arguments are those of :func:`lora_ext.functional.lora_grouped_`.
    """
    pairs = [
        pair
        for A, B in zip(lora_As, lora_Bs, strict=True)
        for pair in (zip(A, B, strict=True) if A.dim() == 3 else [(A, B)])
    ]
    rows = x.reshape(x.shape[:-1].numel(), x.shape[-1])
    if threshold := dropout_threshold(dropout_p):
        assert seed is not None
        keep = dropout_keep(int(seed), *rows.shape, dropout_p).to(x.device)
        rows = rows * keep * (65536.0 / (65536.0 - threshold))
    group_of_token = group_of_row.reshape(-1).repeat_interleave(len(rows) // max(group_of_row.numel(), 1))
    wide = torch.promote_types(x.dtype, lora_As[0].dtype)
    chosen = [(group_of_token == group).nonzero().squeeze(1) for group in range(-1, len(pairs))]
    updates = [rows.new_zeros(len(chosen[0]), lora_Bs[0].shape[-2], dtype=wide)]
    for group, (A, B) in enumerate(pairs):
        rank = len(A) if ranks is None else int(ranks[group])
        update = lora_delta(rows[chosen[group + 1]], A[:rank], B[:, :rank], float(scalings[group]))
        updates.append(update.to(wide))
    return torch.cat(updates)[torch.cat(chosen).argsort()].reshape(*x.shape[:-1], lora_Bs[0].shape[-2])


def dora_linear(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    lora_A: Tensor,
    lora_B: Tensor,
    magnitude: Tensor,
    scaling: float,
    dropped: Tensor | None = None,
) -> Tensor:
    """DoRA (arXiv 2402.09353, eq. 5 and 11), by the updated weight itself: ``[..., out_features]``.

    ``dropped`` is the adapter's input if that is not ``x``: the base weight's product with the rest stays as it is.
    """
    updated = weight + scaling * lora_B @ lora_A
    factor = magnitude / updated.norm(dim=1).detach()
    read = x if dropped is None else dropped
    y = read @ (factor.unsqueeze(1) * updated).T + (x - read) @ weight.T
    return y if bias is None else y + bias


def bottleneck(
    x: Tensor,
    down_weight: Tensor,
    down_bias: Tensor | None,
    up_weight: Tensor,
    up_bias: Tensor | None,
    activation: str = "relu",
    residual: Tensor | None = None,
) -> Tensor:
    """``residual + activation(x @ down_weight.T + down_bias) @ up_weight.T + up_bias``; differentiable by autograd.

    The arguments are those of :func:`lora_ext.functional.bottleneck`.
    """
    residual = x if residual is None else residual
    wide = torch.promote_types(x.dtype, down_weight.dtype)
    hidden = torch.nn.functional.linear(x.to(wide), down_weight.to(wide))
    hidden = hidden if down_bias is None else hidden + down_bias.to(wide)
    hidden = hidden if activation == "identity" else getattr(torch.nn.functional, activation)(hidden)
    wide = torch.promote_types(residual.dtype, up_weight.dtype)
    y = residual + torch.nn.functional.linear(hidden.to(wide), up_weight.to(wide))
    return (y if up_bias is None else y + up_bias.to(wide)).to(residual.dtype)


def merge(weight: Tensor, lora_A: Tensor, lora_B: Tensor, scaling: float) -> Tensor:
    """``weight + scaling * lora_B @ lora_A`` accumulated in float32 (float64 for float64) and rounded once.

    ``weight`` is ``[out_features, in_features]``, the factors as in :func:`lora_delta`.
    """
    acc = torch.float64 if weight.dtype == torch.float64 else torch.float32
    return (weight.to(acc) + scaling * (lora_B.to(acc) @ lora_A.to(acc))).to(weight.dtype)
