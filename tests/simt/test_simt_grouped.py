"""Tests the CUDA kernels of lora_grouped_, for mixed batches, through their bindings."""

from __future__ import annotations

from functools import partial

import pytest
import torch
from support.layers import dtypes_id
from support.op_table import OPS, assert_bits, grouped, results
from torch import Tensor

from lora_ext import _load, reference
from simt.driver import FEW_SMS, SMS, Emulated, check, planned, run

pytestmark = [pytest.mark.cpu_only("emulates the CUDA kernels on the CPU"), pytest.mark.full]

OP = "lora_grouped_"
BF16, F16, F32, F64 = torch.bfloat16, torch.float16, torch.float32, torch.float64
BF16S, F16S, DEFAULT = (BF16, BF16), (F16, F16), (BF16, F32)


@pytest.mark.parametrize("dropout_p", [0.0, 0.3])
@pytest.mark.parametrize("dtypes", [DEFAULT, (F16, F32), (BF16, F64), (F16, BF16)], ids=dtypes_id)
@pytest.mark.parametrize("num_tokens", [13, 90])
def test_factors_of_other_dtypes(num_tokens, dtypes, dropout_p):
    make = partial(grouped, tokens=num_tokens, features=(600, 130), entries=[4, (3, 8), 17], ranks=True)
    check(OP, make, dtypes, dropout_p)


@pytest.mark.parametrize("num_tokens", [13, 90])
def test_the_smallest_dropout(num_tokens):
    """Drops two of 117,000 elements of x, which are large: y is as if they were zero."""
    p, seed = 2.0**-16, 5
    sample = grouped(BF16S, tokens=num_tokens, features=(117_000 // num_tokens, 20), entries=[4, 3])
    x = sample.call["x"]
    dropped = ~reference.dropout_keep(seed, *x.shape, p)
    assert dropped.sum() == 2
    x[dropped] = 1000.0
    found = run(OP, sample.with_dropout(p, torch.tensor(seed)), ())
    x[dropped] = 0.0
    torch.testing.assert_close(found, run(OP, sample, ()))


@pytest.mark.parametrize("dtypes", [F16S, BF16S], ids=str)
def test_chunks_of_a_large_group(dtypes):
    """Groups 0 and 2 have two chunks of rows, group 1 has one."""
    groups = torch.tensor([0] * 520 + [1] * 20 + [2] * 520)[torch.randperm(1060)]
    check(OP, partial(grouped, tokens=1060, entries=[5, 3, 2], groups=groups), dtypes)


def test_more_entries_than_a_launch_carries():
    check(
        OP, partial(grouped, tokens=100, features=(200, 200), entries=[2] * 40 + [(3, 4)] + [1] * 30, ranks=True), BF16S
    )
    check(OP, partial(grouped, tokens=9, entries=[2] * 70), BF16S)


@pytest.mark.parametrize("dtypes", [(F16, torch.float32), BF16S], ids=str)
@pytest.mark.parametrize("num_tokens", [9, 80])
def test_ranges_of_features_and_several_steps(num_tokens, dtypes):
    check(OP, partial(grouped, tokens=num_tokens, features=(840, 600), entries=[8, (2, 20)]), dtypes, sms=FEW_SMS)


@pytest.mark.parametrize("num_tokens", [9, 100])
@pytest.mark.parametrize("dtypes", [DEFAULT, BF16S], ids=str)
def test_views_with_any_strides(num_tokens, dtypes):
    """Rows of x and grad_y with gaps, not aligned to 16 bytes; slots and rows of the factors with gaps."""

    def make(dtypes):
        sample = grouped(dtypes, tokens=num_tokens, features=(72, 48), entries=[(2, 8)])
        wide_x, wide_y = (torch.randn(num_tokens, 90).to(dtypes[0]) for _ in range(2))
        sample.call["x"], sample.grads = wide_x[:, 1:73], [wide_y[:, 3:51]]
        sample.call["lora_As"] = [torch.randn(2, 8, 80).to(dtypes[1])[:, :, :72]]
        sample.call["lora_Bs"] = [torch.randn(2, 48, 12).to(dtypes[1])[:, :, :8]]
        return sample

    check(OP, make, dtypes)


def assert_nan_only_in(rows: Tensor, found: dict[str, Tensor]) -> None:
    for name in ("result 0", "grad of x"):
        assert torch.equal(found[name].isnan().all(-1), rows) and torch.equal(found[name].isnan().any(-1), rows)
    assert not any(value.isnan().any() for name, value in found.items() if "lora_" in name)


@pytest.mark.parametrize("num_tokens", [30, 150])
def test_numbers_that_do_not_exist_give_nan_to_their_rows_only(num_tokens):
    sample = grouped(BF16S, tokens=num_tokens, features=(72, 48), entries=[4, (2, 8)], ranks=True)
    expected = run(OP, sample)
    bad = torch.zeros(num_tokens, dtype=torch.bool)
    for row, group in {0: 3, 5: -2, 7: 1 << 40}.items():
        sample.call["group_of_row"][row], bad[row] = group, True
    found = run(OP, sample)
    assert_nan_only_in(bad, found)
    assert all(torch.equal(found[name][~bad], expected[name][~bad]) for name in ("result 0", "grad of x"))


@pytest.mark.parametrize("rank", [-1, 9, 1 << 40])
@pytest.mark.parametrize("num_tokens", [30, 150])
def test_ranks_that_do_not_exist_give_nan_to_their_rows_only(num_tokens, rank):
    sample = grouped(BF16S, tokens=num_tokens, features=(72, 48), entries=[4, (2, 8)])
    sample.call["ranks"] = torch.tensor([4, rank, 8])
    assert_nan_only_in(sample.call["group_of_row"] == 1, run(OP, sample))


@pytest.mark.parametrize("dtypes", [F16S, BF16S], ids=str)
def test_infinite_inputs_leave_the_gradients_of_unused_ranks_zero(dtypes):
    sample = grouped(dtypes, tokens=90, features=(72, 48), entries=[(2, 8)], groups=torch.arange(90) % 2)
    sample.call["ranks"] = torch.tensor([3, 8])
    sample.call["x"][0, 0] = sample.grads[0][2, 1] = torch.inf
    found = run(OP, sample)
    grad_A, grad_B = found["grad of lora_As[0]"][0], found["grad of lora_Bs[0]"][0]
    assert not grad_A[3:].any() and not grad_B[:, 3:].any() and grad_A[:3].isnan().any()
    with Emulated():
        xa, _ = torch.ops.lora_ext.lora_grouped_(**sample.call)
    assert not xa[::2, 3:].any() and xa[0, :3].isinf().all()


def test_gradients_of_some_entries():
    sample = grouped(BF16S, tokens=90, features=(40, 24), entries=[4, 3, (2, 5)])
    with Emulated():
        every, one = (results(OPS[OP].run, sample, leaves) for leaves in (OPS[OP].leaves(sample), [("lora_As", 1)]))
    assert_bits(one, {name: every[name] for name in one})


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
    check(OP, partial(grouped, tokens=70, entries=[(300, 4)], groups=groups), BF16S)


@pytest.mark.parametrize(
    ("num_tokens", "num_groups"), [(128, 1000), (8192, 64), (65, 0), (100, 1), (3000, 2500), (1025, 3)]
)
def test_the_index_finds_the_rows_of_every_group(num_tokens, num_groups):
    """Rows of one group, of none and of one that does not exist lie anywhere; each slot's only row is its number."""
    groups = torch.randint(-1, num_groups, (num_tokens,))
    groups[::50] = num_groups + 7
    assert _load.plan_grouped(num_tokens, 4096, 4096, num_groups, 16).launches[0].blocks == 1
    sample = grouped(BF16S, tokens=num_tokens, features=(8, 8), entries=[(num_groups, 1)], groups=groups)
    number = torch.arange(num_groups)
    for name, part in (("lora_As", number % 64), ("lora_Bs", number // 64)):
        sample.call[name][0].copy_(part.view(-1, 1, 1).expand_as(sample.call[name][0]))
    sample.call["x"].fill_(0).select(1, 0).fill_(1)
    sample.call["y"].zero_()
    sample.call["scalings"].fill_(1)
    for schedule in (0, 1):
        found = run(OP, sample, (), schedule=schedule)
        known = groups.clamp(-1, num_groups)
        expected = torch.cat([(number % 64) * (number // 64), torch.tensor([torch.nan, 0.0])])[known]
        torch.testing.assert_close(found["result 0"][:, 0], expected.to(BF16), rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize("sms", [SMS, FEW_SMS])
@pytest.mark.parametrize("num_tokens", [20, 90, 1100])
def test_the_kernels_are_launched_as_planned(num_tokens, sms):
    gpu = check(OP, partial(grouped, tokens=num_tokens, features=(140, 70), entries=[(3, 20)]), DEFAULT, 0.1, sms=sms)
    for (_, launches), backward in zip(gpu.calls, (False, True), strict=True):
        plan = _load.plan_grouped(num_tokens, 140, 70, 3, 20, backward=backward, dropout=True, sms=sms)
        assert launches == planned(plan)
