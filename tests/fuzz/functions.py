"""Makes valid calls of lora_ext.functional: one maker for each public name."""

from __future__ import annotations

from collections.abc import Callable

import torch

from lora_ext import functional, reference

from . import ops, ops_grouped, ops_merge
from .calls import Call, CannotTell, Maker
from .choices import Choices
from .compare import WrongResult, against_formula, check_close, same_bits
from .ops import PACKED, RANKS, SCALINGS, SIZES, acc_name
from .ops_merge import MERGE_SIZES
from .values import Source, TensorValue, Value, literal, tensor

FUNCTIONS: dict[str, Maker] = {}


def maker(function: Callable[[Choices], Call]) -> Callable[[Choices], Call]:
    """Registers a maker of calls under the name of the function."""
    FUNCTIONS[function.__name__] = function
    return function


def _function(name: str) -> str:
    return f"lora_ext.functional.{name}"


@maker
def lora_linear(choices: Choices) -> Call:
    around = choices.pick(ops.AROUND) if choices.chance(15) else ""

    def oracle(before, result, after):
        ops.check_linear(_with_drawn_seed(before), result, after, around)

    values = ops.linear_values(choices)
    return Call(_function("lora_linear"), values, oracle, around=around, differentiated="[result]")


@maker
def lora_linear_siblings(choices: Choices) -> Call:
    around = choices.pick(ops.AROUND) if choices.chance(15) else ""

    def oracle(before, result, after):
        ops.check_siblings(_with_drawn_seed(before), result, after, around)

    values = ops.siblings_values(choices)
    return Call(_function("lora_linear_siblings"), values, oracle, around=around, differentiated="result")


@maker
def lora_delta_(choices: Choices) -> Call:
    def oracle(before, result, after):
        if result is not after["y"]:
            raise WrongResult("the result is not y")
        ops.check_delta(_with_drawn_seed(before), result, after)

    values = ops.delta_values(choices)
    return Call(_function("lora_delta_"), values, oracle, changes=("y",), differentiated="[y]")


@maker
def lora_delta_siblings(choices: Choices) -> Call:
    def oracle(before, result, after):
        ops.check_delta_siblings(_with_drawn_seed(before), result, after)

    values = ops.delta_siblings_values(choices)
    return Call(_function("lora_delta_siblings"), values, oracle, differentiated="result")


@maker
def lora_grouped_(choices: Choices) -> Call:
    def oracle(before, result, after):
        if result is not after["y"]:
            raise WrongResult("the result is not y")
        ops_grouped.check_grouped(_with_drawn_seed(before), result, after)

    values = ops_grouped.grouped_values(choices)
    return Call(_function("lora_grouped_"), values, oracle, changes=("y",), differentiated="[y]")


@maker
def lora_grouped_linear(choices: Choices) -> Call:
    def oracle(before, result, after):
        ops_grouped.check_grouped_linear(before, result)

    values = ops_grouped.grouped_linear_values(choices)
    return Call(_function("lora_grouped_linear"), values, oracle, differentiated="[result]")


def _with_drawn_seed(before: dict) -> dict:
    if before.get("dropout_p", 0.0) > 0 and before.get("seed") is None:
        raise CannotTell  # the function drew the mask
    return before


_ACTIVATIONS = ("relu", "identity", "gelu", "silu")


@maker
def bottleneck(choices: Choices) -> Call:
    dtype, factors = choices.pick(ops.DTYPES)
    lead, size_in, size = (choices.pick(ops.TOKENS),), choices.pick(SIZES), choices.pick(RANKS)
    has_residual = choices.chance(50)
    size_out = choices.pick(SIZES) if has_residual else size_in
    up_dtype = choices.pick((factors, "float32", "bfloat16", "float16", "float64"))

    def bias(of: int, dtype: str) -> Value:
        return tensor(choices, (of,), dtype) if choices.chance(50) else Source("None")

    values = {
        "x": tensor(choices, (*lead, size_in), dtype),
        "down_weight": tensor(choices, (size, size_in), factors),
        "down_bias": bias(size, factors),
        "up_weight": tensor(choices, (size_out, size), up_dtype),
        "up_bias": bias(size_out, up_dtype),
        "activation": literal(choices.pick(_ACTIVATIONS)),
        "residual": tensor(choices, (*lead, size_out), dtype) if has_residual else Source("None"),
    }
    ops.with_history(choices, values, [name for name in values if name != "activation"])

    def formula(**a):
        return [reference.bottleneck(**a)]

    def sizes(activation="", **a):  # every activation is at most its argument's size plus an eighth
        return [1.2 * reference.bottleneck(activation="identity", **a)]

    def oracle(before, result, after):
        against_formula(formula, before, [result], after, before["x"].dtype, sizes)

    return Call(_function("bottleneck"), values, oracle, differentiated="[result]")


@maker
def draw_seed(choices: Choices) -> Call:
    def oracle(before, result, after):
        if result.dtype != torch.int64 or result.shape != () or int(result) < 0:
            raise WrongResult(f"the seed is {result}")

    device = choices.pick(('torch.device("cpu")', '"cpu"', 'torch.device("meta")'))
    return Call(_function("draw_seed"), {"device": Source(device)}, None if "meta" in device else oracle)


def _merge_values(choices: Choices) -> dict[str, Value]:
    dtype = choices.pick(("float32", "bfloat16", "float64", "float16"))
    factors = choices.pick((acc_name(dtype), dtype, "float32", "bfloat16", "float64"))
    size_out, size_in, rank = choices.pick(MERGE_SIZES), choices.pick(MERGE_SIZES), choices.pick(RANKS)
    return {
        "weight": tensor(choices, (size_out, size_in), dtype, PACKED),
        "lora_A": tensor(choices, (rank, size_in), factors),
        "lora_B": tensor(choices, (size_out, rank), factors),
        "scaling": literal(choices.pick((*SCALINGS, -1.0))),
    }


@maker
def lora_merge_(choices: Choices) -> Call:
    values = _merge_values(choices) | {"record": literal(not choices.chance(30))}

    def oracle(before, result, after):
        weight, A, B = (before[name].detach().double() for name in ("weight", "lora_A", "lora_B"))
        scaling, dtype = float(before["scaling"]), before["weight"].dtype
        magnitude = weight.abs() + abs(scaling) * (B.abs() @ A.abs())
        ops_merge.no_sharing({name: after[name] for name in before})
        check_close("weight", after["weight"], weight + scaling * (B @ A), magnitude, A.shape[0], dtype)
        if result is not None:
            again = after["weight"].detach().clone()
            functional.lora_unmerge_(again, result)
            if again.numel() and not same_bits(again, before["weight"]):
                raise WrongResult("after merge and unmerge the weight has other bits")

    return Call(_function("lora_merge_"), values, oracle, changes=("weight",))


@maker
def lora_unmerge_(choices: Choices) -> Call:
    values = _merge_values(choices)
    merge = f"lora_ext.functional.lora_merge_(weight, {', '.join(f'_{name}' for name in ('A', 'B'))}, _scaling)"
    values = {"weight": values["weight"], "_A": values["lora_A"], "_B": values["lora_B"], "_scaling": values["scaling"]}
    values["record"] = Source(f"((original := weight.clone()), {merge})[1]")
    call = Call(_function("lora_unmerge_"), values, changes=("weight",))

    def oracle(before, result, after):
        if call.mutated or result is not after["weight"]:
            raise CannotTell
        if result.numel() and not same_bits(result, after["original"]):
            raise WrongResult("after unmerge the weight has other bits")

    call.oracle = oracle
    return call


@maker
def MergeRecord(choices: Choices) -> Call:
    """Makes an arbitrary record and passes it to lora_unmerge_."""
    dtype = choices.pick(("float32", "bfloat16", "float64", "float16"))
    acc, rank = acc_name(dtype), choices.pick(RANKS)
    size_out, size_in = choices.pick(MERGE_SIZES), choices.pick(MERGE_SIZES)
    words = TensorValue((size_out, (size_in + 255) // 256), "int16", choices.integer(1000), low=-1, high=4)
    corrections = TensorValue((choices.pick((0, 1, 5, 40)),), "int16", choices.integer(1000), low=-100, high=100)
    return Call(
        "lora_ext.functional.MergeRecord",
        {
            "lora_A": tensor(choices, (rank, size_in), acc),
            "lora_B": tensor(choices, (size_out, rank), acc),
            "dtype": Source(f"torch.{dtype}"),
            "words": words if choices.chance(60) else Source("None"),
            "corrections": corrections if choices.chance(60) else Source("None"),
        },
        after=f"unmerged = torch.zeros({size_out}, {size_in}, dtype=torch.{dtype})\n"
        "lora_ext.functional.lora_unmerge_(unmerged, result)\nresult.nbytes, result.to(torch.device('cpu'))\n",
    )
