"""Makes valid calls of lora_grouped_, its backward and lora_grouped_linear."""

from __future__ import annotations

import math

import torch

from lora_ext import reference

from . import ops
from .calls import Call
from .cases import CannotTell, WrongResult
from .choices import Choices
from .compare import against_formula, rescale, tensors_in
from .values import ListValue, Source, Value, literal, tensor

_RANKS = (2, 1, 3, 4, 0, 8, 17, 33)


def _groups(choices: Choices, lead: tuple[int, ...], features: tuple[int, int], factors: str) -> dict[str, Value]:
    """Makes the arguments that say which adapters there are, and which row uses which."""
    size_in, size_out = features
    entries = [((choices.pick((2, 1, 3, 0)),) if choices.chance(50) else (), choices.pick(_RANKS)) for _ in range(2)]
    ranks = [rank for slots, rank in entries for _ in range(slots[0] if slots else 1)]
    shape = lead[: choices.pick((len(lead), 0, 1))]
    step = choices.pick((3, 1, 7, 0))
    groups = f"(torch.arange({math.prod(shape)}) * {step} % {len(ranks) + 1} - 1).reshape({shape})"
    used = [choices.integer(rank + 1) for rank in ranks]
    scalings = [choices.pick((*ops.SCALINGS, -1.0)) for _ in ranks]
    return {
        "lora_As": ListValue([tensor(choices, (*slots, rank, size_in), factors) for slots, rank in entries]),
        "lora_Bs": ListValue([tensor(choices, (*slots, size_out, rank), factors) for slots, rank in entries]),
        "group_of_row": Source(groups),
        "scalings": Source(f"torch.tensor({scalings}, dtype=torch.float64)"),
        "ranks": Source(f"torch.tensor({used}, dtype=torch.int64)" if choices.chance(50) else "None"),
    }


@ops.maker(ops.OPS, ops.FUNCTIONS)
def lora_grouped_(choices: Choices, function: str) -> Call:
    dtype, factors = choices.pick(ops.DTYPES)
    lead, size_in, size_out = ops.tokens_shape(choices), choices.pick(ops.SIZES), choices.pick(ops.SIZES)
    values = {
        "y": tensor(choices, (*lead, size_out), dtype, ops.IN_PLACE),
        "x": tensor(choices, (*lead, size_in), dtype),
        **_groups(choices, lead, (size_in, size_out), factors),
        **ops.dropout(choices),
    }

    def formula(y, **a):
        return [y + reference.lora_grouped(**a)]

    def oracle(before, result, after):
        ops.drawn_seed(before)
        if function.startswith(ops.FUNCTIONS) and result is not after["y"]:
            raise WrongResult("the result is not y")
        arguments = {name: value for name, value in after.items() if name != "y"}
        against_formula(formula, before, [after["y"]], arguments, before["x"].dtype)

    return Call(function, ops.with_history(choices, values), oracle, changes=("y",), differentiated="[y]")


@ops.maker(ops.OPS, ops.FUNCTIONS)
def lora_grouped_linear(choices: Choices, function: str) -> Call:
    dtype, factors = choices.pick(ops.DTYPES)
    lead, size_in, size_out = ops.tokens_shape(choices), choices.pick(ops.SIZES), choices.pick(ops.SIZES)
    values = {
        "x": tensor(choices, (*lead, size_in), dtype),
        "weight": tensor(choices, (size_out, size_in), dtype),
        "bias": ops.maybe(choices, tensor(choices, (size_out,), dtype)),
        **_groups(choices, lead, (size_in, size_out), factors),
    }

    def formula(x, weight, bias, **a):
        return [torch.nn.functional.linear(x, weight, bias) + reference.lora_grouped(x, **a)]

    def oracle(before, result, after):
        against_formula(formula, before, [result], {}, before["x"].dtype)

    return Call(function, ops.with_history(choices, values), oracle, differentiated="[result]")


@ops.maker(ops.OPS)
def lora_grouped_backward(choices: Choices, function: str) -> Call:
    dtype, factors = choices.pick(ops.DTYPES)
    lead, size_in, size_out = ops.tokens_shape(choices), choices.pick(ops.SIZES), choices.pick(ops.SIZES)
    p = choices.pick(ops.PROBABILITIES) if choices.chance(40) else 0.0
    groups = _groups(choices, lead, (size_in, size_out), factors)
    entries = len(groups["lora_As"].entries)
    wants = ops.wanted(choices, 1 + 2 * entries)
    wants_A, wants_B = any(wants[1 : 1 + entries]), any(wants[1 + entries :])
    most = max(entry.shape[-2] for entry in groups["lora_As"].entries)
    values = {
        "grad_y": tensor(choices, (*lead, size_out), dtype),
        "x": ops.maybe(choices, tensor(choices, (*lead, size_in), dtype), wants_A),
        **groups,
        "xa": ops.maybe(choices, tensor(choices, (math.prod(lead), most), ops.acc_name(dtype)), wants_B),
        "mask": ops.mask_value(choices, math.prod(lead), size_in) if p > 0 else Source("None"),
        "dropout_p": literal(p),
        "output_mask": ListValue([*map(literal, wants)]),
    }

    call = ops.backward_call(function, values, _backward_formula)
    compare = call.oracle

    def oracle(before, result, after):
        factors = [*before["lora_As"], *before["lora_Bs"]]
        if any(t.requires_grad for t in tensors_in(list(before.values()))) and not all(
            factor.isfinite().all() for factor in factors
        ):
            raise CannotTell  # lora_ext/_ops/composite.py computes it: zero times infinity
        compare(before, result, after)

    call.oracle = oracle
    return call


@torch.no_grad()
def _backward_formula(grad_y, x, lora_As, lora_Bs, group_of_row, scalings, ranks, xa, mask, dropout_p, output_mask):
    """Computes the requested gradients in float64, a group at a time. The op reads only what these need."""
    size_in, entries = lora_As[0].shape[-1], len(lora_As)
    want_x, want_A, want_B = output_mask[0], any(output_mask[1 : 1 + entries]), any(output_mask[1 + entries :])
    rows = ops.rows_of(grad_y)
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
