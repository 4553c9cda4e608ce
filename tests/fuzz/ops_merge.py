"""Makes valid calls of the merge ops."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from lora_ext._ops.checks import accumulation_dtype

from .calls import Call, CannotTell
from .choices import Choices
from .compare import WrongResult, check_close, same_bits, share_memory
from .ops import PACKED, RANKS, acc_name, maker, op
from .values import ListValue, Source, Value, tensor

MERGE_SIZES = (3, 1, 0, 2, 8, 17, 33, 64, 100, 255, 256, 257, 300, 520)


def _merge_values(choices: Choices) -> dict[str, Value]:
    dtype = choices.pick(("float32", "bfloat16", "float64", "float16"))
    acc = acc_name(dtype)
    layers = [
        (choices.pick(MERGE_SIZES), choices.pick(MERGE_SIZES), choices.pick(RANKS))
        for _ in range(choices.pick((1, 2, 3)))
    ]
    return {
        "weights": ListValue([tensor(choices, (out, size_in), dtype, PACKED) for out, size_in, _ in layers]),
        "lora_As": ListValue([tensor(choices, (rank, size_in), acc) for _, size_in, rank in layers]),
        "lora_Bs": ListValue([tensor(choices, (out, rank), acc) for out, _, rank in layers]),
    }


def _check_merged(before: Mapping[str, Any], weights: Sequence[Tensor]) -> None:
    for i, (W, A, B, merged) in enumerate(
        zip(before["weights"], before["lora_As"], before["lora_Bs"], weights, strict=True)
    ):
        W64, A64, B64 = W.detach().double(), A.detach().double(), B.detach().double()
        magnitude = W64.abs() + B64.abs() @ A64.abs()
        check_close(f"weights[{i}]", merged, W64 + B64 @ A64, magnitude, A.shape[0], accumulation_dtype(W.dtype))


def _counts(before: Mapping[str, Any]) -> list[int]:
    """Counts the results of each layer that are certainly NaN or infinite."""
    counts = []
    for W, A, B in zip(before["weights"], before["lora_As"], before["lora_Bs"], strict=True):
        acc = accumulation_dtype(W.dtype)
        merged = (W.detach().to(acc) + B.detach().to(acc) @ A.detach().to(acc)).to(W.dtype)
        counts.append(int((~merged.isfinite()).sum()))
    return counts


def _all_same_bits(what: str, ours: Sequence[Tensor], others: Sequence[Tensor]) -> None:
    for i, (first, second) in enumerate(zip(ours, others, strict=True)):
        if first.numel() and not same_bits(first, second):
            raise WrongResult(f"{what}: weights[{i}] has other bits than before")


def no_sharing(before: Mapping[str, Any]) -> None:
    """Raises CannotTell if arguments share memory: the result then depends on the order of writes."""
    if share_memory(list(before.values())):
        raise CannotTell


@maker
def lora_merge_(choices: Choices) -> Call:
    def oracle(before, result, after):
        no_sharing({name: after[name] for name in before})
        _check_merged(before, after["weights"])

    return Call(op("lora_merge_"), _merge_values(choices), oracle, changes=("weights",))


@maker
def lora_merge_record_(choices: Choices) -> Call:
    def oracle(before, result, after):
        no_sharing({name: after[name] for name in before})
        non_finite, words, corrections = result
        if any(_counts(before)) != bool(non_finite.any()):
            raise WrongResult(f"non_finite is {non_finite.tolist()}, want about {_counts(before)}")
        if non_finite.any():
            _all_same_bits("merge refused", after["weights"], before["weights"])
            return
        _check_merged(before, after["weights"])
        weights = [weight.detach().clone() for weight in after["weights"]]
        factors = [list(before["lora_As"]), list(before["lora_Bs"])]
        with torch.no_grad():
            torch.ops.lora_ext.lora_unmerge_(weights, *factors, words, corrections)
        _all_same_bits("unmerged again", weights, before["weights"])

    return Call(op("lora_merge_record_"), _merge_values(choices), oracle, changes=("weights",))


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


def copied(name: str) -> str:
    """Returns source that copies a tensor; one without memory stays, because PyTorch reads it without a check."""
    return f"({name}.clone() if {name}.untyped_storage().nbytes() else {name})"


@maker
def lora_unmerge_(choices: Choices) -> Call:
    values = _merge_values(choices)
    words, corrections = record = choices.pick(_RECORDS) if choices.chance(30) else _RECORDS[0]
    original = f"[{copied('weight')} for weight in weights]"
    merge = "torch.ops.lora_ext.lora_merge_record_(weights, lora_As, lora_Bs)"
    values["words"] = Source(f"((original := {original}), (recorded := {merge}), {words})[2]")
    values["corrections"] = Source(corrections)
    call = Call(op("lora_unmerge_"), values, changes=("weights",))

    def oracle(before, result, after):
        if record != _RECORDS[0] or set(call.mutated) - {"weights"} or not before["words"]:
            raise CannotTell
        _all_same_bits("unmerged", after["weights"], after["original"])

    call.oracle = oracle
    return call


@maker
def lora_merge_check(choices: Choices) -> Call:
    return Call(op("lora_merge_check"), _merge_values(choices))  # has no CPU kernel
