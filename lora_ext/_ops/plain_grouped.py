"""``lora_grouped_`` and its backward in plain PyTorch, for float32 and float64 on CUDA (plain.py).

As in the kernels a row meets the factors of its own group only, numbers that do not exist make NaN of their rows, and
nothing waits for the device: a CUDA graph can capture it.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from lora_ext._ops.composite import draw_mask, largest_rank, scale
from lora_ext._ops.registration import rows_of
from lora_ext.reference import dropout_threshold, unpack_mask

_ROWS = 256  # whose factors are gathered at once


class _Choice(NamedTuple):
    group: Tensor  # int64 [num_tokens]; 0 for rows without one
    used: Tensor  # bool [num_tokens, rank]: the ranks of a row's group
    scaling: Tensor  # acc [num_tokens, 1]
    added: Tensor  # acc [num_tokens, 1]: NaN where a number or a rank does not exist, otherwise zero

    def rows(self, begin: int) -> _Choice:
        return _Choice(*(tensor[begin : begin + _ROWS] for tensor in self))


def _stack(factors: Sequence[Tensor], rank: int, of_A: bool) -> Tensor:
    """Stacks the matrices of all groups, padded to ``rank``: ``[groups, rank, in]`` or ``[groups, out, rank]``."""
    stacks = [factor if factor.dim() == 3 else factor.unsqueeze(0) for factor in factors]
    if len(stacks) == 1:
        return stacks[0]
    missing = [rank - factor.shape[-2 if of_A else -1] for factor in stacks]
    return torch.cat(
        [F.pad(factor, (0, 0, 0, n) if of_A else (0, n)) for factor, n in zip(stacks, missing, strict=True)]
    )


def _ends(lora_As: Sequence[Tensor], ranks: Tensor | None, device: torch.device) -> tuple[Tensor, Tensor]:
    """Returns each group's number of ranks, and whether it is possible."""
    stored = torch.cat(
        [torch.full((len(A) if A.dim() == 3 else 1,), A.shape[-2], device=device, dtype=torch.int64) for A in lora_As]
    )
    if ranks is None:
        return stored, torch.ones_like(stored, dtype=torch.bool)
    possible = (ranks >= 0) & (ranks <= stored)
    return torch.where(possible, ranks, 0), possible


def _choose(num_tokens, lora_As, group_of_row, scalings, ranks, dropout_p, dtype) -> _Choice:
    groups, rank = len(scalings), largest_rank(lora_As)
    given = group_of_row.reshape(-1, 1).expand(-1, num_tokens // max(group_of_row.numel(), 1)).reshape(-1)
    exists = (given >= 0) & (given < groups)
    group = torch.where(exists, given, 0)
    ends, possible = _ends(lora_As, ranks, given.device)
    used = exists[:, None] & (torch.arange(rank, device=given.device) < ends[group][:, None])
    is_wrong = torch.where(exists, ~possible[group], given != -1)
    added = torch.where(is_wrong, torch.nan, 0.0).to(dtype)
    return _Choice(group, used, (scalings * scale(1.0, dropout_p)).to(dtype)[group][:, None], added[:, None])


def _dropped(rows: Tensor, mask: Tensor | None) -> Tensor:
    """Zeroes what the bit mask drops, NaN too. A mask without rows, or None, drops nothing."""
    return rows if mask is None or mask.dim() < 2 else torch.where(unpack_mask(mask, rows.shape[1]).bool(), rows, 0.0)


def _times(rows: Tensor, factors: Tensor) -> Tensor:
    """Multiplies each row ``[n, k]`` by its matrix ``[n, k, m]``."""
    return torch.bmm(rows.unsqueeze(1), factors).squeeze(1)


def lora_grouped_(y, x, lora_As, lora_Bs, group_of_row, scalings, ranks, dropout_p, seed):
    mask = draw_mask(x, dropout_p, seed)
    rows, rank = _dropped(rows_of(x), mask), largest_rank(lora_As)
    choice = _choose(len(rows), lora_As, group_of_row, scalings, ranks, dropout_p, rows.dtype)
    all_A, all_B = _stack(lora_As, rank, True), _stack(lora_Bs, rank, False)
    xas, updates = [rows.new_empty(0, rank)], [rows.new_empty(0, all_B.shape[1])]
    for begin in range(0, len(rows), _ROWS):
        chosen = choice.rows(begin)
        A, B = all_A[chosen.group].to(rows.dtype), all_B[chosen.group].to(rows.dtype)
        xa = _times(rows[begin : begin + _ROWS], A.transpose(1, 2)) * chosen.scaling
        xas.append(torch.where(chosen.used, xa, 0.0))
        B = torch.where(chosen.used[:, None], B, 0.0)
        updates.append(_times(xas[-1], B.transpose(1, 2)) + chosen.added)
    y += torch.cat(updates).reshape(y.shape)
    return torch.cat(xas), mask


def lora_grouped_backward(grad_y, x, lora_As, lora_Bs, group_of_row, scalings, ranks, xa, mask, dropout_p, output_mask):
    want_x, *wanted = output_mask
    want_As, want_Bs = wanted[: len(lora_As)], wanted[len(lora_As) :]
    mask = mask if dropout_threshold(dropout_p) else None
    rows, rank = rows_of(grad_y), largest_rank(lora_As)
    choice = _choose(len(rows), lora_As, group_of_row, scalings, ranks, dropout_p, rows.dtype)
    in_features = lora_As[0].shape[-1]
    grad_xa, grad_x = rows.new_zeros(len(rows), rank), None
    if want_x or any(want_As):
        all_B = _stack(lora_Bs, rank, False)
        for begin in range(0, len(rows), _ROWS):
            chosen = choice.rows(begin)
            B = all_B[chosen.group].to(rows.dtype)
            sums = _times(rows[begin : begin + _ROWS], B) * chosen.scaling
            grad_xa[begin : begin + _ROWS] = torch.where(chosen.used, sums, 0.0)
    if want_x:
        all_A, parts = _stack(lora_As, rank, True), [rows.new_empty(0, in_features)]
        for begin in range(0, len(rows), _ROWS):
            chosen = choice.rows(begin)
            A = torch.where(chosen.used[:, :, None], all_A[chosen.group].to(rows.dtype), 0.0)
            parts.append(_times(grad_xa[begin : begin + _ROWS], A))
        grad_x = _dropped(torch.cat(parts), mask) + choice.added
        grad_x = grad_x.to(grad_y.dtype).reshape(*grad_y.shape[:-1], in_features)
    ends, _ = _ends(lora_As, ranks, rows.device)
    grad_As = grad_Bs = []
    if any(want_As):
        grad_As = _factor_gradients(lora_As, want_As, choice, ends, grad_xa, _dropped(rows_of(x), mask))
    if any(want_Bs):
        grad_Bs = [
            grad.transpose(-1, -2).contiguous()
            for grad in _factor_gradients(
                [B.transpose(-1, -2) for B in lora_Bs], want_Bs, choice, ends, rows_of(xa), rows
            )
        ]
    return grad_x, grad_As, grad_Bs


def _factor_gradients(
    factors: Sequence[Tensor], wanted: Sequence[bool], choice: _Choice, ends: Tensor, small: Tensor, rows: Tensor
) -> list[Tensor]:
    """Sums ``small.T @ rows`` over the rows of each group, for the wanted factors ``[(slots,) rank, features]``."""
    found, group = [], 0
    for factor, is_wanted in zip(factors, wanted, strict=True):
        slots, rank = len(factor) if factor.dim() == 3 else 1, factor.shape[-2]
        if is_wanted:
            gradient = factor.new_empty(slots, rank, factor.shape[-1])
            for slot in range(slots):
                own = choice.used.any(1, keepdim=True) & (choice.group == group + slot)[:, None]
                total = torch.where(own, small[:, :rank], 0.0).T @ torch.where(own, rows, 0.0)
                is_used = torch.arange(rank, device=rows.device)[:, None] < ends[group + slot]
                gradient[slot] = torch.where(is_used, total, 0.0)
            found.append(gradient.reshape(factor.shape))
        group += slots
    return found
