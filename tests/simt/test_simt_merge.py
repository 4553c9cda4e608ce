"""Tests the merge kernels on the CPU through their bindings: the bits of the CPU op, which are defined, in every order
of threads."""

from __future__ import annotations

import itertools
from collections.abc import Callable

import pytest
import torch
from support.merging import FLOATING, bits, hard_weight, packed_layers, same_bits, update_factors
from torch import Tensor

from lora_ext.merging.weights import pack_factors
from simt.driver import FEW_SMS, SMS, Emulated

pytestmark = [pytest.mark.cpu_only("emulates the CUDA kernels on the CPU"), pytest.mark.full]

ops = torch.ops.lora_ext
RANKS = [1, 3, 8, 16, 17, 64, 100]
MAX_LAYERS_OF_A_LAUNCH = 31
SIZES = [1e-30, 1e-6, 0.1, 1.0, 1e3]  # of the update, for a weight of size 1
Call = dict[str, list[Tensor]]  # weights, lora_As and lora_Bs


def dtype_id(value) -> str:
    return str(value).replace("torch.", "")


def of_factors(weight: Tensor, lora_A: Tensor, lora_B: Tensor, scaling: float = 1.0) -> Call:
    A, B = pack_factors(weight.dtype, [(lora_A, lora_B, scaling)])
    return {"weights": [weight], "lora_As": [A], "lora_Bs": [B]}


def together(*calls: Call) -> Call:
    return {name: [tensor for call in calls for tensor in call[name]] for name in calls[0]}


def with_copies(call: Call) -> Call:
    """Returns the call with copies of the weights, of the same strides and misalignment."""
    return call | {"weights": list(map(in_place_of, call["weights"]))}


def in_place_of(view: Tensor) -> Tensor:
    storage = view.new_empty(view.untyped_storage().nbytes() // view.element_size())
    return storage.as_strided(view.shape, view.stride(), view.storage_offset()).copy_(view)


def assert_bits_of(found: list[Tensor], expected: list[Tensor]) -> None:
    assert len(found) == len(expected) and all(map(same_bits, found, expected))


def whole_cycle(call: Call, seeds: list[int] | None = None, **gpu) -> list[Tensor]:
    """Checks, merges with a record and without one, and unmerges. Every step equals the CPU op to the bit; unmerging
    restores the first bits.

    Returns the merged weights.
    """
    if seeds is not None:
        call = call | {"seeds": seeds, "first_rows": [3 * i for i in range(len(seeds))]}
    on_cpu, here, before = with_copies(call), with_copies(call), call["weights"]
    weights, expected = here["weights"], ops.lora_merge_record_(**on_cpu)
    with Emulated(**gpu):
        non_finite = ops.lora_merge_check(**here)
        assert torch.equal(non_finite, expected[0]) and not non_finite.any()
        assert_bits_of(weights, before)
        found = ops.lora_merge_record_(**here)
        assert_bits_of(weights, on_cpu["weights"])
        assert torch.equal(found[0], expected[0])
        assert_bits_of(found[1] + found[2], expected[1] + expected[2])
        merged = list(map(torch.clone, weights))
        ops.lora_unmerge_(**here, words=found[1], corrections=found[2])
        assert_bits_of(weights, before)
        ops.lora_merge_(**here)
        assert_bits_of(weights, merged)
        ops.lora_unmerge_(**here, words=[], corrections=[])  # without a record: candidates
    ops.lora_unmerge_(**on_cpu, words=[], corrections=[])
    assert_bits_of(weights, on_cpu["weights"])
    return merged


# --- the CPU op -------------------------------------------------------------------------------------------------------


def layer_of_records(dtype: torch.dtype, rows: int) -> Call:
    weight = torch.randn(rows, 5 * 256, dtype=torch.float64).to(dtype)
    for first in (512, 768):
        weight[:, first : first + 256 : 29] = 1.3  # of some random numbers the sum is nearly exact
    A = torch.randn(1, 5 * 256)
    A[:, :256] = 0.0
    A[:, 256:768] *= 0.1
    A[:, 512:768:29] = 3000.0
    A[:, 768:1024] = 0.0
    A[:, 768:1024:29] = 3000.0  # every 29th of 256: nine
    A[:, 1024:] = -3e4
    return of_factors(weight, A, torch.ones(rows, 1))


def constant_layers(dtype: torch.dtype, value: float) -> Call:
    weights = [torch.full((3, 300), value, dtype=dtype) for _ in range(3)]
    sizes = zip(weights, (0.0, 1e-9, 1.0), strict=True)
    return together(*(of_factors(weight, *update_factors(weight, 2, size or 1.0)[:2], size) for weight, size in sizes))


def minus_zero(dtype: torch.dtype, rank: int) -> Call:
    """The sign of the product of 0.0 and -1.0 survives: adding another zero would lose it."""
    return of_factors(torch.full((2, 20), -0.0, dtype=dtype), torch.zeros(rank, 20), -torch.ones(2, rank))


def of_view(dtype: torch.dtype, view: Callable[[Tensor], Tensor], rank: int = 3, size: float = 0.1) -> Call:
    weight = view(hard_weight(12, 304, dtype))
    return of_factors(weight, *update_factors(weight, rank, size))


def many_layers(dtype: torch.dtype, count: int) -> Call:
    shapes = [(7, 300, 3), (0, 5, 2), (40, 20, 1), (1, 1, 2), (5, 0, 2), (3, 513, 17)]
    return packed_layers(
        dtype, [shapes[i % len(shapes)] for i in range(count)], (0.03 * i for i in range(1, 1 + count))
    )


VIEWS = {
    "aligned gaps": lambda wide: wide[:, :272],
    "offset": lambda wide: wide[:, 16:288],
    "misaligned": lambda wide: wide[:, 1:272],
    "odd stride": lambda wide: wide.flatten()[3 : 3 + 8 * 289].view(8, 289)[:, :270],
    "every other row": lambda wide: wide[::2, :270],
    "one row": lambda wide: wide[1:2, 8:280],
}
SHAPES = [(1, 1), (2, 259), (5, 1), (70, 1), (5, 255), (5, 256), (1, 257), (5, 257), (70, 257), (5, 600)]
# The layers of one launch, made from a dtype.
CASES: dict[str, Callable[[torch.dtype], Call]] = {
    **{f"rank {rank}": lambda dtype, rank=rank: packed_layers(dtype, [(19, 70, rank)]) for rank in RANKS},
    **{f"{shape}": lambda dtype, shape=shape: packed_layers(dtype, [(*shape, 3)]) for shape in SHAPES},
    # Records with no correction, a few of one unit, corrections of several words, and whole segments.
    **{f"updates of {size}": lambda dtype, size=size: packed_layers(dtype, [(6, 300, 3)], [size]) for size in SIZES},
    "every kind of record in a row": lambda dtype: layer_of_records(dtype, 5),
    **{f"a weight of {value}": lambda dtype, value=value: constant_layers(dtype, value) for value in (0.0, -0.0, 1.0)},
    "updates of -0.0": lambda dtype: together(*(minus_zero(dtype, rank) for rank in (1, 3, 16, 17))),
    **{name: lambda dtype, view=view: of_view(dtype, view) for name, view in VIEWS.items()},
    "several layers": lambda dtype: many_layers(dtype, 6),
    "more layers than a launch takes": lambda dtype: together(
        packed_layers(dtype, [(0, 5, 1)]),
        many_layers(dtype, MAX_LAYERS_OF_A_LAUNCH + 3),
        packed_layers(dtype, [(5, 0, 1)]),
    ),
    "nothing to do": lambda dtype: packed_layers(dtype, [(0, 5, 1), (5, 0, 1)]),
}


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("dtype", FLOATING, ids=dtype_id)
def test_has_the_bits_of_the_cpu_op(dtype, case):
    whole_cycle(CASES[case](dtype))


@pytest.mark.parametrize("dtype", FLOATING, ids=dtype_id)
def test_the_kinds_of_records(dtype):
    """One kind per segment: none, corrections of one word, some of several words, these only, a whole segment."""
    with Emulated():
        _, (words,), _ = ops.lora_merge_record_(**layer_of_records(dtype, 5))
    whole = 256 * dtype.itemsize // 2
    assert (words[:, 0] == 0).all()
    assert (words[:, 1:4] > 0).all() and (words[:, 1:4] < whole).all()
    assert (words[:, 3] > 9).all()
    assert (words[:, 4] == whole).all()


# --- every plan, every order of threads -------------------------------------------------------------------------------


@pytest.mark.pairs
@pytest.mark.parametrize("schedule", [0, 1, 2])
@pytest.mark.parametrize("sms", [SMS, FEW_SMS])
@pytest.mark.parametrize("dtype", FLOATING, ids=dtype_id)
def test_same_bits_in_every_order_of_threads(dtype, sms, schedule):
    """With few blocks, each computes several tiles: it keeps lora_A in shared memory, or reads it for every tile."""
    whole_cycle(packed_layers(dtype, [(130, 260, 5), (70, 30, 17)]), sms=sms, schedule=schedule)


# --- stochastic rounding ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=dtype_id)
def test_rounds_stochastically_as_the_cpu_op(dtype, size):
    """Also subnormal results, tails, misaligned weights and layers of one launch with seeds of their own."""
    call = packed_layers(dtype, [(6, 300, 3), (70, 257, 17)], [size] * 2)
    call = together(call, of_view(dtype, VIEWS["misaligned"], 2, size))
    for schedule in (0, 1):
        results = whole_cycle(call, [7, -(2**63), 2**40 + 1], schedule=schedule)
    nearest = with_copies(call)
    ops.lora_merge_(**nearest)
    assert size < 1e-6 or not all(map(same_bits, nearest["weights"], results))


# --- invalid values and records ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("schedule", [0, 1])
@pytest.mark.parametrize("dtype", FLOATING, ids=dtype_id)
def test_non_finite_results_are_counted(dtype, schedule):
    call = packed_layers(dtype, [(9, 300, 2)] * 5)
    for tensor in itertools.chain(*call.values()):
        tensor.clamp_(-8, 8)
    (first, column, row, overflows, _), limit = zip(*call.values(), strict=True), torch.finfo(dtype).max
    first[0][3, 299], first[0][3, 0], first[0][8, 7] = float("nan"), float("inf"), float("-inf")
    column[1][1, 256] = float("nan")
    column[0][:, 256] = torch.full((9,), -1, dtype=bits(column[0]).dtype).view(dtype)  # another NaN
    row[2][4, 0] = float("inf")
    overflows[0][5, 6], overflows[1][:, 6], overflows[2][5] = limit, limit / 8, 4.0
    here = with_copies(call)
    with Emulated(schedule=schedule):
        counts = ops.lora_merge_check(**here)
        non_finite, words, corrections = ops.lora_merge_record_(**here)
    assert counts.tolist() == non_finite.tolist() == [3, 9, 300, 1, 0]
    assert words == corrections == []
    assert_bits_of(here["weights"], call["weights"])


def test_no_memory_for_the_record_leaves_the_weights():
    call = packed_layers(torch.float32, [(5, 300, 3)], [1e5])
    here, text = with_copies(call), "lora_merge_record_: .*(out of memory|cannot alloc)"
    with Emulated(largest=1000), pytest.raises(RuntimeError, match=text):
        ops.lora_merge_record_(**here)
    assert_bits_of(here["weights"], call["weights"])


GARBAGE = {
    "zeros": lambda words: words * 0,
    "too far": lambda words: words * 7,
    "too short": lambda words: words // 2,
    "negative": lambda words: -words,
    "falling": lambda words: words.flip(0).flip(1),
    "huge": lambda words: torch.full_like(words, 2**15 - 1),
    "one off": lambda words: words + 1,
    "one less": lambda words: words - 1,
}


@pytest.mark.parametrize("garbage", GARBAGE)
@pytest.mark.parametrize("dtype", FLOATING, ids=dtype_id)
def test_a_record_that_does_not_fit_touches_nothing_outside(dtype, garbage):
    """tests/simt sees every access: only the weights may be written. Lanes may race, as no merge made the record."""
    call = together(packed_layers(dtype, [(5, 300, 2), (3, 20, 2)], [0.02, 30.0]), layer_of_records(dtype, 3))
    with Emulated(races=False):
        _, words, corrections = ops.lora_merge_record_(**call)
        words = list(map(GARBAGE[garbage], words))
        for records in (corrections, [torch.randint_like(record, -(2**15), 2**15) for record in corrections]):
            ops.lora_unmerge_(**with_copies(call), words=words, corrections=records)


@pytest.mark.parametrize("dtype", FLOATING, ids=dtype_id)
def test_a_record_that_is_a_word_short(dtype):
    """The last correction is not there, and is not read."""
    call = layer_of_records(dtype, 1)
    with Emulated(races=False):
        _, words, (record,) = ops.lora_merge_record_(**call)
        ops.lora_unmerge_(**call, words=words, corrections=[record[:-1].clone()])
