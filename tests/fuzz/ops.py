"""Makes valid calls of the ops of layers and of lora_ext.functional, with their oracles in float64."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from lora_ext import reference

from .calls import Call
from .cases import CannotTell, WrongResult
from .choices import Choices
from .compare import against_formula, check_close, rescale, tensors_in
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
_SEEDS = (0, 1, -1, 2**63 - 1, -(2**63), 12345)
IN_PLACE = ("unaligned", "the middle of a storage")  # layouts of tensors that are written to

OPS, FUNCTIONS = "torch.ops.lora_ext.", "lora_ext.functional."
MAKERS: dict[str, Callable[[Choices], Call]] = {}
"""By the dotted name of the function."""


def maker(*prefixes: str, names: Sequence[str] = ()) -> Callable[[Callable], Callable]:
    """Registers a maker of calls, which gets the dotted name of the function, under its own name or these."""

    def register(function: Callable[[Choices, str], Call]) -> Callable[[Choices, str], Call]:
        for name in names or [function.__name__]:
            MAKERS.update({p + name: functools.partial(function, function=p + name) for p in prefixes})
        return function

    return register


def acc_name(dtype: str) -> str:
    return "float64" if dtype == "float64" else "float32"


def tokens_shape(choices: Choices) -> tuple[int, ...]:
    leading = (choices.pick(TOKENS),)
    if choices.chance(20):
        return (*leading, choices.pick((1, 2, 0, 3)))
    return () if choices.chance(5) else leading


def rows_of(x: Tensor) -> Tensor:
    return x.reshape(math.prod(x.shape[:-1]), x.shape[-1])


def dropout(choices: Choices) -> dict[str, Value]:
    p = choices.pick(PROBABILITIES) if choices.chance(40) else 0.0
    shape = choices.pick(("()", "(1,)", "(1, 1)"))
    seed = f"torch.full({shape}, {choices.pick(_SEEDS)}, dtype=torch.int64)"
    return {"dropout_p": literal(p), "seed": Source(seed if p > 0 or choices.chance(20) else "None")}


def drawn_seed(before: Mapping[str, Any]) -> None:
    """Raises CannotTell if the function drew the mask."""
    if before.get("dropout_p", 0.0) > 0 and before.get("seed") is None:
        raise CannotTell


def maybe(choices: Choices, value: Value, wanted: bool = False) -> Value:
    """Makes an argument that the op reads if it is ``wanted``, and that can otherwise be None."""
    return value if wanted or choices.chance(50) else Source("None")


def with_history(choices: Choices, values: dict[str, Value]) -> dict[str, Value]:
    """Lets some of the arguments require gradients."""
    if choices.chance(40):
        for name, value in values.items():
            for entry in value.entries if isinstance(value, ListValue) else [value]:
                if name != "y" and isinstance(entry, TensorValue) and choices.chance(60):
                    entry.steps.append(choices.pick(("{t}.requires_grad_()", "{t}.requires_grad_() * 1")))
    return values


# --- layers, one or several that share x ------------------------------------------------------------------------------

_PLURALS = {"weight": "weights", "bias": "biases", "lora_A": "lora_As", "lora_B": "lora_Bs"}
_PLURALS |= {"scaling": "scalings", "y": "bases", "grad_y": "grad_ys"}
_LAYERS = ("lora_linear", "lora_linear_siblings", "lora_delta_", "lora_delta_siblings")


def _listed(arguments: Mapping[str, Any]) -> dict[str, Any]:
    """Makes lists of the arguments of one layer, as several have them."""
    return {_PLURALS.get(name, name): [value] if name in _PLURALS else value for name, value in arguments.items()}


def _named(function: str, values: dict[str, list[Value]]) -> dict[str, Value]:
    """Returns lists of values for several layers, or one value each for one layer."""
    if "siblings" in function:
        return {_PLURALS[name]: ListValue(entries) for name, entries in values.items()}
    return {name: entries[0] for name, entries in values.items()}


def _layer_sizes(choices: Choices, function: str) -> list[tuple[int, int]]:
    """Picks out_features and rank of each layer."""
    count = choices.pick((2, 1, 3, 8)) if "siblings" in function else 1
    return [(choices.pick(SIZES), choices.pick(RANKS)) for _ in range(count)]


@maker(OPS, FUNCTIONS, names=_LAYERS)
def _forward(choices: Choices, function: str) -> Call:
    is_delta, in_place = "delta" in function, function.endswith("_")
    dtype, factors = choices.pick(DTYPES)
    lead, size_in, layers = tokens_shape(choices), choices.pick(SIZES), _layer_sizes(choices, function)
    layouts = {"layouts": IN_PLACE} if in_place else {}
    bases = {"y": [tensor(choices, (*lead, out), dtype, **layouts) for out, _ in layers]}
    frozen = {
        "weight": [tensor(choices, (out, size_in), dtype) for out, _ in layers],
        "bias": [maybe(choices, tensor(choices, (out,), dtype)) for out, _ in layers],
    }
    update = {
        "lora_A": [tensor(choices, (rank, size_in), factors) for _, rank in layers],
        "lora_B": [tensor(choices, (out, rank), factors) for out, rank in layers],
        "scaling": [literal(choices.pick((*SCALINGS, -1.0) if is_delta else SCALINGS)) for _ in layers],
    }
    x = {"x": tensor(choices, (*lead, size_in), dtype)}
    first, second = (_named(function, bases), x) if is_delta else (x, _named(function, frozen))
    values = {**first, **second, **_named(function, update), **dropout(choices)}

    def oracle(before: Mapping[str, Any], result: Any, after: Mapping[str, Any]) -> None:
        drawn_seed(before)
        ys = after["y"] if in_place else result
        if function.startswith(OPS):
            *first, xa, mask = result
            ys = ys if in_place else first[0]
            _check_saved(_listed(before), xa, mask)
        elif in_place and result is not ys:
            raise WrongResult("the result is not y")
        after = {name: value for name, value in after.items() if name != "y"}
        against_formula(_forward_formula, before, tensors_in(ys), after, before["x"].dtype)

    whole = function.startswith(FUNCTIONS)
    outputs = "[y]" if in_place else "result" if whole else "result[0]"
    return Call(
        function,
        with_history(choices, values),
        oracle,
        changes=("y",) if in_place else (),
        differentiated=outputs if "siblings" in function or in_place else f"[{outputs}]",
    )


def _forward_formula(**arguments: Any) -> list[Tensor]:
    a = _listed(arguments)
    bases = a.pop("bases", None)
    if bases is None:
        return list(reference.lora_linear_siblings(**a))
    layers = zip(bases, a["lora_As"], a["lora_Bs"], a["scalings"], strict=True)
    rest = a.get("dropout_p", 0.0), a.get("seed")
    return [base + reference.lora_delta(a["x"], *layer, *rest) for base, *layer in layers]


def _check_saved(seen: Mapping[str, Any], xa: Tensor, mask: Tensor) -> None:
    """Checks the tensors that a forward saves for its backward: xa and the mask."""
    x, dropout_p = seen["x"].detach(), seen.get("dropout_p", 0.0)
    has_mask = reference.dropout_threshold(dropout_p) > 0
    rows = rows_of(x).double()
    if has_mask:
        keep = reference.dropout_keep(int(seen["seed"]), *rows.shape, dropout_p)
        if not torch.equal(reference.unpack_mask(mask, rows.shape[1]), keep):
            raise WrongResult("the mask is not this seed's")
        rows = rows * keep
    elif mask.numel():
        raise WrongResult(f"there is a mask of {mask.numel()} bytes without dropout")
    parts = xa.detach().split([A.shape[0] for A in seen["lora_As"]], dim=1)
    for i, (part, A, scaling) in enumerate(zip(parts, seen["lora_As"], seen["scalings"], strict=True)):
        A, scale = A.detach().double(), float(scaling) * rescale(dropout_p)
        magnitude = abs(scale) * (rows.abs() @ A.abs().T)
        check_close(f"xa of layer {i}", part, scale * (rows @ A.T), magnitude, rows.shape[1], x.dtype, not has_mask)


def mask_value(choices: Choices, tokens: int, size_in: int) -> TensorValue:
    return TensorValue((tokens, (size_in + 63) // 64 * 8), "uint8", choices.integer(1000), low=0, high=256)


def wanted(choices: Choices, count: int) -> list[bool]:
    """Picks which gradients are requested."""
    return [not choices.chance(30) for _ in range(count)]


@maker(OPS, names=[f"{name.rstrip('_')}_backward" for name in _LAYERS])
def _backward(choices: Choices, function: str) -> Call:
    dtype, factors = choices.pick(DTYPES)
    lead, size_in, layers = tokens_shape(choices), choices.pick(SIZES), _layer_sizes(choices, function)
    tokens, p = math.prod(lead), choices.pick(PROBABILITIES) if choices.chance(40) else 0.0
    wants = wanted(choices, 3)
    weights = {"weight": [tensor(choices, (out, size_in), dtype) for out, _ in layers]}
    matrices = {
        "lora_A": [tensor(choices, (rank, size_in), factors) for _, rank in layers],
        "lora_B": [tensor(choices, (out, rank), factors) for out, rank in layers],
    }
    values = {
        **_named(function, {"grad_y": [tensor(choices, (*lead, out), dtype) for out, _ in layers]}),
        "x": maybe(choices, tensor(choices, (*lead, size_in), dtype), wants[1]),
        **_named(function, matrices if "delta" in function else weights | matrices),
        "xa": maybe(choices, tensor(choices, (tokens, sum(r for _, r in layers)), acc_name(dtype)), wants[2]),
        "mask": maybe(choices, mask_value(choices, tokens, size_in), p > 0),
        **_named(function, {"scaling": [literal(choices.pick(SCALINGS)) for _ in layers]}),
        "dropout_p": literal(p),
        "output_mask": ListValue([*map(literal, wants)]),
    }

    def oracle(before: Mapping[str, Any], result: Any, after: Mapping[str, Any]) -> None:
        dtype = tensors_in(next(iter(before.values())))[0].dtype
        against_formula(lambda **a: _backward_formula(**_listed(a)), before, tensors_in(list(result)), {}, dtype)

    return Call(function, values, oracle)


def _backward_formula(
    grad_ys, x, lora_As, lora_Bs, xa, mask, scalings, dropout_p, output_mask, weights=None
) -> list[Tensor]:
    """Computes the requested grad_x, grad_As and grad_Bs in float64."""
    want_x, want_A, want_B = output_mask
    rows, size_in = [rows_of(g) for g in grad_ys], lora_As[0].shape[1]
    has_mask = reference.dropout_threshold(dropout_p) > 0 and (want_x or want_A)
    keep = reference.unpack_mask(mask, size_in).double() if has_mask else 1.0
    grad_xas = [s * rescale(dropout_p) * (g @ B) for g, B, s in zip(rows, lora_Bs, scalings, strict=True)]
    results = []
    if want_x:
        grad_x = sum(keep * (g @ A) for g, A in zip(grad_xas, lora_As, strict=True))
        if weights is not None:
            grad_x = grad_x + sum(g @ W for g, W in zip(rows, weights, strict=True))
        results.append(grad_x.reshape(*grad_ys[0].shape[:-1], size_in))
    if want_A:
        results += [g.T @ (rows_of(x) * keep) for g in grad_xas]
    if want_B:
        parts = xa.split([A.shape[0] for A in lora_As], dim=1)
        results += [g.T @ part for g, part in zip(rows, parts, strict=True)]
    return results


# --- the halves of an update, and the rest ----------------------------------------------------------------------------


@maker(OPS, names=["lora_shrink", "lora_expand"])
def _half(choices: Choices, function: str) -> Call:
    dtype, factors = choices.pick(DTYPES)
    lead, size, rank = tokens_shape(choices), choices.pick(SIZES), choices.pick(RANKS)
    if function.endswith("shrink"):
        values = {"x": tensor(choices, (*lead, size), dtype), "lora_A": tensor(choices, (rank, size), factors)}
    else:
        values = {
            "base": tensor(choices, (*lead, size), dtype),
            "xa": tensor(choices, (*lead, rank), acc_name(dtype)),
            "lora_B": tensor(choices, (size, rank), factors),
            "bias": maybe(choices, tensor(choices, (size,), dtype)),
        }

    def expanded(base, xa, lora_B, bias=None):
        y = base + xa.reshape(*base.shape[:-1], xa.shape[-1]) @ lora_B.T
        return [y if bias is None else y + bias]

    def oracle(before, result, after):
        formula = (lambda x, lora_A: [x @ lora_A.T]) if "x" in before else expanded
        against_formula(formula, before, [result], after, before["x" if "x" in before else "base"].dtype)

    return Call(function, with_history(choices, values), oracle, differentiated="[result]")


@maker(OPS, names=["lora_shrink_backward", "lora_expand_backward"])
def _half_backward(choices: Choices, function: str) -> Call:
    """Compared through the gradients of the forward."""
    dtype, factors = choices.pick(DTYPES)
    lead, size, rank = tokens_shape(choices), choices.pick(SIZES), choices.pick(RANKS)
    wants = wanted(choices, 2)
    wide, narrow = tensor(choices, (*lead, size), dtype), tensor(choices, (*lead, rank), acc_name(dtype))
    if function.endswith("shrink_backward"):
        base = maybe(choices, tensor(choices, (*lead, size), dtype))
        values = {"grad_xa": narrow, "x": wide, "lora_A": tensor(choices, (rank, size), factors), "base": base}
    else:
        values = {"grad_y": wide, "xa": maybe(choices, narrow, wants[1])}
        values["lora_B"] = tensor(choices, (size, rank), factors)
    return Call(function, values | {"output_mask": ListValue([*map(literal, wants)])})


@maker(OPS)
def lora_dropout_mask(choices: Choices, function: str) -> Call:
    values = {
        "seed": Source(f"torch.full((), {choices.pick(_SEEDS)}, dtype=torch.int64)"),
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

    return Call(function, values, oracle)


@maker(FUNCTIONS)
def bottleneck(choices: Choices, function: str) -> Call:
    dtype, factors = choices.pick(DTYPES)
    tokens, size_in, size = choices.pick(TOKENS), choices.pick(SIZES), choices.pick(RANKS)
    has_residual = choices.chance(50)
    size_out = choices.pick(SIZES) if has_residual else size_in
    up_dtype = choices.pick((factors, "float32", "bfloat16", "float16", "float64"))
    values = {
        "x": tensor(choices, (tokens, size_in), dtype),
        "down_weight": tensor(choices, (size, size_in), factors),
        "down_bias": maybe(choices, tensor(choices, (size,), factors)),
        "up_weight": tensor(choices, (size_out, size), up_dtype),
        "up_bias": maybe(choices, tensor(choices, (size_out,), up_dtype)),
        "activation": literal(choices.pick(("relu", "identity", "gelu", "silu"))),
        "residual": tensor(choices, (tokens, size_out), dtype) if has_residual else Source("None"),
    }

    def sizes(activation="", **a):  # every activation is at most its argument's size plus an eighth
        return [1.2 * reference.bottleneck(activation="identity", **a)]

    def oracle(before, result, after):
        formula = lambda **a: [reference.bottleneck(**a)]  # noqa: E731
        against_formula(formula, before, [result], after, before["x"].dtype, sizes)

    return Call(function, with_history(choices, values), oracle, differentiated="[result]")


@maker(FUNCTIONS)
def draw_seed(choices: Choices, function: str) -> Call:
    def oracle(before, result, after):
        if result.dtype != torch.int64 or result.shape != () or int(result) < 0:
            raise WrongResult(f"the seed is {result}")

    device = choices.pick(('torch.device("cpu")', '"cpu"', 'torch.device("meta")'))
    return Call(function, {"device": Source(device)}, None if "meta" in device else oracle)


def registered_ops() -> list[str]:
    """Returns every registered op of lora_ext."""
    names = {schema.name for schema in torch._C._jit_get_all_schemas() if schema.name.startswith("lora_ext::")}
    return sorted(name.removeprefix("lora_ext::") for name in names)
