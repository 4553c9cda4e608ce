"""Makes valid calls of lora_grouped_, its backward and lora_grouped_linear."""

from __future__ import annotations

import math

import torch

from lora_ext import reference

from . import ops
from .calls import Call
from .cases import WrongResult
from .choices import Choices
from .compare import against_formula
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


@ops.maker(ops.OPS, ops.FUNCTIONS, names=["lora_grouped_", "lora_grouped_linear"])
def _forward(choices: Choices, function: str) -> Call:
    (dtype, factors), in_place = choices.pick(ops.DTYPES), function.endswith("_")
    lead, size_in, size_out = ops.tokens_shape(choices), choices.pick(ops.SIZES), choices.pick(ops.SIZES)
    y = {"y": tensor(choices, (*lead, size_out), dtype, ops.IN_PLACE)}
    x = {"x": tensor(choices, (*lead, size_in), dtype)}
    weight = {"weight": tensor(choices, (size_out, size_in), dtype)}
    weight["bias"] = ops.maybe(choices, tensor(choices, (size_out,), dtype))
    groups = _groups(choices, lead, (size_in, size_out), factors)
    values = y | x | groups | ops.dropout(choices) if in_place else x | weight | groups

    def formula(x, y=None, weight=None, bias=None, **a):
        base = torch.nn.functional.linear(x, weight, bias) if y is None else y
        return [base + reference.lora_grouped(x, **a)]

    def oracle(before, result, after):
        ops.drawn_seed(before)
        if in_place and function.startswith(ops.FUNCTIONS) and result is not after["y"]:
            raise WrongResult("the result is not y")
        result = after["y"] if in_place else result
        arguments = {name: value for name, value in after.items() if name != "y"}
        against_formula(formula, before, [result], arguments, before["x"].dtype)

    outputs = "[y]" if in_place else "[result]"
    changes = ("y",) if in_place else ()
    return Call(function, ops.with_history(choices, values), oracle, changes, outputs)


@ops.maker(ops.OPS)
def lora_grouped_backward(choices: Choices, function: str) -> Call:
    """Compared through the gradients of the forward."""
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
    return Call(function, values)
