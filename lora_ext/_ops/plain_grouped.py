"""``lora_grouped_``, its backward and ``lora_grouped_linear`` in plain PyTorch (plain.py).

As in the kernels a row meets the factors of its own group only, numbers that do not exist make NaN of their rows, and
nothing waits for the device: a CUDA graph can capture it.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from lora_ext._ops.plain import acc_rows, draw_mask, dropped_rows, largest_rank, scale
from lora_ext.reference import dropout_threshold

_ROWS = 256  # whose factors are gathered at once


class _Choice(NamedTuple):
    group: Tensor  # int64 [num_tokens]; 0 for rows without one
    used: Tensor  # bool [num_tokens, rank]: the ranks of a row's group
    scaling: Tensor  # acc [num_tokens, 1]
    added: Tensor  # acc [num_tokens, 1]: NaN where a number or a rank does not exist, otherwise zero

    def map(self, function: Callable[[_Choice, Tensor], Tensor], rows: Tensor) -> Tensor:
        """Applies ``function`` to parts of the rows; in traces, to all at once."""
        if torch.compiler.is_compiling() or len(rows) <= _ROWS:
            return function(self, rows)
        parts = zip(*(tensor.split(_ROWS) for tensor in (*self, rows)), strict=True)
        return torch.cat([function(_Choice(*choice), part) for *choice, part in parts])


def _transposed(lora_Bs: Sequence[Tensor]) -> list[Tensor]:
    """Returns each ``lora_B`` in the form of a ``lora_A``: ``[(slots,) rank, out_features]``."""
    return [lora_B.transpose(-1, -2) for lora_B in lora_Bs]


def _at_least_one(of_groups: Tensor) -> Tensor:
    """Adds a zero for group 0, which rows without a group take, where there is no group: stacks may have no slots."""
    return of_groups if len(of_groups) else of_groups.new_zeros(1, *of_groups.shape[1:])


def _stack(factors: Sequence[Tensor]) -> Tensor:
    """Stacks the matrices of all groups, padded to the largest rank: ``[groups, rank, features]``. At least one."""
    stacks = [factor if factor.dim() == 3 else factor.unsqueeze(0) for factor in factors]
    rank = largest_rank(stacks)
    stack = stacks[0] if len(stacks) == 1 else torch.cat([F.pad(S, (0, 0, 0, rank - S.shape[-2])) for S in stacks])
    return _at_least_one(stack)


def _ends(lora_As: Sequence[Tensor], ranks: Tensor | None, device: torch.device) -> tuple[Tensor, Tensor]:
    """Returns each group's number of ranks, and whether it is possible."""
    stored = torch.cat(
        [torch.full((len(A) if A.dim() == 3 else 1,), A.shape[-2], device=device, dtype=torch.int64) for A in lora_As]
    )
    if ranks is None:
        return stored, torch.ones_like(stored, dtype=torch.bool)
    possible = (ranks >= 0) & (ranks <= stored)
    return torch.where(possible, ranks, 0), possible


def _choose(rows: Tensor, lora_As, group_of_row, scalings, ranks, dropout_p) -> _Choice:
    """Returns the choice of each of the ``rows``."""
    groups, rank, dtype = scalings.shape[0], largest_rank(lora_As), rows.dtype
    given = group_of_row.reshape(-1, 1).expand(-1, rows.shape[0] // max(group_of_row.numel(), 1)).reshape(-1)
    exists = (given >= 0) & (given < groups)
    group = torch.where(exists, given, 0)
    ends, possible = map(_at_least_one, _ends(lora_As, ranks, given.device))
    used = exists[:, None] & (torch.arange(rank, device=given.device) < ends[group][:, None])
    is_wrong = torch.where(exists, ~possible[group], given != -1)
    added = torch.where(is_wrong, torch.nan, 0.0).to(dtype)
    scaling = _at_least_one((scalings * scale(1.0, dropout_p)).to(dtype))[group]
    return _Choice(group, used, scaling[:, None], added[:, None])


def _times(rows: Tensor, factors: Tensor) -> Tensor:
    """Multiplies each row ``[n, k]`` by its matrix ``[n, k, m]``."""
    return torch.bmm(rows.unsqueeze(1), factors).select(1, 0)


def _shrink(rows: Tensor, factors: Sequence[Tensor], choice: _Choice) -> Tensor:
    """Multiplies rows by their groups' factors, scaled: ``[num_tokens, rank]``, zero beyond a group's rank."""
    stack = _stack(factors)

    def of_part(chosen: _Choice, part: Tensor) -> Tensor:
        sums = _times(part, stack[chosen.group].to(part.dtype).transpose(1, 2)) * chosen.scaling
        return torch.where(chosen.used, sums, 0.0)

    return choice.map(of_part, rows)


def _expand(small: Tensor, factors: Sequence[Tensor], choice: _Choice) -> Tensor:
    """Multiplies ``[num_tokens, rank]`` by the rows' groups' factors: ``[num_tokens, features]``."""
    stack = _stack(factors)

    def of_part(chosen: _Choice, part: Tensor) -> Tensor:
        return _times(part, torch.where(chosen.used[:, :, None], stack[chosen.group].to(part.dtype), 0.0))

    return choice.map(of_part, small)


def grouped_xa(x, lora_As, group_of_row, scalings, ranks, mask, dropout_p) -> tuple[Tensor, _Choice]:
    """Computes the xa of each row's group ``[num_tokens, rank]``, with the scaling."""
    rows = acc_rows(x)
    choice = _choose(rows, lora_As, group_of_row, scalings, ranks, dropout_p)
    return _shrink(dropped_rows(rows, mask), lora_As, choice), choice


def _update(y: Tensor, xa: Tensor, lora_Bs: Sequence[Tensor], choice: _Choice) -> Tensor:
    return (_expand(xa, _transposed(lora_Bs), choice) + choice.added).reshape(y.shape)


def lora_grouped_(y, x, lora_As, lora_Bs, group_of_row, scalings, ranks, dropout_p, seed):
    mask = draw_mask(x, dropout_p, seed)
    xa, choice = grouped_xa(x, lora_As, group_of_row, scalings, ranks, mask, dropout_p)
    y += _update(y, xa, lora_Bs, choice)
    return xa.detach(), mask


def plus_lora_grouped(y, x, lora_As, lora_Bs, group_of_row, scalings, ranks=None):
    """Computes ``lora_grouped_`` out of place, without dropout."""
    xa, choice = grouped_xa(x, lora_As, group_of_row, scalings, ranks, None, 0.0)
    return (y + _update(y, xa, lora_Bs, choice)).to(y.dtype)


def lora_grouped_linear(x, weight, bias, lora_As, lora_Bs, group_of_row, scalings, ranks):
    return plus_lora_grouped(F.linear(x, weight, bias), x, lora_As, lora_Bs, group_of_row, scalings, ranks)


def lora_grouped_backward(grad_y, x, lora_As, lora_Bs, group_of_row, scalings, ranks, xa, mask, dropout_p, output_mask):
    want_x, *wanted = output_mask
    want_As, want_Bs = wanted[: len(lora_As)], wanted[len(lora_As) :]
    mask = mask if dropout_threshold(dropout_p) else None
    rows, B_ts = acc_rows(grad_y), _transposed(lora_Bs)
    choice = _choose(rows, lora_As, group_of_row, scalings, ranks, dropout_p)
    ends, _ = _ends(lora_As, ranks, rows.device)
    grad_x, grad_As, grad_Bs = None, [], []
    if want_x or any(want_As):
        grad_xa = _shrink(rows, B_ts, choice)
    if want_x:
        grad_x = dropped_rows(_expand(grad_xa, lora_As, choice), mask) + choice.added
        grad_x = grad_x.to(grad_y.dtype).reshape(*grad_y.shape[:-1], lora_As[0].shape[-1])
    if any(want_As):
        grad_As = _factor_gradients(lora_As, want_As, choice, ends, grad_xa, dropped_rows(acc_rows(x), mask))
    if any(want_Bs):
        grad_Bs = _factor_gradients(B_ts, want_Bs, choice, ends, xa, rows)
        grad_Bs = [grad.transpose(-1, -2).contiguous() for grad in grad_Bs]
    return grad_x, grad_As, grad_Bs


def _factor_gradients(
    factors: Sequence[Tensor], wanted: Sequence[bool], choice: _Choice, ends: Tensor, small: Tensor, rows: Tensor
) -> list[Tensor]:
    """Sums ``small.T @ rows`` over the rows of each group, for the wanted factors ``[(slots,) rank, features]``."""
    found, group = [], 0
    for factor, is_wanted in zip(factors, wanted, strict=True):
        slots, rank = len(factor) if factor.dim() == 3 else 1, factor.shape[-2]

        def of_slot(number: int, rank: int = rank) -> Tensor:
            own = choice.used.any(1, keepdim=True) & (choice.group == number)[:, None]
            total = torch.where(own, small.narrow(1, 0, rank), 0.0).T @ torch.where(own, rows, 0.0)
            return torch.where(torch.arange(rank, device=rows.device)[:, None] < ends[number], total, 0.0)

        if is_wanted:
            gradients = [of_slot(number) for number in range(group, group + slots)]
            gradient = torch.stack(gradients) if gradients else factor.new_empty(factor.shape)
            found.append(gradient.reshape(factor.shape).to(factor.dtype))
        group += slots
    return found
