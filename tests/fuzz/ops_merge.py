"""Makes valid calls of the merge ops and of the functions that merge one weight."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from lora_ext import functional
from lora_ext._ops.checks import accumulation_dtype

from .calls import Call
from .cases import CannotTell, WrongResult
from .choices import Choices
from .compare import check_close, same_bits, share_memory
from .tensors import RANKS, SCALINGS, Change

_SIZES = (3, 1, 0, 2, 8, 17, 33, 64, 100, 255, 256, 257, 300, 520)
_DTYPES = (torch.float32, torch.bfloat16, torch.float64, torch.float16)
# Words and corrections of a merge's record, then forged ones.
_RECORDS: dict[str, Callable[[list[Tensor], list[Tensor]], tuple[list[Tensor], list[Tensor]]]] = {
    "recorded": lambda words, corrections: (words, corrections),
    "none": lambda words, corrections: ([], []),
    "words of -1": lambda words, corrections: ([w * 0 - 1 for w in words], corrections),
    "largest words": lambda words, corrections: ([w * 0 + 32767 for w in words], corrections),
    "larger words": lambda words, corrections: ([w + 3 for w in words], corrections),
    "few corrections": lambda words, corrections: (words, [c[:1] for c in corrections]),
    "corrections of -1": lambda words, corrections: (words, [c * 0 - 1 for c in corrections]),
    "one layer's words": lambda words, corrections: (words[:1], corrections),
    "transposed words": lambda words, corrections: ([w.T for w in words], corrections),
    "words of float32": lambda words, corrections: ([w.float() for w in words], corrections),
    "corrections without data": lambda words, corrections: (words, [c.to("meta") for c in corrections]),
}


def _layer(choices: Choices, dtype: torch.dtype, factors: torch.dtype) -> dict[str, Tensor]:
    size_out, size_in, rank = choices.choice(_SIZES), choices.choice(_SIZES), choices.choice(RANKS)
    shapes = {"weight": (size_out, size_in), "lora_A": (rank, size_in), "lora_B": (size_out, rank)}
    return {name: torch.randn(shape).to(dtype if name == "weight" else factors) for name, shape in shapes.items()}


def _merge(choices: Choices, function: str) -> Call:
    dtype = choices.choice(_DTYPES)
    layers = [_layer(choices, dtype, accumulation_dtype(dtype)) for _ in range(choices.choice((1, 2, 3)))]
    values: dict[str, list] = {f"{name}s": [layer[name] for layer in layers] for name in layers[0]}
    if choices.chance(20):
        values |= {"seeds": [choices.choice((0, 1, -1, 2**63 - 1)) for _ in layers]}
        values |= {"first_rows": [choices.choice((0, 1, 1 << 31)) for _ in layers]}
    return Call(function, values, changes=("weights",))


def _unmerge(choices: Choices, function: str) -> Call:
    call, forged = _merge(choices, function), choices.choice(list(_RECORDS)) if choices.chance(30) else "recorded"
    made: list[list[Tensor]] = []

    def words(_: Any, arguments: dict[str, Any]) -> list[Tensor]:
        merged = {name: value for name, value in arguments.items() if name not in ("words", "corrections")}
        made[:] = _RECORDS[forged](*torch.ops.lora_ext.lora_merge_record_(**merged)[1:])
        return made[0]

    call.arguments |= {"words": [], "corrections": []}
    call.steps = [Change(forged, "words", words), Change(forged, "corrections", lambda *_: made[1])]
    return call


# --- one weight -------------------------------------------------------------------------------------------------------


def _one(choices: Choices) -> dict[str, Any]:
    dtype = choices.choice(_DTYPES)
    factors = choices.choice((accumulation_dtype(dtype), dtype, torch.float32, torch.bfloat16, torch.float64))
    return _layer(choices, dtype, factors) | {"scaling": choices.choice((*SCALINGS, -1.0))}


def _assert_bits(what: str, weight: Tensor, expected: Tensor) -> None:
    if weight.numel() and not same_bits(weight, expected):
        raise WrongResult(f"{what}: the weight has other bits than before")


def _merge_one(choices: Choices, function: str) -> Call:
    def oracle(before, result, after):
        if share_memory([after[name] for name in before]) or before["seed"] is not None:
            raise CannotTell  # the result depends on the order of writes, or on the seed
        W, A, B = (before[name].detach().double() for name in ("weight", "lora_A", "lora_B"))
        scaling, computed_in = float(before["scaling"]), accumulation_dtype(before["weight"].dtype)
        magnitude = W.abs() + abs(scaling) * (B.abs() @ A.abs())
        check_close("weight", after["weight"], W + scaling * (B @ A), magnitude, A.shape[0], computed_in)
        if result is not None:
            again = after["weight"].detach().clone()
            functional.lora_unmerge_(again, result)
            _assert_bits("merged and unmerged", again, before["weight"])

    arguments = _one(choices) | {"record": not choices.chance(30), "seed": None}
    return Call(function, arguments, oracle, changes=("weight",))


def _unmerge_one(choices: Choices, function: str) -> Call:
    layer, is_forged, originals = _one(choices), choices.chance(30), []
    weight, forged = layer.pop("weight"), _forged(choices, layer)

    def record(_: Any, arguments: dict[str, Any]) -> functional.MergeRecord:
        merged = arguments["weight"]
        originals[:] = [merged.detach().clone()]
        if is_forged:
            return functional.MergeRecord(layer["lora_A"], layer["lora_B"], weight.dtype, **forged)
        return functional.lora_merge_(merged, **layer)

    merge = Change("forged" if is_forged else "of a merge", "record", record)

    def oracle(before, result, after):
        if is_forged or call.steps[-1] is not merge:
            raise CannotTell
        if result is not after["weight"]:
            raise WrongResult("the result is not the weight")
        _assert_bits("unmerged", result, originals[0])

    call = Call(function, {"weight": weight, "record": None}, oracle, changes=("weight",), steps=[merge])
    return call


def _forged(choices: Choices, layer: dict[str, Tensor]) -> dict[str, Tensor]:
    rows, columns = len(layer["lora_B"]), layer["lora_A"].shape[1]
    words = torch.randint(-1, 4, (rows, (columns + 255) // 256), dtype=torch.int16)
    return {"words": words, "corrections": torch.randint(-100, 100, (choices.choice((0, 1, 5, 40)),)).short()}


def _forged_record(choices: Choices, function: str) -> Call:
    dtype = choices.choice(_DTYPES)
    layer = _layer(choices, dtype, accumulation_dtype(dtype))
    forged = {k: v if choices.chance(60) else None for k, v in _forged(choices, layer).items()}
    return Call(function, {"lora_A": layer["lora_A"], "lora_B": layer["lora_B"], "dtype": dtype, **forged})


# lora_merge_check has no kernel on the CPU.
OPS = dict.fromkeys(("lora_merge_", "lora_merge_check", "lora_merge_record_"), _merge) | {"lora_unmerge_": _unmerge}
FUNCTIONS = {"lora_merge_": _merge_one, "lora_unmerge_": _unmerge_one, "MergeRecord": _forged_record}
