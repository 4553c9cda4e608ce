"""Fuzzes the compiled ops and lora_ext.functional; half of the calls are valid.

Valid calls are those of tests/support/op_table.py with other sizes, dtypes and options. The oracles compute in float64.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from support.op_table import HAVE_KERNELS, OF_BASES, OPS, REGISTERED, good_call, good_function_call, op_named
from torch import Tensor

from lora_ext import functional, reference

from . import ops_merge, planted
from .calls import Call
from .cases import CannotTell, WrongResult
from .choices import Choices
from .compare import against_formula, tensors_in
from .tensors import IN_PLACE, RANKS, SCALINGS, history, mutations, oddities

OP, FUNCTION = "torch.ops.lora_ext.", "lora_ext.functional."
SIZES = (3, 1, 2, 0, 5, 8, 16, 17, 31, 32, 33, 64, 65, 70, 127, 130, 257)
TOKENS = (3, 1, 2, 0, 4, 8, 9, 17, 32, 33, 40, 65, 97)
F32, BF16, F64, F16 = torch.float32, torch.bfloat16, torch.float64, torch.float16
# Of x and of the factors.
DTYPES = ((F32, F32), (BF16, BF16), (F64, F64), (F16, F16), (BF16, F32), (F16, F32), (F32, BF16), (F32, F64))
DTYPES += ((F64, F32), (BF16, F16))
PROBABILITIES = (0.0, 0.5, 0.1, 2.0**-17, 2.0**-16, 1 - 2.0**-16, 0.9999999)
_SEEDS = (0, 1, -1, 2**63 - 1, -(2**63), 12345)
_GROUP_RANKS = (2, 1, 3, 4, 0, 8, 17, 33)
Arguments = dict[str, Any]

# --- valid calls ------------------------------------------------------------------------------------------------------


def _leading(choices: Choices) -> tuple[int, ...]:
    leading = (choices.choice(TOKENS),)
    return (*leading, choices.choice((1, 2, 0, 3))) if choices.chance(20) else leading


def _groups(choices: Choices, leading: tuple[int, ...]) -> Arguments:
    """Draws which adapters there are, and which row uses which."""
    entries = [choices.choice(_GROUP_RANKS) for _ in range(2)]
    entries = [(choices.choice((2, 1, 3, 0)), rank) if choices.chance(50) else rank for rank in entries]
    count = sum(entry[0] if isinstance(entry, tuple) else 1 for entry in entries)
    rows = torch.empty(leading[: choices.choice((len(leading), 0, 1))])
    groups = torch.arange(rows.numel()) * choices.choice((3, 1, 7, 0)) % (count + 1) - 1
    return {"entries": entries, "groups": groups.reshape(rows.shape), "ranks": choices.chance(50)}


def _arguments(choices: Choices, function: str) -> Arguments:
    name, leading = function.rpartition(".")[2], _leading(choices)
    in_features = choices.choice(SIZES)
    layers = [(choices.choice(SIZES), choices.choice(RANKS)) for _ in range(choices.choice((2, 1, 3, 8)))]
    options = {"dtypes": choices.choice(DTYPES), "leading": leading}
    if "grouped" in name:
        options |= _groups(choices, leading) | {"features": (in_features, layers[0][0])}
    elif name != "lora_dropout_mask":
        options["size"] = ((0, in_features), layers) if "siblings" in name else (0, in_features, *layers[0])
    if function.startswith(FUNCTION):
        return good_function_call(name, **options)
    return good_call(name + OF_BASES * (name + OF_BASES in HAVE_KERNELS and choices.chance(50)), **options)


def _maybe(choices: Choices, value: Any) -> Any:
    return value if choices.chance(50) else None


def _make(choices: Choices, function: str) -> Call:
    name, arguments = function.rpartition(".")[2], _arguments(choices, function)
    p = choices.choice(PROBABILITIES) if choices.chance(40) or name == "lora_dropout_mask" else 0.0
    scalings = (*SCALINGS, -1.0) if "delta" in name or "grouped" in name else SCALINGS
    seed = torch.full(choices.choice(((), (1,), (1, 1))), choices.choice(_SEEDS))
    drawn = {
        "dropout_p": p,
        "seed": seed if p > 0 or "mask" in name or choices.chance(20) else None,
        "scaling": choices.choice(scalings),
        "scalings": [choices.choice(scalings) for _ in arguments.get("scalings", ())],
        "output_mask": [not choices.chance(30) for _ in arguments.get("output_mask", ())],
        "num_tokens": choices.choice(TOKENS),
        "in_features": choices.choice(SIZES),
    }
    if "grouped" in name:
        drawn["scalings"] = torch.tensor(drawn["scalings"], dtype=F64)
    arguments |= {argument: value for argument, value in drawn.items() if argument in arguments}
    wants, factors = drawn["output_mask"], len(arguments.get("lora_As", [None]))
    # The gradients of the factors read these.
    needed = {"x": any(wants[1 : 1 + factors]), "xa": any(wants[-factors:]), "mask": p > 0, "seed": True}
    optional = ["bias", "ranks"]
    if function.startswith(OP):
        optional = [a.name for a in op_named(name)._schema.arguments if isinstance(a.type, torch.OptionalType)]
    for argument in optional:
        if not needed.get(argument) and argument in arguments:
            arguments[argument] = _maybe(choices, arguments[argument])
    if "biases" in arguments:
        arguments["biases"] = [_maybe(choices, bias) for bias in arguments["biases"]]
    if "backward" in name or name == "lora_dropout_mask":
        return Call(function, arguments)
    oracle = partial(_check, OPS[name].plain) if function.startswith(FUNCTION) else None
    return Call(function, arguments, oracle, ("y",) if name.endswith("_") else (), partial(_differentiated, function))


def _differentiated(function: str, result: Any, arguments: Arguments) -> list[Tensor]:
    """Returns the results that have gradients; ops also return what their backward reads."""
    if function.endswith("_"):
        return [arguments["y"]]
    saves = function.startswith(OP) and isinstance(result, tuple)
    return tensors_in(result[0] if saves else result)


def _check(formula: Callable[..., list[Tensor]], before: Arguments, result: Any, after: Arguments) -> None:
    """Checks the results of a function and its gradients."""
    if before.get("dropout_p", 0.0) > 0 and before.get("seed") is None:
        raise CannotTell  # the function drew the mask
    if "y" in after and result is not after["y"]:
        raise WrongResult("the result is not y")
    after = {name: value for name, value in after.items() if name != "y"}
    against_formula(formula, before, tensors_in(result), after, before["x"].dtype)


# --- functions with arguments of their own ----------------------------------------------------------------------------


def _bottleneck(choices: Choices, function: str) -> Call:
    size = (0, choices.choice(SIZES), choices.choice(SIZES), choices.choice(RANKS))
    dtypes, leading, residual = choices.choice(DTYPES), (choices.choice(TOKENS),), choices.chance(50)
    activation = choices.choice(("relu", "identity", "gelu", "silu"))
    call = OPS["bottleneck"].small(dtypes, leading, size, activation=activation, residual=residual).call
    for name in ("down_bias", "up_bias"):
        call[name] = _maybe(choices, call[name])
    up_dtype = choices.choice((dtypes[1], F32, BF16, F16, F64))
    call |= {name: call[name].to(up_dtype) for name in ("up_weight", "up_bias") if call[name] is not None}

    def sizes(activation="", **a):  # every activation is at most its argument's size plus an eighth
        return [1.2 * reference.bottleneck(activation="identity", **a)]

    def oracle(before, result, after):
        against_formula(OPS["bottleneck"].plain, before, [result], after, before["x"].dtype, sizes)

    arguments = {"residual": None} | call
    return Call(function, arguments, oracle, differentiated=partial(_differentiated, function))


def _draw_seed(choices: Choices, function: str) -> Call:
    def oracle(before, result, after):
        if result.dtype != torch.int64 or result.shape != () or int(result) < 0:
            raise WrongResult(f"the seed is {result}")

    device = choices.choice((torch.device("cpu"), "cpu", torch.device("meta")))
    return Call(function, {"device": device}, oracle if "cpu" in str(device) else None)


# --- cases ------------------------------------------------------------------------------------------------------------

_NAMES = [OP + name for name in REGISTERED] + [FUNCTION + name for name in functional.__all__]
MAKERS: dict[str, Callable[[Choices, str], Call]] = dict.fromkeys(_NAMES, _make)
"""By the dotted name of the function."""
MAKERS |= {OP + name: maker for name, maker in ops_merge.OPS.items()}
MAKERS |= {FUNCTION + name: maker for name, maker in ops_merge.FUNCTIONS.items()}
MAKERS |= {f"{FUNCTION}bottleneck": _bottleneck, f"{FUNCTION}draw_seed": _draw_seed}

# These refuse without a kernel, or take no tensor: few calls are enough.
_SELDOM = (f"{OP}lora_merge_check", f"{FUNCTION}draw_seed")
_OFTEN = [name for name in MAKERS for _ in range(1 if name in _SELDOM else 6)]


def make(choices: Choices, name: str = "") -> Call:
    """Makes a call of a function whose dotted name ends with ``name``, or of any."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(choices.randrange(1000))
        if name in planted.KINDS:
            return planted.make(choices, name)
        function = choices.choice([found for found in _OFTEN if f".{found}".endswith(f".{name}")] if name else _OFTEN)
        call = MAKERS[function](choices, function)
        in_place = dict.fromkeys(call.changes, IN_PLACE if "y" in call.changes else (*IN_PLACE, "gaps between rows"))
        steps = oddities(choices, call.arguments, in_place)
        steps += history(choices, call.arguments) if call.differentiated else []
        call.steps = steps + call.steps
        if choices.chance(50):
            call.steps += mutations(choices, call.arguments)
        call.repeat = choices.chance(10)
        return call
