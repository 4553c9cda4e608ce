"""Makes valid calls of lora_grouped_, its backward and lora_grouped_linear."""

from __future__ import annotations

import torch

from lora_ext import reference

from .calls import Call, CannotTell
from .choices import Choices
from .compare import against_formula, rescale, tensors_in
from .ops import DTYPES, PROBABILITIES, SCALINGS, SIZES, acc_name, count, dropout, maker, op, tokens_shape, with_history
from .ops_backward import mask_value, optional
from .values import ListValue, Source, Value, literal, tensor

_RANKS = (2, 1, 3, 4, 0, 8, 17, 33)


def _groups(choices: Choices, lead: tuple[int, ...], features: tuple[int, int], factors: str) -> dict[str, Value]:
    """Makes the arguments that say which adapters there are, and which row uses which."""
    size_in, size_out = features
    entries = [((choices.pick((2, 1, 3, 0)),) if choices.chance(50) else (), choices.pick(_RANKS)) for _ in range(2)]
    ranks = [rank for slots, rank in entries for _ in range(slots[0] if slots else 1)]
    shape = lead[: choices.pick((len(lead), 0, 1))]
    step = choices.pick((3, 1, 7, 0))
    groups = f"(torch.arange({count(shape)}) * {step} % {len(ranks) + 1} - 1).reshape({shape})"
    used = [choices.integer(rank + 1) for rank in ranks]
    scalings = [choices.pick((*SCALINGS, -1.0)) for _ in ranks]
    return {
        "lora_As": ListValue([tensor(choices, (*slots, rank, size_in), factors) for slots, rank in entries]),
        "lora_Bs": ListValue([tensor(choices, (*slots, size_out, rank), factors) for slots, rank in entries]),
        "group_of_row": Source(groups),
        "scalings": Source(f"torch.tensor({scalings}, dtype=torch.float64)"),
        "ranks": Source(f"torch.tensor({used}, dtype=torch.int64)" if choices.chance(50) else "None"),
    }


def grouped_values(choices: Choices) -> dict[str, Value]:
    dtype, factors = choices.pick(DTYPES)
    lead, size_in, size_out = tokens_shape(choices), choices.pick(SIZES), choices.pick(SIZES)
    values = {
        "y": tensor(choices, (*lead, size_out), dtype, ("unaligned", "the middle of a storage")),
        "x": tensor(choices, (*lead, size_in), dtype),
        **_groups(choices, lead, (size_in, size_out), factors),
        **dropout(choices),
    }
    with_history(choices, values, ("x", "lora_As", "lora_Bs"))
    return values


def check_grouped(before, y, after) -> None:
    def formula(y, **a):
        return [y + reference.lora_grouped(**a)]

    against_formula(formula, before, [y], {k: v for k, v in after.items() if k != "y"}, before["x"].dtype)


@maker
def lora_grouped_(choices: Choices) -> Call:
    def oracle(before, result, after):
        check_grouped(before, after["y"], after)

    return Call(op("lora_grouped_"), grouped_values(choices), oracle, changes=("y",), differentiated="[y]")


def grouped_linear_values(choices: Choices) -> dict[str, Value]:
    dtype, factors = choices.pick(DTYPES)
    lead, size_in, size_out = tokens_shape(choices), choices.pick(SIZES), choices.pick(SIZES)
    values = {
        "x": tensor(choices, (*lead, size_in), dtype),
        "weight": tensor(choices, (size_out, size_in), dtype),
        "bias": tensor(choices, (size_out,), dtype) if choices.chance(50) else Source("None"),
        **_groups(choices, lead, (size_in, size_out), factors),
    }
    with_history(choices, values, ("x", "weight", "lora_As", "lora_Bs"))
    return values


def check_grouped_linear(before, y) -> None:
    def formula(x, weight, bias, **a):
        return [torch.nn.functional.linear(x, weight, bias) + reference.lora_grouped(x, **a)]

    against_formula(formula, before, [y], {}, before["x"].dtype)


@maker
def lora_grouped_linear(choices: Choices) -> Call:
    def oracle(before, result, after):
        check_grouped_linear(before, result)

    return Call(op("lora_grouped_linear"), grouped_linear_values(choices), oracle, differentiated="[result]")


@maker
def lora_grouped_backward(choices: Choices) -> Call:
    dtype, factors = choices.pick(DTYPES)
    lead, size_in, size_out = tokens_shape(choices), choices.pick(SIZES), choices.pick(SIZES)
    p = choices.pick(PROBABILITIES) if choices.chance(40) else 0.0
    groups = _groups(choices, lead, (size_in, size_out), factors)
    entries = len(groups["lora_As"].entries)
    wanted = [not choices.chance(30) for _ in range(1 + 2 * entries)]
    wants_A, wants_B = any(wanted[1 : 1 + entries]), any(wanted[1 + entries :])
    most = max(entry.shape[-2] for entry in groups["lora_As"].entries)
    values = {
        "grad_y": tensor(choices, (*lead, size_out), dtype),
        "x": optional(choices, tensor(choices, (*lead, size_in), dtype), wants_A),
        **groups,
        "xa": optional(choices, tensor(choices, (count(lead), most), acc_name(dtype)), wants_B),
        "mask": mask_value(choices, count(lead), size_in) if p > 0 else Source("None"),
        "dropout_p": literal(p),
        "output_mask": ListValue([literal(is_wanted) for is_wanted in wanted]),
    }

    def oracle(before, result, after):
        factors = [*before["lora_As"], *before["lora_Bs"]]
        if any(t.requires_grad for t in tensors_in(list(before.values()))) and not all(
            factor.isfinite().all() for factor in factors
        ):
            raise CannotTell  # lora_ext/_ops/composite.py computes it: zero times infinity
        results = [t for t in tensors_in(list(result)) if t is not None]
        against_formula(_backward_formula, before, results, {}, before["grad_y"].dtype)

    return Call(op("lora_grouped_backward"), values, oracle)


def _backward_formula(grad_y, x, lora_As, lora_Bs, group_of_row, scalings, ranks, xa, mask, dropout_p, output_mask):
    """Computes the requested gradients in float64, a group at a time. The op reads only what these need."""
    size_in, entries = lora_As[0].shape[-1], len(lora_As)
    want_x, want_A, want_B = output_mask[0], any(output_mask[1 : 1 + entries]), any(output_mask[1 + entries :])
    rows = grad_y.reshape(count(grad_y.shape[:-1]), grad_y.shape[-1])
    has_mask = reference.dropout_threshold(dropout_p) > 0 and (want_x or want_A)
    keep = reference.unpack_mask(mask, size_in).double() if has_mask else rows.new_ones(len(rows), size_in)
    dropped = keep * x.reshape(len(rows), size_in) if want_A else None
    group_of = group_of_row.reshape(-1).repeat_interleave(len(rows) // max(group_of_row.numel(), 1))
    grad_x = rows.new_zeros(len(rows), size_in)
    grad_As, grad_Bs = ([factor.new_zeros(factor.shape) for factor in factors] for factors in (lora_As, lora_Bs))
    group = 0
    for A, B, grad_A, grad_B in zip(lora_As, lora_Bs, grad_As, grad_Bs, strict=True):
        matrices = zip(A, B, grad_A, grad_B, strict=True) if A.dim() == 3 else [(A, B, grad_A, grad_B)]
        for A_g, B_g, grad_A_g, grad_B_g in matrices:
            rank = len(A_g) if ranks is None else int(ranks[group])
            chosen = group_of == group
            grad_xa = scalings[group] * rescale(dropout_p) * (rows[chosen] @ B_g[:, :rank])
            grad_x[chosen] = keep[chosen] * (grad_xa @ A_g[:rank])
            if want_A:
                grad_A_g[:rank] = grad_xa.T @ dropped[chosen]
            if want_B:
                grad_B_g[:, :rank] = rows[chosen].T @ xa[chosen][:, :rank]
            group += 1
    gradients = [grad_x.reshape(*grad_y.shape[:-1], size_in), *grad_As, *grad_Bs]
    return [gradient for gradient, is_wanted in zip(gradients, output_mask, strict=True) if is_wanted]
