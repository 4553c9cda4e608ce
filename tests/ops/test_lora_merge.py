"""Merge and unmerge of weights: every bit of the result is defined, and every bit is restored."""

from __future__ import annotations

import pytest
import torch
from support.layers import of_dtypes
from support.merging import FLOATING, bits, hard_weight, merged, packed_layers, same_bits, update_factors
from support.op_table import linear
from support.properties import given, settings, st

from lora_ext import functional, reference
from lora_ext.merging.weights import merge_all_, pack_factors, unmerge_all_


def dtype_id(value) -> str:
    return str(value).replace("torch.", "")


@of_dtypes
@pytest.mark.parametrize("shape", [(1, 1, 1), (5, 3, 2), (17, 9, 17), (259, 2, 3)], ids=str)
def test_is_the_definition_to_the_bit(shape, dtypes):
    in_features, out_features, rank = shape
    weight = hard_weight(out_features, in_features, dtypes[0])
    A, B, scaling = update_factors(weight, rank, 0.3, dtypes[1])
    expected, version = merged(weight, [(A, B, scaling)]), weight._version
    functional.lora_merge_(weight, A, B, scaling)
    assert same_bits(weight, expected) and weight._version > version


@of_dtypes
@pytest.mark.parametrize("shape", [(64, 48, 17), (97, 131, 8), (513, 257, 33)], ids=str)
def test_is_the_correctly_rounded_sum_of_the_reference(shape, dtypes):
    call = linear(dtypes, size=(1, *shape)).call
    weight, A, B = (call[name] for name in ("weight", "lora_A", "lora_B"))
    exact = (weight.double() + 0.75 * (B.double() @ A.double())).to(dtypes[0])
    expected = reference.merge(weight, A, B, 0.75)
    functional.lora_merge_(weight, A, B, 0.75)
    # The float32 sum may fall on the other side of a tie: at most one unit in the last place, rarely for 16 bits.
    eps = torch.finfo(dtypes[0]).eps
    accumulation = 1e-13 if dtypes[0] == torch.float64 else 1e-5
    assert ((weight.double() - exact.double()).abs() <= eps * exact.double().abs() + accumulation).all()
    if dtypes[0] in (torch.bfloat16, torch.float16):
        assert (weight != exact).float().mean() < 0.01
        assert (weight != expected).float().mean() < 0.01


# --- restoring --------------------------------------------------------------------------------------------------------


def extra_bytes(record: functional.MergeRecord) -> int:
    return record.nbytes - record.lora_A.nbytes - record.lora_B.nbytes


@settings(max_examples=200, deadline=None)
@given(
    dtype=st.sampled_from(FLOATING),
    rows=st.integers(1, 20),
    cols=st.one_of(st.integers(1, 40), st.integers(250, 270), st.just(512)),
    rank=st.integers(1, 20),
    value=st.sampled_from([None, None, None, 0.0, -0.0, 1.0]),
    weight_exponent=st.integers(-20, 14),
    update_exponent=st.integers(-100, 14),
    padding=st.integers(0, 3),
    seed=st.integers(0, 2**64 - 1),
)
def test_any_weight_any_update(dtype, rows, cols, rank, value, weight_exponent, update_exponent, padding, seed):
    """Merges into a part of a tensor, rounding to nearest or, for 16-bit weights and odd seeds, stochastically."""
    torch.manual_seed(seed % 2**32)
    rounding = seed if seed % 2 and dtype.itemsize == 2 else None
    whole = torch.zeros(rows + 2, cols + 2 * padding, dtype=dtype)
    part = slice(1, -1), slice(padding, padding + cols)
    whole[part] = hard_weight(rows, cols, dtype, 2.0**weight_exponent) if value is None else value
    before, expected = whole.clone(), whole.clone()
    factors = update_factors(whole[part], rank, 2.0**update_exponent)
    try:
        record = functional.lora_merge_(whole[part], *factors, seed=rounding)
    except ValueError as error:
        assert dtype == torch.float16 and "overflows torch.float16" in str(error)
    else:
        alone = before[part].clone()
        functional.lora_merge_(alone, *factors, seed=rounding)
        expected[part] = alone
        assert same_bits(whole, expected)
        # At most the weight's bytes, and two for each segment.
        assert extra_bytes(record) <= alone.nbytes + 2 * rows * (-(-cols // 256))
        assert functional.lora_unmerge_(weight := whole[part], record) is weight
    assert same_bits(whole, before)


@settings(max_examples=60, deadline=None)
@given(dtype=st.sampled_from(FLOATING), seed=st.integers(0, 2**32))
def test_any_bit_patterns(dtype, seed):
    """Weights and factors of arbitrary bits are either refused and untouched, or restored."""
    torch.manual_seed(seed)
    integers = bits(torch.empty(0, dtype=dtype)).dtype
    patterns = torch.randint(-(2**63), 2**63 - 1, (4, 260)).to(integers)
    weight = patterns.view(dtype)
    if seed % 4:
        weight = torch.where(weight.isfinite(), weight, 1.0)
    before = weight.clone()
    A = torch.randn(2, 260) * 2.0 ** (seed % 64 - 32)
    B = torch.randn(4, 2)
    try:
        record = functional.lora_merge_(weight, A, B, 1.0)
    except ValueError as error:
        assert "NaN or infinite" in str(error)
    else:
        functional.lora_unmerge_(weight, record)
    assert same_bits(weight, before)


def test_a_scaling_of_zero_and_no_corrections():
    weight = torch.randn(8, 300)
    before = weight.clone()
    record = functional.lora_merge_(weight, torch.randn(2, 300), torch.randn(8, 2), 0.0)
    assert same_bits(weight, before) and record.words is None and record.corrections is None
    weight[0, 0] = -0.0  # becomes 0.0
    record = functional.lora_merge_(weight, torch.randn(2, 300), torch.randn(8, 2), 0.0)
    assert record.corrections.numel() == 1 and not same_bits(weight, before)
    functional.lora_unmerge_(weight, record)
    assert weight[0, 0].signbit()


@pytest.mark.parametrize("update, most", [(0.005, 0.05), (0.03, 0.13), (0.1, 0.27)])
def test_the_record_is_small(update, most):
    weight = torch.randn(512, 1024) * 0.02
    A, B, scaling = update_factors(weight, 8, 0.02 * update)
    record = functional.lora_merge_(weight, A, B, scaling)
    assert 0 < extra_bytes(record) / weight.numel() < most


def test_flushing_subnormals_in_between_changes_nothing():
    weight = hard_weight(8, 300, torch.float32, 1e-38)
    before = weight.clone()
    A, B, scaling = update_factors(weight, 3, 1e-40)
    record = functional.lora_merge_(weight, A, B, scaling)
    try:
        flushes = torch.set_flush_denormal(True)
        functional.lora_unmerge_(weight, record)
    finally:
        torch.set_flush_denormal(False)
    assert flushes and same_bits(weight, before)


def test_layers_of_all_dtypes_together_are_each_alone():
    shapes = [(7, 300, 3), (64, 20, 1), (1, 1, 2), (0, 5, 2), (5, 0, 2), (33, 513, 17)] * 7
    groups = [packed_layers(dtype, shapes, (0.1 * i for i in range(1, 43))).values() for dtype in FLOATING]
    weights, As, Bs = ([tensor for tensors in lists for tensor in tensors] for lists in zip(*groups, strict=True))
    before, alone = ([weight.clone() for weight in weights] for _ in range(2))
    for weight, A, B in zip(alone, As, Bs, strict=True):
        merge_all_("test", [weight], [A], [B], record=False)
    records = merge_all_("test", weights, As, Bs)
    assert all(map(same_bits, weights, alone))
    unmerge_all_("test", weights[::-1], records[::-1])
    assert all(map(same_bits, weights, before))


# --- refusals ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("record", [True, False])
@pytest.mark.parametrize(
    "change, reason",
    [
        ("overflow", r"the sum overflows torch.float16 \(at most 65504\)"),
        ("weight nan", "the weight has NaN or infinite values"),
        ("weight inf", "the weight has NaN or infinite values"),
        ("factor nan", "the adapter has NaN or infinite values"),
        ("factor inf", "the adapter has NaN or infinite values"),
        ("factor of a zero", "the adapter has NaN or infinite values"),
        ("row", "the adapter has NaN or infinite values"),
    ],
)
def test_what_is_not_finite_is_refused_and_changes_nothing(change, reason, record):
    weight = hard_weight(9, 300, torch.float16)
    A, B = torch.randn(2, 300), torch.randn(9, 2)
    if change == "overflow":
        weight[4, 299] = 65504.0
        B[4] = torch.tensor([40.0, 0.0])
        A[0, 299] = 1.0
    elif change == "factor of a zero":  # inf * 0 is NaN
        A[1, 7], B[:, 1] = float("inf"), 0.0
    elif change == "row":  # its 300 columns, not their padding
        B[4, 1] = float("inf")
    else:
        target = {"weight": weight, "factor": A}[change.split()[0]]
        target[1, 7] = float(change.split()[1])
    count = {"factor": 9, "row": 300}.get(change.split()[0], 1)
    before, version = weight.clone(), weight._version
    with pytest.raises(ValueError, match=f"would make {count} of 2700 elements of weight NaN or infinite: {reason}"):
        A, B = pack_factors(weight.dtype, [(A, B, 1.0)])
        merge_all_("test", [weight], [A], [B], record=record)
    assert same_bits(weight, before) and weight._version == version


def test_without_a_record_only_the_cpu_refuses_what_is_not_finite():
    """On CUDA nothing waits for the GPU to tell."""
    weight = torch.full((2, 3), 65504.0, dtype=torch.float16)
    arguments = torch.tensor([[16.0, 0.0, 0.0]]), torch.ones(2, 1), 1.0
    if weight.is_cuda:
        functional.lora_merge_(weight, *arguments, record=False)
    else:
        with pytest.raises(ValueError, match="would make 2 of 6"):
            functional.lora_merge_(weight, *arguments, record=False)
    assert weight.isinf().sum() == (2 if weight.is_cuda else 0)
    with pytest.raises(ValueError, match="NaN or infinite"):
        functional.lora_merge_(weight, *arguments)


def test_the_largest_finite_results_are_not_refused():
    weight = torch.tensor([[65504.0, -65504.0, 65472.0]], dtype=torch.float16)
    before = weight.clone()
    # 65519 rounds to 65504, and 65520 to infinity.
    record = functional.lora_merge_(weight, torch.tensor([[15.0, -15.0, 47.0]]), torch.tensor([[1.0]]), 1.0)
    assert weight.tolist() == [[65504.0, -65504.0, 65504.0]]
    functional.lora_unmerge_(weight, record)
    assert same_bits(weight, before)
    with pytest.raises(ValueError, match="would make 1 of 3"):
        functional.lora_merge_(weight, torch.tensor([[16.0, -15.0, 0.0]]), torch.tensor([[1.0]]), 1.0)


@pytest.mark.parametrize("record", [True, False])
@pytest.mark.parametrize("dtype", FLOATING, ids=dtype_id)
def test_what_was_merged_before_a_refusal_is_restored(dtype, record):
    """On the CPU the refusal comes after most rows are merged. NaN payloads are restored too."""
    weights, As, Bs = packed_layers(dtype, [(40, 300, 5), (170, 530, 5), (9, 20, 5)], [0.03] * 3).values()
    patterns = torch.randint(-(2**63), 2**63 - 1, weights[1][::7].shape).to(bits(weights[1]).dtype)
    weights[1][::7] = patterns.view(dtype)  # NaNs of all kinds, in rows of every thread
    # Factors with different NaNs: products may have the bits of any of them.
    not_numbers = torch.full((2,), -1, dtype=bits(Bs[1]).dtype).view(Bs[1].dtype)
    Bs[1][3, :2], As[1][4, 1], As[1][4, 2] = not_numbers, float("nan"), -float("inf")
    expected = (weights[1].to(As[1].dtype) + Bs[1] @ As[1]).to(dtype).isfinite().logical_not().sum()
    before, versions = [weight.clone() for weight in weights], [weight._version for weight in weights]
    with pytest.raises(ValueError, match=f"would make {expected} of {weights[1].numel()} elements of second NaN"):
        merge_all_("test", weights, As, Bs, ["first", "second", "third"], record=record)
    assert all(map(same_bits, weights, before)) and [weight._version for weight in weights] == versions


def test_a_weight_that_is_not_the_merged_one():
    weight = torch.randn(8, 300)
    record = functional.lora_merge_(weight, *update_factors(weight, 3, 0.1))
    after = weight.clone()
    with pytest.raises(TypeError, match=r"lora_unmerge_: weight is torch.float16 now, but torch.float32 was merged"):
        functional.lora_unmerge_(weight.half(), record)
    with pytest.raises(ValueError, match=r"weight has shape \[8, 299\], but \[8, 300\] was merged"):
        functional.lora_unmerge_(weight[:, :299], record)
    assert same_bits(weight, after)


def test_a_record_of_other_things():
    weight, A, B = torch.randn(3, 4), torch.randn(2, 4), torch.randn(3, 2)
    for wrong, error, message in (
        ({"words": "lora"}, TypeError, "MergeRecord: words is 'lora' of type str, want a torch.Tensor or None"),
        ({"dtype": "float32"}, TypeError, "MergeRecord: dtype is 'float32' of type str, want a torch.dtype"),
        ({"lora_A": torch.randn(4)}, ValueError, r"lora_unmerge_: the record's lora_A has shape \[4\], want 2 dimens"),
        ({"lora_B": torch.tensor(1.0)}, ValueError, r"lora_unmerge_: the record's lora_B has shape \[\], want 2 dim"),
    ):
        with pytest.raises(error, match=message):
            values = {"lora_A": A, "lora_B": B, "dtype": weight.dtype} | wrong
            functional.lora_unmerge_(weight, functional.MergeRecord(**values))


def test_a_scaling_beyond_64_bits():
    weight, A, B = torch.zeros(3, 4), torch.randn(2, 4), torch.randn(3, 2)
    functional.lora_merge_(weight, A, B, 2**70)
    torch.testing.assert_close(weight, 2.0**70 * (B @ A))
