"""Makes valid calls of the merge ops and of the functions that merge one weight."""

from __future__ import annotations

from torch import Tensor

from lora_ext import functional
from lora_ext._ops.checks import accumulation_dtype

from .calls import Call
from .cases import CannotTell, WrongResult
from .choices import Choices
from .compare import check_close, same_bits, share_memory
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

_SIZES = (3, 1, 0, 2, 8, 17, 33, 64, 100, 255, 256, 257, 300, 520)
_LAYOUTS = ("gaps between rows", *IN_PLACE)
_DTYPES = ("float32", "bfloat16", "float64", "float16")
# A merge's record, then forged ones.
_RECORDS = (
    ("recorded[1]", "recorded[2]"),
    ("[]", "[]"),
    ("[words * 0 - 1 for words in recorded[1]]", "recorded[2]"),
    ("[words * 0 + 32767 for words in recorded[1]]", "recorded[2]"),
    ("[words + 3 for words in recorded[1]]", "recorded[2]"),
    ("recorded[1]", "[corrections[:1] for corrections in recorded[2]]"),
    ("recorded[1]", "[corrections * 0 - 1 for corrections in recorded[2]]"),
    ("recorded[1][:1]", "recorded[2]"),
    ("[words.T for words in recorded[1]]", "recorded[2]"),
    ("[words.float() for words in recorded[1]]", "recorded[2]"),
    ("recorded[1]", '[corrections.to("meta") for corrections in recorded[2]]'),
)


def _layer(choices: Choices, dtype: str, factors: str) -> tuple[Value, Value, Value]:
    size_out, size_in, rank = choices.choice(_SIZES), choices.choice(_SIZES), choices.choice(RANKS)
    weight = tensor(choices, (size_out, size_in), dtype, _LAYOUTS)
    return weight, tensor(choices, (rank, size_in), factors), tensor(choices, (size_out, rank), factors)


def _values(choices: Choices) -> dict[str, Value]:
    dtype = choices.choice(_DTYPES)
    layers = [_layer(choices, dtype, acc_name(dtype)) for _ in range(choices.choice((1, 2, 3)))]
    names = ("weights", "lora_As", "lora_Bs")
    return {name: ListValue(list(of)) for name, of in zip(names, zip(*layers, strict=True), strict=True)}


def _merge(choices: Choices, function: str) -> Call:
    return Call(function, _values(choices), changes=("weights",))


def _unmerge(choices: Choices, function: str) -> Call:
    values = _values(choices)
    words, corrections = choices.choice(_RECORDS) if choices.chance(30) else _RECORDS[0]
    merge = "torch.ops.lora_ext.lora_merge_record_(weights, lora_As, lora_Bs)"
    values["words"] = Source(f"((recorded := {merge}), {words})[1]")
    values["corrections"] = Source(corrections)
    return Call(function, values, changes=("weights",))


# --- one weight -------------------------------------------------------------------------------------------------------


def _one(choices: Choices) -> dict[str, Value]:
    dtype = choices.choice(_DTYPES)
    factors = choices.choice((acc_name(dtype), dtype, "float32", "bfloat16", "float64"))
    values = dict(zip(("weight", "lora_A", "lora_B"), _layer(choices, dtype, factors), strict=True))
    return values | {"scaling": literal(choices.choice((*SCALINGS, -1.0)))}


def _assert_bits(what: str, weight: Tensor, expected: Tensor) -> None:
    if weight.numel() and not same_bits(weight, expected):
        raise WrongResult(f"{what}: the weight has other bits than before")


def _merge_one(choices: Choices, function: str) -> Call:
    def oracle(before, result, after):
        if share_memory([after[name] for name in before]):
            raise CannotTell  # the result depends on the order of writes
        W, A, B = (before[name].detach().double() for name in ("weight", "lora_A", "lora_B"))
        scaling, computed_in = float(before["scaling"]), accumulation_dtype(before["weight"].dtype)
        magnitude = W.abs() + abs(scaling) * (B.abs() @ A.abs())
        check_close("weight", after["weight"], W + scaling * (B @ A), magnitude, A.shape[0], computed_in)
        if result is not None:
            again = after["weight"].detach().clone()
            functional.lora_unmerge_(again, result)
            _assert_bits("merged and unmerged", again, before["weight"])

    return Call(function, _one(choices) | {"record": literal(not choices.chance(30))}, oracle, changes=("weight",))


def _copied(name: str) -> str:
    """Returns source that copies a tensor; one without memory stays, because PyTorch reads it without a check."""
    return f"({name}.clone() if {name}.untyped_storage().nbytes() else {name})"


def _unmerge_one(choices: Choices, function: str) -> Call:
    values = {name if name == "weight" else f"_{name}": value for name, value in _one(choices).items()}
    record, dtype = f"{FUNCTIONS}lora_merge_(weight, _lora_A, _lora_B, _scaling)", values["weight"].dtype
    if is_forged := choices.chance(30):
        record = f"{FUNCTIONS}MergeRecord(_lora_A, _lora_B, torch.{dtype}, _words, _corrections)"
        values |= {f"_{name}": value for name, value in _forged(choices, values["weight"].shape).items()}
    values["record"] = Source(f"((original := {_copied('weight')}), {record})[1]")
    call = Call(function, values, changes=("weight",))

    def oracle(before, result, after):
        if is_forged or call.mutated:
            raise CannotTell
        if result is not after["weight"]:
            raise WrongResult("the result is not the weight")
        _assert_bits("unmerged", result, after["original"])

    call.oracle = oracle
    return call


def _forged(choices: Choices, shape: tuple[int, ...]) -> dict[str, Value]:
    words = TensorValue((shape[0], (shape[1] + 255) // 256), "int16", choices.randrange(1000), low=-1, high=4)
    corrections = TensorValue((choices.choice((0, 1, 5, 40)),), "int16", choices.randrange(1000), low=-100, high=100)
    return {"words": words, "corrections": corrections}


def _forged_record(choices: Choices, function: str) -> Call:
    dtype = choices.choice(_DTYPES)
    weight, lora_A, lora_B = _layer(choices, dtype, acc_name(dtype))
    forged = {k: v if choices.chance(60) else Source("None") for k, v in _forged(choices, weight.shape).items()}
    return Call(function, {"lora_A": lora_A, "lora_B": lora_B, "dtype": Source(f"torch.{dtype}"), **forged})


MAKERS = {
    f"{OPS}lora_merge_": _merge,
    f"{OPS}lora_merge_check": _merge,  # without a CPU kernel
    f"{OPS}lora_merge_record_": _merge,
    f"{OPS}lora_unmerge_": _unmerge,
    f"{FUNCTIONS}lora_merge_": _merge_one,
    f"{FUNCTIONS}lora_unmerge_": _unmerge_one,
    f"{FUNCTIONS}MergeRecord": _forged_record,
}
