"""Makes valid calls of the compiled ops with their oracles: the forwards, and code that all makers share."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from lora_ext import reference

from .calls import Call, Maker
from .choices import Choices
from .compare import WrongResult, against_formula, check_close, rescale
from .values import ListValue, Source, TensorValue, Value, literal, tensor

SIZES = (3, 1, 2, 0, 5, 8, 16, 17, 31, 32, 33, 64, 65, 70, 127, 130, 257)
TOKENS = (3, 1, 2, 0, 4, 8, 9, 17, 32, 33, 40, 65, 97)
RANKS = (2, 1, 3, 4, 8, 11, 16, 17, 33, 70)
DTYPES = (  # of x and of the factors
    ("float32", "float32"),
    ("bfloat16", "bfloat16"),
    ("float64", "float64"),
    ("float16", "float16"),
    ("bfloat16", "float32"),
    ("float16", "float32"),
    ("float32", "bfloat16"),
    ("float32", "float64"),
    ("float64", "float32"),
    ("bfloat16", "float16"),
)
SCALINGS = (1.0, 0.5, 2.0, 0.0, 1e-30, 1e4)
PROBABILITIES = (0.0, 0.5, 0.1, 2.0**-17, 2.0**-16, 1 - 2.0**-16, 0.9999999)
SEEDS = (0, 1, -1, 2**63 - 1, -(2**63), 12345)
AROUND = ("", "torch.no_grad()", "torch.inference_mode()", "torch.autocast('cpu', torch.bfloat16)")
PACKED = ("gaps between rows", "unaligned", "the middle of a storage")  # layouts with unit column stride

OPS: dict[str, Maker] = {}


def maker(function: Callable[[Choices], Call]) -> Callable[[Choices], Call]:
    """Registers a maker of calls under the name of the op."""
    OPS[function.__name__] = function
    return function


def op(name: str) -> str:
    return f"torch.ops.lora_ext.{name}"


def acc_name(dtype: str) -> str:
    return "float64" if dtype == "float64" else "float32"


def tokens_shape(choices: Choices) -> tuple[int, ...]:
    leading = (choices.pick(TOKENS),)
    if choices.chance(20):
        return (*leading, choices.pick((1, 2, 0, 3)))
    return () if choices.chance(5) else leading


def layer_sizes(choices: Choices) -> tuple[tuple[int, ...], int, int, int]:
    """Picks the leading dimensions of x, in_features, out_features and rank."""
    return tokens_shape(choices), choices.pick(SIZES), choices.pick(SIZES), choices.pick(RANKS)


count = math.prod


def dropout(choices: Choices) -> dict[str, Value]:
    p = choices.pick(PROBABILITIES) if choices.chance(40) else 0.0
    shape = choices.pick(("()", "(1,)", "(1, 1)"))
    seed = f"torch.full({shape}, {choices.pick(SEEDS)}, dtype=torch.int64)"
    return {"dropout_p": literal(p), "seed": Source(seed if p > 0 or choices.chance(20) else "None")}


def with_history(choices: Choices, values: dict[str, Value], names: Sequence[str]) -> None:
    """Lets some of the arguments require gradients."""
    if not choices.chance(40):
        return
    for name in names:
        value = values.get(name)
        for entry in value.entries if isinstance(value, ListValue) else [value]:
            if isinstance(entry, TensorValue) and choices.chance(60):
                entry.steps.append(choices.pick(("{t}.requires_grad_()", "{t}.requires_grad_() * 1")))


def _autocast(before: Mapping[str, Any], names: Sequence[str], around: str) -> dict[str, Any]:
    """Returns the arguments that the op receives under autocast."""
    if "autocast" not in around:
        return dict(before)

    def cast(value: Any) -> Any:
        if isinstance(value, Tensor) and value.is_floating_point() and value.dtype != torch.float64:
            return value.detach().to(torch.bfloat16).requires_grad_(value.requires_grad)
        return [cast(entry) for entry in value] if isinstance(value, (list, tuple)) else value

    return {name: cast(value) if name in names else value for name, value in before.items()}


# --- forwards ---------------------------------------------------------------------------------------------------------


def linear_values(choices: Choices) -> dict[str, Value]:
    dtype, factors = choices.pick(DTYPES)
    lead, size_in, size_out, rank = layer_sizes(choices)
    values = {
        "x": tensor(choices, (*lead, size_in), dtype),
        "weight": tensor(choices, (size_out, size_in), dtype),
        "bias": tensor(choices, (size_out,), dtype) if choices.chance(50) else Source("None"),
        "lora_A": tensor(choices, (rank, size_in), factors),
        "lora_B": tensor(choices, (size_out, rank), factors),
        "scaling": literal(choices.pick(SCALINGS)),
        **dropout(choices),
    }
    with_history(choices, values, ("x", "weight", "bias", "lora_A", "lora_B"))
    return values


def check_linear(before, result, after, around="") -> None:
    seen = _autocast(before, ("x", "weight", "bias"), around)

    def formula(**a):
        return [reference.lora_linear(**a)]

    against_formula(formula, seen, [result], after, seen["x"].dtype)


@maker
def lora_linear(choices: Choices) -> Call:
    around = choices.pick(AROUND) if choices.chance(15) else ""

    def oracle(before, result, after):
        y, xa, mask = result
        check_linear(before, y, after, around)
        check_saved(before, [before["lora_A"]], [before["scaling"]], xa, mask, around)

    return Call(op("lora_linear"), linear_values(choices), oracle, around=around, differentiated="result[:1]")


def check_saved(before, lora_As, scalings, xa: Tensor, mask: Tensor, around: str) -> None:
    """Checks the tensors that a forward saves for its backward: xa and the mask."""
    x = _autocast(before, ("x",), around)["x"].detach()
    dropout_p = before.get("dropout_p", 0.0)
    threshold = reference.dropout_threshold(dropout_p)
    rows = x.reshape(count(x.shape[:-1]), x.shape[-1]).double()
    if threshold > 0:
        keep = reference.dropout_keep(int(before["seed"]), *rows.shape, dropout_p)
        if not torch.equal(reference.unpack_mask(mask, rows.shape[1]), keep):
            raise WrongResult("the mask is not this seed's")
        rows = rows * keep
    elif mask.numel():
        raise WrongResult(f"there is a mask of {mask.numel()} bytes without dropout")
    parts = xa.detach().split([A.shape[0] for A in lora_As], dim=1)
    for i, (part, A, scaling) in enumerate(zip(parts, lora_As, scalings, strict=True)):
        A, scale = A.detach().double(), float(scaling) * rescale(dropout_p)
        magnitude = abs(scale) * (rows.abs() @ A.abs().T)
        check_close(f"xa of layer {i}", part, scale * (rows @ A.T), magnitude, rows.shape[1], x.dtype, threshold == 0)


def siblings_values(choices: Choices) -> dict[str, Value]:
    dtype, factors = choices.pick(DTYPES)
    lead, size_in = tokens_shape(choices), choices.pick(SIZES)
    layers = [(choices.pick(SIZES), choices.pick(RANKS)) for _ in range(choices.pick((2, 1, 3, 8)))]
    values = {
        "x": tensor(choices, (*lead, size_in), dtype),
        "weights": ListValue([tensor(choices, (out, size_in), dtype) for out, _ in layers]),
        "biases": ListValue(
            [tensor(choices, (out,), dtype) if choices.chance(50) else Source("None") for out, _ in layers]
        ),
        "lora_As": ListValue([tensor(choices, (rank, size_in), factors) for _, rank in layers]),
        "lora_Bs": ListValue([tensor(choices, (out, rank), factors) for out, rank in layers]),
        "scalings": ListValue([literal(choices.pick(SCALINGS)) for _ in layers]),
        **dropout(choices),
    }
    with_history(choices, values, ("x", "weights", "biases", "lora_As", "lora_Bs"))
    return values


def check_siblings(before, ys, after, around="") -> None:
    seen = _autocast(before, ("x", "weights", "biases"), around)
    against_formula(reference.lora_linear_siblings, seen, list(ys), after, seen["x"].dtype)


@maker
def lora_linear_siblings(choices: Choices) -> Call:
    around = choices.pick(AROUND) if choices.chance(15) else ""

    def oracle(before, result, after):
        ys, xa, mask = result
        check_siblings(before, ys, after, around)
        check_saved(before, before["lora_As"], before["scalings"], xa, mask, around)

    return Call(op("lora_linear_siblings"), siblings_values(choices), oracle, around=around, differentiated="result[0]")


def delta_values(choices: Choices) -> dict[str, Value]:
    dtype, factors = choices.pick(DTYPES)
    lead, size_in, size_out, rank = layer_sizes(choices)
    values = {
        "y": tensor(choices, (*lead, size_out), dtype, ("unaligned", "the middle of a storage")),
        "x": tensor(choices, (*lead, size_in), dtype),
        "lora_A": tensor(choices, (rank, size_in), factors),
        "lora_B": tensor(choices, (size_out, rank), factors),
        "scaling": literal(choices.pick((*SCALINGS, -1.0))),
        **dropout(choices),
    }
    with_history(choices, values, ("x", "lora_A", "lora_B"))
    return values


def check_delta(before, y, after) -> None:
    def formula(y, **a):
        return [y + reference.lora_delta(**a)]

    against_formula(formula, before, [y], {k: v for k, v in after.items() if k != "y"}, before["x"].dtype)


@maker
def lora_delta_(choices: Choices) -> Call:
    def oracle(before, result, after):
        check_delta(before, after["y"], after)
        check_saved(before, [before["lora_A"]], [before["scaling"]], *result, "")

    return Call(op("lora_delta_"), delta_values(choices), oracle, changes=("y",), differentiated="[y]")


def delta_siblings_values(choices: Choices) -> dict[str, Value]:
    dtype, factors = choices.pick(DTYPES)
    lead, size_in = tokens_shape(choices), choices.pick(SIZES)
    layers = [(choices.pick(SIZES), choices.pick(RANKS)) for _ in range(choices.pick((2, 1, 3, 8)))]
    values = {
        "bases": ListValue([tensor(choices, (*lead, out), dtype) for out, _ in layers]),
        "x": tensor(choices, (*lead, size_in), dtype),
        "lora_As": ListValue([tensor(choices, (rank, size_in), factors) for _, rank in layers]),
        "lora_Bs": ListValue([tensor(choices, (out, rank), factors) for out, rank in layers]),
        "scalings": ListValue([literal(choices.pick((*SCALINGS, -1.0))) for _ in layers]),
        **dropout(choices),
    }
    with_history(choices, values, ("bases", "x", "lora_As", "lora_Bs"))
    return values


def check_delta_siblings(before, ys, after) -> None:
    def formula(bases, x, lora_As, lora_Bs, scalings, dropout_p=0.0, seed=None):
        layers = zip(bases, lora_As, lora_Bs, scalings, strict=True)
        return [base + reference.lora_delta(x, *layer, dropout_p, seed) for base, *layer in layers]

    against_formula(formula, before, list(ys), after, before["x"].dtype)


@maker
def lora_delta_siblings(choices: Choices) -> Call:
    def oracle(before, result, after):
        ys, xa, mask = result
        check_delta_siblings(before, ys, after)
        check_saved(before, before["lora_As"], before["scalings"], xa, mask, "")

    return Call(op("lora_delta_siblings"), delta_siblings_values(choices), oracle, differentiated="result[0]")


@maker
def lora_shrink(choices: Choices) -> Call:
    dtype, factors = choices.pick(DTYPES)
    lead, size_in, rank = tokens_shape(choices), choices.pick(SIZES), choices.pick(RANKS)
    values = {"x": tensor(choices, (*lead, size_in), dtype), "lora_A": tensor(choices, (rank, size_in), factors)}
    with_history(choices, values, list(values))

    def oracle(before, result, after):
        against_formula(lambda x, lora_A: [x @ lora_A.T], before, [result], after, before["x"].dtype)

    return Call(op("lora_shrink"), values, oracle, differentiated="[result]")


@maker
def lora_expand(choices: Choices) -> Call:
    dtype, factors = choices.pick(DTYPES)
    lead, size_out, rank = tokens_shape(choices), choices.pick(SIZES), choices.pick(RANKS)
    values = {
        "base": tensor(choices, (*lead, size_out), dtype),
        "xa": tensor(choices, (*lead, rank), acc_name(dtype)),
        "lora_B": tensor(choices, (size_out, rank), factors),
        "bias": tensor(choices, (size_out,), dtype) if choices.chance(50) else Source("None"),
    }
    with_history(choices, values, list(values))

    def formula(base, xa, lora_B, bias=None):
        y = base + xa.reshape(*base.shape[:-1], xa.shape[-1]) @ lora_B.T
        return [y if bias is None else y + bias]

    def oracle(before, result, after):
        against_formula(formula, before, [result], after, before["base"].dtype)

    return Call(op("lora_expand"), values, oracle, differentiated="[result]")


def registered_ops() -> list[str]:
    """Returns every registered op of lora_ext."""
    names = {schema.name for schema in torch._C._jit_get_all_schemas() if schema.name.startswith("lora_ext::")}
    return sorted(name.removeprefix("lora_ext::") for name in names)
