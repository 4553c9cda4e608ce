"""Tests the CUDA kernels of lora_grouped_, for mixed batches."""

from __future__ import annotations

import pytest
import torch
from support.groups import Grouped, random_groups
from support.layers import assert_errors_as_plain, in_dtypes_of
from support.op_table import OPS, joined, of_groups, results
from torch import Tensor

from lora_ext import _load, reference
from simt import grouped_ops
from simt.driver import few_blocks, kernels, planned
from simt.ops import PAIRS

pytestmark = [pytest.mark.cpu_only("emulates the CUDA kernels on the CPU"), pytest.mark.full]

BF16, F16, F32, F64 = torch.bfloat16, torch.float16, torch.float32, torch.float64
SEED = 0x1234_5678


OP = OPS["lora_grouped_"]


def plain(case: Grouped, dropout_p: float) -> dict[str, Tensor]:
    sample = of_groups(case).with_dropout(dropout_p, torch.tensor(SEED))
    return joined(results(OP.plain, sample, OP.leaves(sample)))


def ours(case: Grouped, dropout_p: float, **options) -> dict[str, Tensor]:
    forward = grouped_ops.forward(case, dropout_p, SEED, **options)
    if dropout_p:
        keep = reference.dropout_keep(SEED, *case.x.flatten(0, -2).shape, dropout_p)
        assert torch.equal(reference.unpack_mask(forward.mask, case.x.shape[-1]), keep)
    backward = grouped_ops.backward(case, forward.xa, forward.mask, dropout_p, **options)
    factors = {f"grad of lora_As[{i}]": grad for i, grad in enumerate(backward.grad_As)}
    factors |= {f"grad of lora_Bs[{i}]": grad for i, grad in enumerate(backward.grad_Bs)}
    return joined({"result 0": forward.y, "grad of x": backward.grad_x, **factors})


def check(case: Grouped, dropout_p: float = 0.0, **options) -> None:
    found = ours(case, dropout_p, **options)
    case = case.as_cuda_reads()
    expected = in_dtypes_of(plain(case, dropout_p), found)
    compared = found, plain(case.to(F64), dropout_p), expected
    assert_errors_as_plain([compared], case.x.dtype, case.lora_As[0].dtype)


def all_of(group: int, num_tokens: int) -> Tensor:
    return torch.full((num_tokens,), group)


CASES = {
    "one row": lambda dtypes: random_groups(1, (24, 20), [4], dtypes, groups=all_of(0, 1)),
    "one row of none": lambda dtypes: random_groups(1, (24, 20), [4], dtypes, groups=all_of(-1, 1)),
    "few rows": lambda dtypes: random_groups(13, (600, 300), [4, (3, 8), 17], dtypes, ranks=True),
    "a prompt each": lambda dtypes: random_groups(
        0, (64, 48), [3, 5], dtypes, leading=(3, 30), groups=torch.tensor([1, -1, 0])
    ),
    "matrices": lambda dtypes: random_groups(90, (63, 130), [1, 8, 17, 3], dtypes),
    "stacks and matrices": lambda dtypes: random_groups(
        80, (40, 24), [(3, 8), 5, (0, 2), (2, 16), 1], dtypes, ranks=True
    ),
    "no inputs": lambda dtypes: random_groups(9, (0, 20), [4, 3], dtypes),
    "no outputs": lambda dtypes: random_groups(80, (24, 0), [4, 3], dtypes),
    "a large rank": lambda dtypes: random_groups(70, (72, 57), [70, 2], dtypes),
}


@pytest.mark.parametrize("dtypes", PAIRS, ids=lambda d: f"{d[0]}-{d[1]}".replace("torch.", ""))
@pytest.mark.parametrize("name", CASES)
def test_values_and_gradients(name, dtypes):
    check(CASES[name](dtypes))


@pytest.mark.parametrize("dtypes", PAIRS, ids=lambda d: f"{d[0]}-{d[1]}".replace("torch.", ""))
@pytest.mark.parametrize("name", ["few rows", "a prompt each", "matrices"])
def test_dropout(name, dtypes):
    check(CASES[name](dtypes), 0.3)


@pytest.mark.parametrize("dtypes", [(BF16, F64), (F16, BF16)], ids=str)
@pytest.mark.parametrize("name", ["few rows", "matrices"])
def test_factors_of_other_dtypes(name, dtypes):
    check(CASES[name](dtypes))


@pytest.mark.parametrize("num_tokens", [13, 90])
def test_the_smallest_dropout(num_tokens):
    """Drops two of 117,000 elements of x, which are large: y is as if they were zero."""
    p, seed = 2.0**-16, 5
    case = random_groups(num_tokens, (117_000 // num_tokens, 20), [4, 3], dtypes=(BF16, BF16))
    dropped = ~reference.dropout_keep(seed, *case.x.shape, p)
    assert dropped.sum() == 2
    case.x[dropped] = 1000.0
    forward = grouped_ops.forward(case, p, seed)
    case.x[dropped] = 0.0
    torch.testing.assert_close(forward.y, grouped_ops.forward(case).y)


@pytest.mark.parametrize("dtypes", [(F16, F16), (BF16, BF16)], ids=str)
def test_chunks_of_a_large_group(dtypes):
    """Groups 0 and 2 have two chunks of rows, group 1 has one."""
    groups = torch.tensor([0] * 520 + [1] * 20 + [2] * 520)[torch.randperm(1060)]
    check(random_groups(1060, (24, 20), [5, 3, 2], dtypes, groups=groups))


def test_more_entries_than_a_launch_carries():
    check(random_groups(100, (24, 20), [2] * 40 + [(3, 4)] + [1] * 30, ranks=True, dtypes=(BF16, BF16)))
    check(random_groups(9, (24, 20), [2] * 70, dtypes=(BF16, BF16)))


@pytest.mark.parametrize("dtypes", [(F16, F32), (BF16, BF16)], ids=str)
@pytest.mark.parametrize("num_tokens", [9, 80])
def test_ranges_of_features_and_several_steps(num_tokens, dtypes):
    check(random_groups(num_tokens, (840, 600), [8, (2, 20)], dtypes), library=few_blocks())


@pytest.mark.parametrize("num_tokens", [9, 100])
@pytest.mark.parametrize("dtypes", [(BF16, F32), (BF16, BF16)], ids=str)
def test_views_with_any_strides(num_tokens, dtypes):
    """Rows of x and grad_y with gaps, not aligned to 16 bytes; slots and rows of the factors with gaps."""
    case = random_groups(num_tokens, (72, 48), [(2, 8)], dtypes)
    wide_x, wide_y = (torch.randn(num_tokens, 90).to(dtypes[0]) for _ in range(2))
    case.x, case.grad_y = wide_x[:, 1:73], wide_y[:, 3:51]
    case.lora_As = [torch.randn(2, 8, 80).to(dtypes[1])[:, :, :72]]
    case.lora_Bs = [torch.randn(2, 48, 12).to(dtypes[1])[:, :, :8]]
    check(case)


@pytest.mark.parametrize("num_tokens", [30, 150])
def test_numbers_that_do_not_exist_give_nan_to_their_rows_only(num_tokens):
    case = random_groups(num_tokens, (72, 48), [4, (2, 8)], ranks=True, dtypes=(BF16, BF16))
    expected = ours(case, 0.0)
    spoiled = {0: 3, 5: -2, 7: 1 << 40}
    for row, group in spoiled.items():
        case.group_of_row[row] = group
    found = ours(case, 0.0)
    rows = torch.tensor(list(spoiled))
    others = torch.ones(num_tokens, dtype=torch.bool).index_fill_(0, rows, False)
    for name in ("result 0", "grad of x"):
        assert found[name][rows].isnan().all() and torch.equal(found[name][others], expected[name][others])
    assert not found["grad of lora_As"].isnan().any() and not found["grad of lora_Bs"].isnan().any()


@pytest.mark.parametrize("rank", [-1, 9, 1 << 40])
@pytest.mark.parametrize("num_tokens", [30, 150])
def test_ranks_that_do_not_exist_give_nan_to_their_rows_only(num_tokens, rank):
    case = random_groups(num_tokens, (72, 48), [4, (2, 8)], dtypes=(BF16, BF16))
    case.ranks = torch.tensor([4, rank, 8])
    found = ours(case, 0.0)
    bad = case.group_of_row == 1
    for name in ("result 0", "grad of x"):
        assert torch.equal(found[name].isnan().all(-1), bad) and torch.equal(found[name].isnan().any(-1), bad)
    assert not found["grad of lora_As"].isnan().any() and not found["grad of lora_Bs"].isnan().any()


@pytest.mark.parametrize("dtypes", [(F16, F16), (BF16, BF16)], ids=str)
def test_infinite_inputs_leave_the_gradients_of_unused_ranks_zero(dtypes):
    case = random_groups(90, (72, 48), [(2, 8)], dtypes, groups=torch.arange(90) % 2)
    case.ranks = torch.tensor([3, 8])
    case.x[0, 0] = case.grad_y[2, 1] = torch.inf
    forward = grouped_ops.forward(case, 0.0, SEED)
    found = grouped_ops.backward(case, forward.xa, forward.mask, 0.0)
    grad_A, grad_B = found.grad_As[0][0], found.grad_Bs[0][0]
    assert not grad_A[3:].any() and not grad_B[:, 3:].any() and grad_A[:3].isnan().any()
    assert not forward.xa[case.group_of_row == 0, 3:].any() and forward.xa[0, :3].isinf().all()


@pytest.mark.pairs
@pytest.mark.parametrize("dtypes", [(F16, F16), (BF16, BF16)], ids=str)
@pytest.mark.parametrize("library", [kernels, few_blocks])
@pytest.mark.parametrize("num_tokens", [20, 530])
def test_same_bits_in_every_order_of_threads(num_tokens, library, dtypes):
    case = random_groups(num_tokens, (140, 70), [8, (2, 3)], dtypes, groups=(torch.arange(num_tokens) > 514) * 2)
    first = ours(case, 0.1, library=library())
    for schedule in (1, 2):
        again = ours(case, 0.1, library=library(), schedule=schedule)
        assert all(torch.equal(first[name], value) for name, value in again.items())


@pytest.mark.parametrize("wanted", ["x", "A", "B", "xB", "one A"])
def test_only_what_is_wanted(wanted):
    case = random_groups(90, (40, 24), [4, 3, (2, 5)], dtypes=(BF16, BF16))
    forward = grouped_ops.forward(case)
    all_of_them = grouped_ops.backward(case, forward.xa)
    As = range(1, 2) if wanted == "one A" else range(3 if "A" in wanted else 0)
    Bs = range(3 if "B" in wanted else 0)
    found = grouped_ops.backward(case, forward.xa, want_x="x" in wanted, wanted_As=As, wanted_Bs=Bs)
    assert found.grad_x is None or torch.equal(found.grad_x, all_of_them.grad_x)
    for i, grad in zip(As, found.grad_As, strict=True):
        assert torch.equal(grad, all_of_them.grad_As[i])
    for i, grad in zip(Bs, found.grad_Bs, strict=True):
        assert torch.equal(grad, all_of_them.grad_Bs[i])


@pytest.mark.parametrize(
    ("num_tokens", "kernels"),
    [
        (1, ["few_rows_shrink", "few_rows_expand"]),
        (64, ["few_rows_shrink", "few_rows_expand"]),
        (65, ["group_index", "grouped_shrink", "rank_sums", "grouped_expand"]),
        (65536, ["group_index", "grouped_shrink", "grouped_expand"]),
    ],
)
def test_few_rows_take_one_launch_pair(num_tokens, kernels):
    assert [launch.kernel for launch in _load.plan_grouped(num_tokens, 4096, 4096, 10, 16).launches] == kernels
    assert _load.plan_grouped(num_tokens, 4096, 4096, 10, 16, dropout=True).launches[0].kernel == "dropout_mask"


def test_a_pool_has_tiles_for_its_rows_not_for_its_slots():
    """Rows choose among the slots of a pool, or none: at most every row has a tile of its own."""
    blocks = {slots: _load.plan_grouped(128, 24, 20, slots, 4).launches[-1].blocks for slots in (3, 1000)}
    assert blocks == {3: 2 + 3 + 2, 1000: 2 + 128}
    groups = torch.tensor([7, 150, 299, -1])[torch.arange(70) % 4]
    check(random_groups(70, (24, 20), [(300, 4)], groups=groups, dtypes=(BF16, BF16)))


@pytest.mark.parametrize(
    ("num_tokens", "num_groups"), [(128, 1000), (8192, 64), (65, 0), (100, 1), (3000, 2500), (1025, 3)]
)
def test_the_index_is_a_stable_sort(num_tokens, num_groups):
    group_of_row = torch.randint(-1, num_groups, (num_tokens,))
    group_of_row[::50] = num_groups + 7  # does not exist
    numbers = torch.where(group_of_row == -1, num_groups, group_of_row.clamp_max(num_groups + 1))
    expected = numbers.sort(stable=True).indices
    begins = torch.cat([torch.zeros(1), numbers.bincount(minlength=num_groups + 2).cumsum(0)])
    assert _load.plan_grouped(num_tokens, 4096, 4096, num_groups, 16).launches[0].blocks == 1
    for schedule in (0, 1):
        order, begin = grouped_ops.index(group_of_row, num_groups, schedule)
        assert torch.equal(order.long(), expected) and torch.equal(begin.long(), begins.long())


@pytest.mark.parametrize("library", [kernels, few_blocks])
@pytest.mark.parametrize("num_tokens", [20, 90, 1100])
def test_the_kernels_are_launched_as_planned(num_tokens, library):
    case, library = random_groups(num_tokens, (140, 70), [(3, 20)], dtypes=(BF16, F32)), library()

    plans = [
        _load.plan_grouped(num_tokens, 140, 70, 3, 20, backward=backward, dropout=True, sms=library.sms)
        for backward in (False, True)
    ]
    forward = grouped_ops.forward(case, 0.1, SEED, library=library)
    assert library.launches() == planned(plans[0])
    grouped_ops.backward(case, forward.xa, forward.mask, 0.1, library=library)
    assert library.launches() == planned(plans[1])
