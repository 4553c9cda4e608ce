"""Tests the merge kernels on the CPU: the bits of the CPU op, which are defined, in every order of threads."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from support.merging import FLOATING, bits, hard_weight, same_bits, update_factors
from torch import Tensor

from lora_ext.merging.weights import pack_factors
from simt import merge_ops
from simt.driver import Library, few_blocks, kernels

pytestmark = [pytest.mark.cpu_only("emulates the CUDA kernels on the CPU"), pytest.mark.full]

RANKS = [1, 3, 8, 16, 17, 64, 100]
MAX_LAYERS_OF_A_LAUNCH = 31
SIZES = [1e-30, 1e-6, 0.1, 1.0, 1e3]  # of the update, for a weight of size 1


def dtype_id(value) -> str:
    return str(value).replace("torch.", "")


def random_layer(rows: int, cols: int, rank: int, dtype: torch.dtype, size: float = 0.1) -> tuple[Tensor, ...]:
    """Returns weight, lora_A and lora_B in the kernels' form."""
    weight = hard_weight(rows, cols, dtype)
    return weight, *pack_factors(dtype, [update_factors(weight, rank, size)])


def whole_cycle(
    layers: list[tuple[Tensor, ...]],
    schedule: int = 0,
    library: Library | None = None,
    seeds: list[int] | None = None,
) -> list[Tensor]:
    """Plans, merges with a record and without one, and unmerges. Every step equals the CPU op to the bit; the last step
    restores the first bits.

    Returns the merged weights.
    """
    weights, As, Bs = map(list, zip(*layers, strict=True))
    options = {"schedule": schedule, "library": library, "seeds": seeds}
    draws = ([], []) if seeds is None else (seeds, [merge_ops.FIRST_ROW * i for i in range(len(layers))])
    non_finite, words = merge_ops.plan(weights, As, Bs, **options)
    on_cpu = [weight.clone() for weight in weights]
    cpu_non_finite, cpu_words, cpu_corrections = torch.ops.lora_ext.lora_merge_record_(on_cpu, As, Bs, *draws)
    assert torch.equal(non_finite, cpu_non_finite) and not non_finite.any()
    assert torch.equal(words, torch.cat([layer_words.flatten() for layer_words in cpu_words]))
    lengths = [record.numel() for record in cpu_corrections]
    ends = words.cumsum(0)
    results, corrections = merge_ops.merge_record(weights, As, Bs, ends=ends, corrections=lengths, **options)
    assert all(map(same_bits, results, on_cpu))
    assert all(map(same_bits, merge_ops.merge(weights, As, Bs, **options), on_cpu))
    assert all(map(torch.equal, corrections, cpu_corrections))

    # The weights with their strides in memory.
    places = [weight.clone() if weight.is_contiguous() else in_place_of(weight) for weight in weights]
    for place, result in zip(places, results, strict=True):
        place.copy_(result)
    assert all(
        map(same_bits, merge_ops.unmerge(places, As, Bs, ends=ends, corrections=corrections, **options), weights)
    )

    candidates = merge_ops.unmerge(places, As, Bs, **options)
    torch.ops.lora_ext.lora_unmerge_(on_cpu, As, Bs, [], [], *draws)
    assert all(map(same_bits, candidates, on_cpu))
    return results


def in_place_of(view: Tensor) -> Tensor:
    """Returns a new view with the same strides and misalignment."""
    storage = view.new_empty(view.untyped_storage().nbytes() // view.element_size())
    return storage.as_strided(view.shape, view.stride(), view.storage_offset())


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
    words = merge_ops.plan(*([tensor] for tensor in layer_of_records(dtype, 5)))[1].view(5, 5)
    whole = 256 * dtype.itemsize // 2
    assert (words[:, 0] == 0).all()
    assert (words[:, 1:4] > 0).all() and (words[:, 1:4] < whole).all()
    assert (words[:, 3] > 9).all()
    assert (words[:, 4] == whole).all()


# --- every plan, every order of threads -------------------------------------------------------------------------------


@pytest.mark.pairs
@pytest.mark.parametrize("schedule", [0, 1, 2])
@pytest.mark.parametrize("blocks", ["many blocks", "few blocks"])
@pytest.mark.parametrize("dtype", FLOATING, ids=dtype_id)
def test_same_bits_in_every_order_of_threads(dtype, blocks, schedule):
    """With few blocks, each computes several tiles: it keeps lora_A in shared memory, or reads it for every tile."""
    layers = [random_layer(130, 260, 5, dtype), random_layer(70, 30, 17, dtype)]
    whole_cycle(layers, schedule, few_blocks() if blocks == "few blocks" else kernels())


# --- stochastic rounding ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=dtype_id)
def test_rounds_stochastically_as_the_cpu_op(dtype, size):
    """Also subnormal results, tails, misaligned weights and layers of one launch with seeds of their own."""
    wide = hard_weight(12, 304, dtype)
    layers = [random_layer(6, 300, 3, dtype, size), random_layer(70, 257, 17, dtype, size)]
    layers.append((wide[:, 1:272], *pack_factors(dtype, [update_factors(wide[:, 1:272], 2, size)])))
    for schedule in (0, 1):
        results = whole_cycle(layers, schedule, seeds=[7, -(2**63), 2**40 + 1])
    nearest = merge_ops.merge(*map(list, zip(*layers, strict=True)))
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
    weights, As, Bs = map(list, zip(*layers, strict=True))
    non_finite, words = merge_ops.plan(weights, As, Bs, schedule=schedule)
    assert non_finite.tolist() == [3, 9, 300, 1, 0]
    on_cpu = [torch.ops.lora_ext.lora_merge_record_([weight.clone()], [A], [B]) for weight, A, B in layers]
    assert [int(counts) for counts, _, _ in on_cpu] == non_finite.tolist()
    assert torch.equal(words[-18:], on_cpu[-1][1][0].flatten())  # of the finite results
    assert torch.equal(merge_ops.check(weights, As, Bs, schedule=schedule), non_finite)


GARBAGE = {
    "zeros": lambda ends: ends * 0,
    "too far": lambda ends: ends * 7,
    "too short": lambda ends: ends // 2,
    "negative": lambda ends: -ends,
    "falling": lambda ends: ends.flip(0),
    "huge": lambda ends: torch.full_like(ends, 2**62),
    "one off": lambda ends: ends + 1,
}


@pytest.mark.parametrize("garbage", GARBAGE)
@pytest.mark.parametrize("dtype", FLOATING, ids=dtype_id)
def test_a_record_that_does_not_fit_touches_nothing_outside(dtype, garbage):
    """tests/simt sees every access: only the weights and the corrections may be written."""
    layers = [random_layer(5, 300, 2, dtype, 0.02), layer_of_records(dtype, 3), random_layer(3, 20, 2, dtype, 30.0)]
    weights, As, Bs = map(list, zip(*layers, strict=True))
    _, words = merge_ops.plan(weights, As, Bs)
    lengths = [int(part.sum()) for part in words.split([merge_ops.num_segments(weight) for weight in weights])]
    ends = GARBAGE[garbage](words.cumsum(0))
    before = [random_words(length) for length in lengths]
    results, after = merge_ops.merge_record(weights, As, Bs, ends=ends, corrections=before, garbage=True)
    assert all(map(same_bits, results, merge_ops.merge(weights, As, Bs)))
    if garbage in ("zeros", "negative", "huge"):
        assert all(map(torch.equal, before, after))
    for record in (before, after):
        merge_ops.unmerge(results, As, Bs, ends=ends, corrections=record, garbage=True)


@pytest.mark.parametrize("dtype", FLOATING, ids=dtype_id)
def test_a_record_that_is_a_word_short(dtype):
    """The last correction has no place, and is not written behind the others."""
    weight, A, B = layer_of_records(dtype, 1)
    layer = [weight[:, 256:512].contiguous()], [A[:, 256:512].contiguous()], [B]  # a few corrections of one unit
    words = merge_ops.plan(*layer)[1].long()
    assert 1 < words < 256
    short = [random_words(int(words) - 1)]
    results, _ = merge_ops.merge_record(*layer, ends=words - 1, corrections=short, garbage=True)
    assert same_bits(results[0], merge_ops.merge(*layer)[0])


def random_words(count: int) -> Tensor:
    return torch.randint(-(2**15), 2**15, (count,), dtype=torch.int16)
