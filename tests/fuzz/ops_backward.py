"""Makes valid calls of the backward ops and of the dropout mask."""

from __future__ import annotations

from collections.abc import Callable

import torch

from lora_ext import reference

from .calls import Call, CannotTell
from .choices import Choices
from .compare import WrongResult, against_formula, rescale, tensors_in
from .ops import (
    DTYPES,
    PROBABILITIES,
    RANKS,
    SCALINGS,
    SEEDS,
    SIZES,
    TOKENS,
    acc_name,
    count,
    maker,
    op,
    tokens_shape,
)
from .values import ListValue, Source, TensorValue, Value, literal, tensor


def mask_value(choices: Choices, tokens: int, size_in: int) -> TensorValue:
    return TensorValue((tokens, (size_in + 63) // 64 * 8), "uint8", choices.integer(1000), low=0, high=256)


def _output_mask(choices: Choices, count: int) -> ListValue:
    return ListValue([literal(not choices.chance(30)) for _ in range(count)])


def optional(choices: Choices, value: Value, wanted: bool) -> Value:
    """An argument that the op reads only if it is ``wanted``."""
    return value if wanted or choices.chance(50) else Source("None")


def _backward_values(choices: Choices, has_weight: bool, num_layers: int | None) -> dict[str, Value]:
    dtype, factors = choices.pick(DTYPES)
    lead, size_in = tokens_shape(choices), choices.pick(SIZES)
    layers = [(choices.pick(SIZES), choices.pick(RANKS)) for _ in range(num_layers or 1)]
    tokens, total = count(lead), sum(rank for _, rank in layers)
    p = choices.pick(PROBABILITIES) if choices.chance(40) else 0.0
    output_mask = _output_mask(choices, 3)
    wants = [entry.text == "True" for entry in output_mask.entries]
    has_mask = p > 0

    def listed(name: str, values: list[Value]) -> dict[str, Value]:
        return {name: values[0]} if num_layers is None else {f"{name}s": ListValue(values)}

    return {
        **listed("grad_y", [tensor(choices, (*lead, out), dtype) for out, _ in layers]),
        "x": optional(choices, tensor(choices, (*lead, size_in), dtype), wants[1]),
        **(listed("weight", [tensor(choices, (out, size_in), dtype) for out, _ in layers]) if has_weight else {}),
        **listed("lora_A", [tensor(choices, (rank, size_in), factors) for _, rank in layers]),
        **listed("lora_B", [tensor(choices, (out, rank), factors) for out, rank in layers]),
        "xa": optional(choices, tensor(choices, (tokens, total), acc_name(dtype)), wants[2]),
        "mask": optional(choices, mask_value(choices, tokens, size_in), False)
        if not has_mask
        else mask_value(choices, tokens, size_in),
        **listed("scaling", [literal(choices.pick(SCALINGS)) for _ in layers]),
        "dropout_p": literal(p),
        "output_mask": output_mask,
    }


def _backward_formula(grad_ys, x, weights, lora_As, lora_Bs, xa, mask, scalings, dropout_p, output_mask):
    """Computes the requested grad_x, grad_As and grad_Bs in float64."""
    scale, has_mask = rescale(dropout_p), reference.dropout_threshold(dropout_p) > 0
    want_x, want_A, want_B = output_mask
    rows = [g.reshape(count(g.shape[:-1]), g.shape[-1]) for g in grad_ys]
    size_in = lora_As[0].shape[1]
    keep = reference.unpack_mask(mask, size_in).double() if has_mask and (want_x or want_A) else 1.0
    grad_xas = [s * scale * (g @ B) for g, B, s in zip(rows, lora_Bs, scalings, strict=True)]
    results = []
    if want_x:
        grad_x = sum(keep * (g @ A) for g, A in zip(grad_xas, lora_As, strict=True))
        if weights is not None:
            grad_x = grad_x + sum(g @ W for g, W in zip(rows, weights, strict=True))
        results.append(grad_x.reshape(*grad_ys[0].shape[:-1], size_in))
    if want_A:
        dropped = x.reshape(count(x.shape[:-1]), x.shape[-1]) * keep
        results += [g.T @ dropped for g in grad_xas]
    if want_B:
        parts = xa.split([A.shape[0] for A in lora_As], dim=1)
        results += [g.T @ part for g, part in zip(rows, parts, strict=True)]
    return results


def _single(formula: Callable) -> Callable:
    """Wraps the formula for one layer, whose arguments are not lists."""

    def of_one(grad_y, x, lora_A, lora_B, xa, mask, scaling, dropout_p, output_mask, weight=None):
        weights = None if weight is None else [weight]
        return formula([grad_y], x, weights, [lora_A], [lora_B], xa, mask, [scaling], dropout_p, output_mask)

    return of_one


def _backward_oracle(formula: Callable, like: str) -> Callable:
    def oracle(before, result, after):
        results = [t for t in tensors_in(list(result)) if t is not None]
        x = tensors_in(before[like])[0]
        against_formula(formula, before, results, {}, x.dtype)

    return oracle


@maker
def lora_linear_backward(choices: Choices) -> Call:
    values = _backward_values(choices, True, None)
    return Call(op("lora_linear_backward"), values, _backward_oracle(_single(_backward_formula), "grad_y"))


@maker
def lora_delta_backward(choices: Choices) -> Call:
    values = _backward_values(choices, False, None)
    return Call(op("lora_delta_backward"), values, _backward_oracle(_single(_backward_formula), "grad_y"))


@maker
def lora_linear_siblings_backward(choices: Choices) -> Call:
    values = _backward_values(choices, True, choices.pick((2, 1, 3, 8)))
    values["scalings"] = values.pop("scalings")
    return Call(op("lora_linear_siblings_backward"), values, _backward_oracle(_backward_formula, "grad_ys"))


@maker
def lora_delta_siblings_backward(choices: Choices) -> Call:
    values = _backward_values(choices, False, choices.pick((2, 1, 3, 8)))

    def formula(**arguments):
        return _backward_formula(weights=None, **arguments)

    return Call(op("lora_delta_siblings_backward"), values, _backward_oracle(formula, "grad_ys"))


@maker
def lora_shrink_backward(choices: Choices) -> Call:
    dtype, factors = choices.pick(DTYPES)
    lead, size_in, rank = tokens_shape(choices), choices.pick(SIZES), choices.pick(RANKS)
    values = {
        "grad_xa": tensor(choices, (*lead, rank), acc_name(dtype)),
        "x": tensor(choices, (*lead, size_in), dtype),
        "lora_A": tensor(choices, (rank, size_in), factors),
        "base": tensor(choices, (*lead, size_in), dtype) if choices.chance(50) else Source("None"),
        "output_mask": _output_mask(choices, 2),
    }

    def formula(grad_xa, x, lora_A, base, output_mask):
        rows, columns = (t.reshape(count(t.shape[:-1]), t.shape[-1]) for t in (grad_xa, x))
        results = []
        if output_mask[0]:
            grad_x = (rows @ lora_A).reshape(x.shape)
            results.append(grad_x if base is None else grad_x + base.reshape(x.shape))
        if output_mask[1]:
            results.append(rows.T @ columns)
        return results

    return Call(op("lora_shrink_backward"), values, _backward_oracle(formula, "x"))


@maker
def lora_expand_backward(choices: Choices) -> Call:
    dtype, factors = choices.pick(DTYPES)
    lead, size_out, rank = tokens_shape(choices), choices.pick(SIZES), choices.pick(RANKS)
    output_mask = _output_mask(choices, 2)
    wants_B = output_mask.entries[1].text == "True"
    values = {
        "grad_y": tensor(choices, (*lead, size_out), dtype),
        "xa": optional(choices, tensor(choices, (*lead, rank), acc_name(dtype)), wants_B),
        "lora_B": tensor(choices, (size_out, rank), factors),
        "output_mask": output_mask,
    }

    def formula(grad_y, xa, lora_B, output_mask):
        rows = grad_y.reshape(count(grad_y.shape[:-1]), grad_y.shape[-1])
        results = [(rows @ lora_B).reshape(*grad_y.shape[:-1], lora_B.shape[1])] if output_mask[0] else []
        if output_mask[1]:
            results.append(rows.T @ xa.reshape(count(xa.shape[:-1]), xa.shape[-1]))
        return results

    return Call(op("lora_expand_backward"), values, _backward_oracle(formula, "grad_y"))


@maker
def lora_dropout_mask(choices: Choices) -> Call:
    values = {
        "seed": Source(f"torch.full((), {choices.pick(SEEDS)}, dtype=torch.int64)"),
        "num_tokens": literal(choices.pick(TOKENS)),
        "in_features": literal(choices.pick(SIZES)),
        "dropout_p": literal(choices.pick(PROBABILITIES)),
    }

    def oracle(before, result, after):
        rows, columns, p = int(before["num_tokens"]), int(before["in_features"]), float(before["dropout_p"])
        if max(rows, columns, rows * columns) > 1 << 22:
            raise CannotTell
        keep = reference.dropout_keep(int(before["seed"]), rows, columns, p)
        if not torch.equal(reference.unpack_mask(result, columns), keep):
            raise WrongResult("the mask is not this seed's")

    return Call(op("lora_dropout_mask"), values, oracle)
