"""Fuzzes the compiled ops and lora_ext.functional; half of the calls are valid.

A valid call is made from the names of the arguments, which mean the same in every function. The oracles compute in
float64.
"""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor

from lora_ext import functional, reference
from lora_ext._load import op_named

from . import ops_merge, planted
from .calls import Call
from .cases import CannotTell, WrongResult
from .choices import Choices
from .compare import against_formula, tensors_in
from .mutations import mutate
from .values import (
    FUNCTIONS,
    IN_PLACE,
    OPS,
    RANKS,
    SCALINGS,
    ListValue,
    Source,
    TensorValue,
    Value,
    acc_name,
    literal,
    tensor,
)

SIZES = (3, 1, 2, 0, 5, 8, 16, 17, 31, 32, 33, 64, 65, 70, 127, 130, 257)
TOKENS = (3, 1, 2, 0, 4, 8, 9, 17, 32, 33, 40, 65, 97)
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
PROBABILITIES = (0.0, 0.5, 0.1, 2.0**-17, 2.0**-16, 1 - 2.0**-16, 0.9999999)
_SEEDS = (0, 1, -1, 2**63 - 1, -(2**63), 12345)
_GROUP_RANKS = (2, 1, 3, 4, 0, 8, 17, 33)

# --- valid calls ------------------------------------------------------------------------------------------------------

_PLURALS = {"weight": "weights", "bias": "biases", "lora_A": "lora_As", "lora_B": "lora_Bs"}
_PLURALS |= {"scaling": "scalings", "y": "bases", "grad_y": "grad_ys"}
_SINGULAR = {plural: name for name, plural in _PLURALS.items()}


@dataclass
class _Sizes:
    """The sizes and dtypes of a call; ``layers`` has out_features and rank of each layer that shares x."""

    lead: tuple[int, ...]
    size_in: int
    layers: list[tuple[int, int]]
    dtype: str
    factors: str
    wants: list[bool]
    dropout_p: float

    @property
    def tokens(self) -> int:
        return math.prod(self.lead)


def _tokens_shape(choices: Choices) -> tuple[int, ...]:
    leading = (choices.choice(TOKENS),)
    if choices.chance(20):
        return (*leading, choices.choice((1, 2, 0, 3)))
    return () if choices.chance(5) else leading


def _maybe(choices: Choices, value: Value, wanted: bool = False) -> Value:
    """Makes an argument that the op reads if it is ``wanted``, and that can otherwise be None."""
    return value if wanted or choices.chance(50) else Source("None")


def _of_layer(choices: Choices, name: str, sizes: _Sizes, layer: tuple[int, int], function: str) -> Value:
    """Makes an argument that each of several layers has."""
    out, rank = layer
    if name == "bias":
        return _maybe(choices, tensor(choices, (out,), sizes.dtype))
    if name == "scaling":
        return literal(choices.choice((*SCALINGS, -1.0) if "delta" in function else SCALINGS))
    shapes = {"weight": (out, sizes.size_in), "lora_A": (rank, sizes.size_in), "lora_B": (out, rank)}
    shape = shapes.get(name, (*sizes.lead, out))
    layouts = {"layouts": IN_PLACE} if name == "y" and function.endswith("_") else {}
    return tensor(choices, shape, sizes.factors if "lora" in name else sizes.dtype, **layouts)


def _of_call(choices: Choices, name: str, sizes: _Sizes, function: str, rank: int) -> Value:
    """Makes an argument that a call has once."""
    in_shape, p = (*sizes.lead, sizes.size_in), sizes.dropout_p
    if name in ("x", "base"):
        is_out = name == "base" and function.endswith("expand")
        return tensor(choices, (*sizes.lead, sizes.layers[0][0]) if is_out else in_shape, sizes.dtype)
    if name in ("xa", "grad_xa"):
        lead = sizes.lead if "shrink" in function or "expand" in function else (sizes.tokens,)
        return tensor(choices, (*lead, rank), acc_name(sizes.dtype))
    if name == "mask":
        return TensorValue((sizes.tokens, (sizes.size_in + 63) // 64 * 8), "uint8", choices.randrange(1000), high=256)
    if name == "seed":
        shape = choices.choice(("()", "(1,)", "(1, 1)"))
        value = Source(f"torch.full({shape}, {choices.choice(_SEEDS)}, dtype=torch.int64)")
        return value if p > 0 or "mask" in function or choices.chance(20) else Source("None")
    known = {"dropout_p": p, "num_tokens": sizes.tokens, "in_features": sizes.size_in}
    return ListValue([*map(literal, sizes.wants)]) if name == "output_mask" else literal(known[name])


def _groups(choices: Choices, sizes: _Sizes) -> dict[str, Value]:
    """Makes the arguments that say which adapters there are, and which row uses which."""
    slots = [(choices.choice((2, 1, 3, 0)),) if choices.chance(50) else () for _ in range(2)]
    entries = [(count, choices.choice(_GROUP_RANKS)) for count in slots]
    ranks = [rank for slots, rank in entries for _ in range(slots[0] if slots else 1)]
    size_in, size_out = sizes.size_in, sizes.layers[0][0]
    shape = sizes.lead[: choices.choice((len(sizes.lead), 0, 1))]
    step = choices.choice((3, 1, 7, 0))
    groups = f"(torch.arange({math.prod(shape)}) * {step} % {len(ranks) + 1} - 1).reshape({shape})"
    used = [choices.randrange(rank + 1) for rank in ranks]
    scalings = [choices.choice((*SCALINGS, -1.0)) for _ in ranks]
    return {
        "lora_As": ListValue([tensor(choices, (*slots, rank, size_in), sizes.factors) for slots, rank in entries]),
        "lora_Bs": ListValue([tensor(choices, (*slots, size_out, rank), sizes.factors) for slots, rank in entries]),
        "group_of_row": Source(groups),
        "scalings": Source(f"torch.tensor({scalings}, dtype=torch.float64)"),
        "ranks": Source(f"torch.tensor({used}, dtype=torch.int64)" if choices.chance(50) else "None"),
    }


def _with_history(choices: Choices, values: dict[str, Value]) -> dict[str, Value]:
    """Lets some of the arguments require gradients."""
    if choices.chance(40):
        for name, value in values.items():
            for entry in value.entries if isinstance(value, ListValue) else [value]:
                if name != "y" and isinstance(entry, TensorValue) and choices.chance(60):
                    entry.steps.append(choices.choice(("{t}.requires_grad_()", "{t}.requires_grad_() * 1")))
    return values


def _parameters(function: str) -> dict[str, bool]:
    """Returns the names of the arguments, and whether None is one of their values."""
    name = function.rpartition(".")[2]
    if function.startswith(OPS):
        return {a.name: isinstance(a.type, torch.OptionalType) for a in op_named(name)._schema.arguments}
    return dict.fromkeys(inspect.signature(getattr(functional, name)).parameters, False)


def _make(choices: Choices, function: str) -> Call:
    name, parameters = function.rpartition(".")[2], _parameters(function)
    several = choices.choice((2, 1, 3, 8)) if "siblings" in name else 1
    layers = [(choices.choice(SIZES), choices.choice(RANKS)) for _ in range(several)]
    dropout_p = choices.choice(PROBABILITIES) if choices.chance(40) or name == "lora_dropout_mask" else 0.0
    lead, size_in, dtypes = _tokens_shape(choices), choices.choice(SIZES), choices.choice(DTYPES)
    is_grouped = "grouped" in name
    gradients = 5 if is_grouped else 2 if "shrink" in name or "expand" in name else 3
    wants = [not choices.chance(30) for _ in range(gradients)]
    sizes = _Sizes(lead, size_in, layers, *dtypes, wants, dropout_p)
    values = _groups(choices, sizes) if is_grouped else {}
    rank = max(e.shape[-2] for e in values["lora_As"].entries) if is_grouped else sum(rank for _, rank in layers)
    needed = {"x": any(wants[1:3]) if is_grouped else wants[1], "xa": any(wants[3:]) if is_grouped else wants[-1]}
    needed |= {"mask": dropout_p > 0, "seed": True}
    for parameter, is_optional in parameters.items():
        if parameter in values:
            continue
        if parameter in _SINGULAR:
            entries = [_of_layer(choices, _SINGULAR[parameter], sizes, layer, name) for layer in layers]
            values[parameter] = ListValue(entries)
        elif parameter in _PLURALS:
            value = _of_layer(choices, parameter, sizes, layers[0], name)
            values[parameter] = _maybe(choices, value) if parameter == "weight" and is_optional else value
        else:
            value = _of_call(choices, parameter, sizes, name, rank)
            values[parameter] = _maybe(choices, value, needed.get(parameter, False)) if is_optional else value
    values = {parameter: values[parameter] for parameter in parameters}
    # Base layers that were called have no weights; only their forward gets bases.
    if "bases" in values and "weights" in values and choices.chance(50):
        values["bases"] = ListValue([])
    elif "weights" in values and function.startswith(OPS) and choices.chance(50 if "backward" in name else 100):
        values |= {other: ListValue([]) for other in ("weights", "biases") if other in values}
    oracle = ORACLES.get(name) if function.startswith(FUNCTIONS) else None
    if "backward" in name or name == "lora_dropout_mask":
        return Call(function, values, oracle)
    changes = ("y",) if name.endswith("_") else ()
    return Call(function, _with_history(choices, values), oracle, changes, _results(function))


def _results(function: str) -> str:
    """Returns the source of the list of results that have gradients."""
    name = function.rpartition(".")[2]
    if name.endswith("_"):
        return "[y]"
    if function.startswith(FUNCTIONS):
        return "result" if "siblings" in name else "[result]"
    returns = op_named(name)._schema.returns
    first = "result[0]" if len(returns) > 1 else "result"
    return first if isinstance(returns[0].type, torch.ListType) else f"[{first}]"


# --- oracles: of lora_ext.functional, whose results are those of the ops ----------------------------------------------


def _forward(formula: Callable[..., list[Tensor]], before: Any, result: Any, after: Any) -> None:
    """Checks the results of a function and its gradients."""
    if before.get("dropout_p", 0.0) > 0 and before.get("seed") is None:
        raise CannotTell  # the function drew the mask
    if "y" in after and result is not after["y"]:
        raise WrongResult("the result is not y")
    after = {name: value for name, value in after.items() if name != "y"}
    against_formula(formula, before, tensors_in(result), after, before["x"].dtype)


def _layers_formula(**arguments: Any) -> list[Tensor]:
    # Lists of the arguments of one layer, as several have them.
    a = {_PLURALS.get(name, name): [value] if name in _PLURALS else value for name, value in arguments.items()}
    bases = a.pop("bases", None)
    if not bases:
        return list(reference.lora_linear_siblings(**a))
    layers = zip(bases, a["lora_As"], a["lora_Bs"], a["scalings"], strict=True)
    rest = a.get("dropout_p", 0.0), a.get("seed")
    return [base + reference.lora_delta(a["x"], *layer, *rest) for base, *layer in layers]


def _grouped_formula(x, y=None, weight=None, bias=None, **arguments) -> list[Tensor]:
    base = torch.nn.functional.linear(x, weight, bias) if y is None else y
    return [base + reference.lora_grouped(x, **arguments)]


_LAYERS = ("lora_linear", "lora_linear_siblings", "lora_delta_", "lora_delta_siblings")
ORACLES: dict[str, Callable[..., None]] = {
    **dict.fromkeys(_LAYERS, partial(_forward, _layers_formula)),
    **dict.fromkeys(("lora_grouped_", "lora_grouped_linear"), partial(_forward, _grouped_formula)),
}


# --- functions with arguments of their own ----------------------------------------------------------------------------


def _bottleneck(choices: Choices, function: str) -> Call:
    dtype, factors = choices.choice(DTYPES)
    tokens, size_in, size = choices.choice(TOKENS), choices.choice(SIZES), choices.choice(RANKS)
    has_residual = choices.chance(50)
    size_out = choices.choice(SIZES) if has_residual else size_in
    up_dtype = choices.choice((factors, "float32", "bfloat16", "float16", "float64"))
    values = {
        "x": tensor(choices, (tokens, size_in), dtype),
        "down_weight": tensor(choices, (size, size_in), factors),
        "down_bias": _maybe(choices, tensor(choices, (size,), factors)),
        "up_weight": tensor(choices, (size_out, size), up_dtype),
        "up_bias": _maybe(choices, tensor(choices, (size_out,), up_dtype)),
        "activation": literal(choices.choice(("relu", "identity", "gelu", "silu"))),
        "residual": tensor(choices, (tokens, size_out), dtype) if has_residual else Source("None"),
    }

    def sizes(activation="", **a):  # every activation is at most its argument's size plus an eighth
        return [1.2 * reference.bottleneck(activation="identity", **a)]

    def oracle(before, result, after):
        formula = lambda **a: [reference.bottleneck(**a)]  # noqa: E731
        against_formula(formula, before, [result], after, before["x"].dtype, sizes)

    return Call(function, _with_history(choices, values), oracle, differentiated="[result]")


def _draw_seed(choices: Choices, function: str) -> Call:
    def oracle(before, result, after):
        if result.dtype != torch.int64 or result.shape != () or int(result) < 0:
            raise WrongResult(f"the seed is {result}")

    device = choices.choice(('torch.device("cpu")', '"cpu"', 'torch.device("meta")'))
    return Call(function, {"device": Source(device)}, None if "meta" in device else oracle)


# --- cases ------------------------------------------------------------------------------------------------------------

_REGISTERED = {s.name for s in torch._C._jit_get_all_schemas() if s.name.startswith("lora_ext::")}
_NAMES = [OPS + name.removeprefix("lora_ext::") for name in sorted(_REGISTERED)]
_NAMES += [FUNCTIONS + name for name in functional.__all__]
MAKERS: dict[str, Callable[[Choices, str], Call]] = dict.fromkeys(_NAMES, _make) | ops_merge.MAKERS
MAKERS |= {f"{FUNCTIONS}bottleneck": _bottleneck, f"{FUNCTIONS}draw_seed": _draw_seed}
"""By the dotted name of the function."""

# These refuse without a kernel, or take no tensor: few calls are enough.
_SELDOM = (f"{OPS}lora_merge_check", f"{FUNCTIONS}draw_seed")
_OFTEN = [name for name in MAKERS for _ in range(1 if name in _SELDOM else 6)]


def make(choices: Choices, name: str = "") -> Call:
    """Makes a call of a function whose dotted name ends with ``name``, or of any."""
    if name in planted.KINDS:
        return planted.make(choices, name)
    function = choices.choice([found for found in _OFTEN if f".{found}".endswith(f".{name}")] if name else _OFTEN)
    call = MAKERS[function](choices, function)
    if choices.chance(50):
        call.arguments, call.mutated = mutate(choices, call.arguments)
    call.repeat = choices.chance(10)
    return call
