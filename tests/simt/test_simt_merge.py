"""Tests the merge kernels on the CPU through their bindings: the bits of the CPU op, which are defined, in every order
of threads."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from support.merging import FLOATING, bits, hard_weight, same_bits, update_factors
from torch import Tensor

from lora_ext.merging.weights import pack_factors
from simt.driver import FEW_SMS, SMS, Emulated

pytestmark = [pytest.mark.cpu_only("emulates the CUDA kernels on the CPU"), pytest.mark.full]

ops = torch.ops.lora_ext
RANKS = [1, 3, 8, 16, 17, 64, 100]
MAX_LAYERS_OF_A_LAUNCH = 31
FIRST_ROW = 3  # of layer i of a stochastic merge, times i
SIZES = [1e-30, 1e-6, 0.1, 1.0, 1e3]  # of the update, for a weight of size 1
Layers = list[tuple[Tensor, ...]]


def dtype_id(value) -> str:
    return str(value).replace("torch.", "")


def random_layer(rows: int, cols: int, rank: int, dtype: torch.dtype, size: float = 0.1) -> tuple[Tensor, ...]:
    """Returns weight, lora_A and lora_B in the kernels' form."""
    weight = hard_weight(rows, cols, dtype)
    return weight, *pack_factors(dtype, [update_factors(weight, rank, size)])


def lists_of(layers: Layers) -> tuple[list[Tensor], list[Tensor], list[Tensor]]:
    """Returns the weights, which are copies with the same strides and misalignment, lora_As and lora_Bs."""
    weights, As, Bs = map(list, zip(*layers, strict=True))
    return list(map(in_place_of, weights)), As, Bs


def in_place_of(view: Tensor) -> Tensor:
    storage = view.new_empty(view.untyped_storage().nbytes() // view.element_size())
    return storage.as_strided(view.shape, view.stride(), view.storage_offset()).copy_(view)


def assert_bits_of(found: list[Tensor], expected: list[Tensor]) -> None:
    assert len(found) == len(expected) and all(map(same_bits, found, expected))


def whole_cycle(layers: Layers, seeds: list[int] | None = None, **gpu) -> list[Tensor]:
    """Checks, merges with a record and without one, and unmerges. Every step equals the CPU op to the bit; unmerging
    restores the first bits.

    Returns the merged weights.
    """
    draws = ([], []) if seeds is None else (seeds, [FIRST_ROW * i for i in range(len(layers))])
    (on_cpu, As, Bs), (weights, _, _), (before, _, _) = (lists_of(layers) for _ in range(3))
    expected = ops.lora_merge_record_(on_cpu, As, Bs, *draws)
    with Emulated(**gpu):
        non_finite = ops.lora_merge_check(weights, As, Bs, *draws)
        assert torch.equal(non_finite, expected[0]) and not non_finite.any()
        assert_bits_of(weights, before)
        found = ops.lora_merge_record_(weights, As, Bs, *draws)
        assert_bits_of(weights, on_cpu)
        assert torch.equal(found[0], expected[0])
        assert_bits_of(found[1] + found[2], expected[1] + expected[2])
        merged = list(map(torch.clone, weights))
        ops.lora_unmerge_(weights, As, Bs, *found[1:], *draws)
        assert_bits_of(weights, before)
        ops.lora_merge_(weights, As, Bs, *draws)
        assert_bits_of(weights, on_cpu)
        ops.lora_unmerge_(weights, As, Bs, [], [], *draws)  # without a record: candidates
    ops.lora_unmerge_(on_cpu, As, Bs, [], [], *draws)
    assert_bits_of(weights, on_cpu)
    return merged


# --- the CPU op -------------------------------------------------------------------------------------------------------


def layer_of_records(dtype: torch.dtype, rows: int) -> tuple[Tensor, ...]:
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
    return weight, *pack_factors(dtype, [(A, torch.ones(rows, 1), 1.0)])


def constant_layer(dtype: torch.dtype, value: float, size: float) -> tuple[Tensor, ...]:
    weight = torch.full((3, 300), value, dtype=dtype)
    A, B, _ = update_factors(weight, 2, size or 1.0)
    return weight, *pack_factors(dtype, [(A, B, size)])


def minus_zero(dtype: torch.dtype, rank: int) -> tuple[Tensor, ...]:
    """The sign of the product of 0.0 and -1.0 survives: adding another zero would lose it."""
    factors = pack_factors(dtype, [(torch.zeros(rank, 20), -torch.ones(2, rank), 1.0)])
    return torch.full((2, 20), -0.0, dtype=dtype), *factors


def of_view(dtype: torch.dtype, view: Callable[[Tensor], Tensor]) -> tuple[Tensor, ...]:
    weight = view(hard_weight(12, 304, dtype))
    return weight, *pack_factors(dtype, [update_factors(weight, 3, 0.1)])


def many_layers(dtype: torch.dtype, count: int) -> list[tuple[Tensor, ...]]:
    shapes = [(7, 300, 3), (0, 5, 2), (40, 20, 1), (1, 1, 2), (5, 0, 2), (3, 513, 17)]
    return [random_layer(*shapes[i % len(shapes)], dtype, 0.03 * (i + 1)) for i in range(count)]


def nothing(dtype: torch.dtype) -> list[tuple[Tensor, ...]]:
    return [random_layer(0, 5, 1, dtype), random_layer(5, 0, 1, dtype)]


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
CASES: dict[str, Callable[[torch.dtype], list[tuple[Tensor, ...]]]] = {
    **{f"rank {rank}": lambda dtype, rank=rank: [random_layer(19, 70, rank, dtype)] for rank in RANKS},
    **{f"{shape}": lambda dtype, shape=shape: [random_layer(*shape, 3, dtype)] for shape in SHAPES},
    # Records with no correction, a few of one unit, corrections of several words, and whole segments.
    **{f"updates of {size}": lambda dtype, size=size: [random_layer(6, 300, 3, dtype, size)] for size in SIZES},
    "every kind of record in a row": lambda dtype: [layer_of_records(dtype, 5)],
    **{
        f"a weight of {value}": lambda dtype, value=value: [constant_layer(dtype, value, s) for s in (0.0, 1e-9, 1.0)]
        for value in (0.0, -0.0, 1.0)
    },
    "updates of -0.0": lambda dtype: [minus_zero(dtype, rank) for rank in (1, 3, 16, 17)],
    **{name: lambda dtype, view=view: [of_view(dtype, view)] for name, view in VIEWS.items()},
    "several layers": lambda dtype: many_layers(dtype, 6),
    "more layers than a launch takes": lambda dtype: [
        *nothing(dtype)[:1],
        *many_layers(dtype, MAX_LAYERS_OF_A_LAUNCH + 3),
        *nothing(dtype)[1:],
    ],
    "nothing to do": nothing,
}


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("dtype", FLOATING, ids=dtype_id)
def test_has_the_bits_of_the_cpu_op(dtype, case):
    whole_cycle(CASES[case](dtype))


@pytest.mark.parametrize("dtype", FLOATING, ids=dtype_id)
def test_the_kinds_of_records(dtype):
    """One kind per segment: none, corrections of one word, some of several words, these only, a whole segment."""
    with Emulated():
        _, (words,), _ = ops.lora_merge_record_(*lists_of([layer_of_records(dtype, 5)]))
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
    layers = [random_layer(130, 260, 5, dtype), random_layer(70, 30, 17, dtype)]
    whole_cycle(layers, sms=sms, schedule=schedule)


# --- stochastic rounding ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=dtype_id)
def test_rounds_stochastically_as_the_cpu_op(dtype, size):
    """Also subnormal results, tails, misaligned weights and layers of one launch with seeds of their own."""
    wide = hard_weight(12, 304, dtype)
    layers = [random_layer(6, 300, 3, dtype, size), random_layer(70, 257, 17, dtype, size)]
    layers.append((wide[:, 1:272], *pack_factors(dtype, [update_factors(wide[:, 1:272], 2, size)])))
    for schedule in (0, 1):
        results = whole_cycle(layers, [7, -(2**63), 2**40 + 1], schedule=schedule)
    nearest, As, Bs = lists_of(layers)
    ops.lora_merge_(nearest, As, Bs)
    assert size < 1e-6 or not all(map(same_bits, nearest, results))


# --- invalid values and records ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("schedule", [0, 1])
@pytest.mark.parametrize("dtype", FLOATING, ids=dtype_id)
def test_non_finite_results_are_counted(dtype, schedule):
    layers = [random_layer(9, 300, 2, dtype) for _ in range(5)]
    for weight, A, B in layers:
        weight.clamp_(-8, 8), A.clamp_(-8, 8), B.clamp_(-8, 8)
    layers[0][0][3, 299], layers[0][0][3, 0], layers[0][0][8, 7] = float("nan"), float("inf"), float("-inf")
    layers[1][1][1, 256] = float("nan")  # a column of results
    layers[2][2][4, 0] = float("inf")  # a row
    limit = torch.finfo(dtype).max
    layers[3][0][5, 6], layers[3][1][:, 6], layers[3][2][5] = limit, limit / 8, 4.0  # overflows
    layers[1][0][:, 256] = torch.full((9,), -1, dtype=bits(layers[1][0]).dtype).view(dtype)  # another NaN
    before, (weights, As, Bs) = lists_of(layers)[0], lists_of(layers)
    with Emulated(schedule=schedule):
        counts = ops.lora_merge_check(weights, As, Bs)
        non_finite, words, corrections = ops.lora_merge_record_(weights, As, Bs)
    assert counts.tolist() == non_finite.tolist() == [3, 9, 300, 1, 0]
    assert words == corrections == []
    assert_bits_of(weights, before)


def test_no_memory_for_the_record_leaves_the_weights():
    layers = [random_layer(5, 300, 3, torch.float32, 1e5)]
    before, (weights, As, Bs) = lists_of(layers)[0], lists_of(layers)
    with (
        Emulated(largest=1000),
        pytest.raises(RuntimeError, match="lora_merge_record_: .*(out of memory|cannot alloc)"),
    ):
        ops.lora_merge_record_(weights, As, Bs)
    assert_bits_of(weights, before)


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
    layers = [random_layer(5, 300, 2, dtype, 0.02), layer_of_records(dtype, 3), random_layer(3, 20, 2, dtype, 30.0)]
    weights, As, Bs = lists_of(layers)
    with Emulated(races=False):
        _, words, corrections = ops.lora_merge_record_(weights, As, Bs)
        words = list(map(GARBAGE[garbage], words))
        for records in (corrections, [torch.randint_like(record, -(2**15), 2**15) for record in corrections]):
            ops.lora_unmerge_(list(map(torch.clone, weights)), As, Bs, words, records)


@pytest.mark.parametrize("dtype", FLOATING, ids=dtype_id)
def test_a_record_that_is_a_word_short(dtype):
    """The last correction is not there, and is not read."""
    layers = [layer_of_records(dtype, 1)]
    weights, As, Bs = lists_of(layers)
    with Emulated(races=False):
        _, words, (record,) = ops.lora_merge_record_(weights, As, Bs)
        ops.lora_unmerge_(weights, As, Bs, words, [record[:-1].clone()])
