"""Mixed batches: the bits of lora_delta_, forms of the factors, a pool's slots, groups of no rows.

test_values.py has the arithmetic of lora_grouped_ and lora_grouped_linear.
"""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from support.layers import DTYPES, dtypes_id, of_dtypes, with_threads
from support.op_table import (
    DOUBLE,
    OPS,
    SEED,
    assert_bits,
    factors_of_groups,
    grouped,
    grouped_linear,
    results,
)
from torch._dynamo.testing import CompileCounterWithBackend
from torch.profiler import ProfilerActivity, profile

from lora_ext import functional

OP, LINEAR = OPS["lora_grouped_"], OPS["lora_grouped_linear"]
each_op = pytest.mark.parametrize("op", [OP, LINEAR], ids=lambda op: op.name)
of_delta = pytest.mark.cpu_only("only the CPU's kernels sum as lora_delta_ does")
has_kernel = pytest.mark.cpu_only("lora_grouped_linear has a kernel on the CPU only")
SOME = dict(features=(70, 37), entries=((5, 16), 3, 40))
reads_values = pytest.mark.cpu_only("CUDA kernels cannot refuse: the rows become NaN (test_cuda.py)")


def calls_kernel(function: Callable[[], object]) -> bool:
    with profile(activities=[ProfilerActivity.CPU]) as profiler:
        function()
    return "lora_ext::lora_grouped_linear" in {event.name for event in profiler.events()}


@has_kernel
def test_the_kernel_computes_where_no_gradient_is_wanted():
    sample = grouped_linear(DOUBLE, tokens=12, **SOME)
    for place in LINEAR.leaves(sample, with_frozen=True):
        assert not calls_kernel(lambda place=place: results(LINEAR.run, sample, [place]))
    sample.call["lora_Bs"][1].requires_grad_()
    with torch.no_grad():
        torch.testing.assert_close(results(LINEAR.run, sample, []), results(LINEAR.plain, sample, []))
        assert calls_kernel(lambda: results(LINEAR.run, sample, []))


def test_what_is_not_finite_stays_in_its_row():
    call = grouped_linear(tokens=20, groups=torch.arange(20) % 7 - 1, **SOME).call
    expected = functional.lora_grouped_linear(**call)
    call["x"][3, 5] = torch.inf
    y = functional.lora_grouped_linear(**call)
    others = torch.arange(20) != 3
    assert torch.equal(y[others], expected[others]) and not y[3].isfinite().any()


@pytest.mark.full(but=2)
@has_kernel
@pytest.mark.parametrize("num_tokens", [5, 33])
def test_many_groups_and_wide_layers(num_tokens):
    sample = grouped_linear(tokens=num_tokens, features=(2050, 1030), entries=((200, 64),))
    torch.testing.assert_close(results(LINEAR.run, sample, []), results(LINEAR.plain, sample, []), rtol=1e-4, atol=1e-3)


# --- the bits of lora_delta_ ------------------------------------------------------------------------------------------


@pytest.mark.pairs
@of_delta
@pytest.mark.parametrize("dropout_p", [0.0, 0.3])
@of_dtypes
@pytest.mark.parametrize("rows", ["many", "few"])
def test_rows_have_the_bits_of_lora_delta(rows, dtypes, dropout_p):
    """With the same seed, all rows have one mask: lora_delta_ gets all of x, and the group's rows are compared.

    Groups of one to four rows have kernels of their own.
    """
    groups = torch.randint(-1, 6, (100,))
    if rows == "few":
        groups = torch.arange(-1, 6).repeat_interleave(torch.tensor([1, 2, 3, 4, 5, 1, 1]))[torch.randperm(17)]
    options = dict(features=(515, 257), entries=[8, 17, (3, 40), 100], ranks=True, groups=groups)
    sample = grouped(dtypes, tokens=len(groups), **options)
    call, found = sample.call, OP.results(sample.with_dropout(dropout_p))
    y, grad_x = found["result 0"], found["grad of x"]
    untouched = groups == -1
    for g, (A, B) in enumerate(factors_of_groups(call)):
        rows, rank, scaling = groups == g, int(call["ranks"][g]), float(call["scalings"][g])
        if rank == 0:
            untouched |= rows
            continue
        x = call["x"].detach().requires_grad_()
        expected = functional.lora_delta_(call["y"].clone(), x, A[:rank], B[:, :rank], scaling, dropout_p, SEED)
        (expected_grad,) = torch.autograd.grad(expected, x, sample.grads)
        assert torch.equal(y[rows], expected[rows]) and torch.equal(grad_x[rows], expected_grad[rows])
    assert torch.equal(y[untouched], call["y"][untouched]) and not grad_x[untouched].any()


@of_delta
@pytest.mark.parametrize("dtypes", DTYPES[:5], ids=dtypes_id)
def test_gradients_of_factors_of_few_rows_have_the_bits_of_lora_delta(dtypes):
    sample = grouped(dtypes, tokens=90, features=(130, 70), entries=[8, 17, 3], groups=torch.arange(90) % 3)
    call, found = sample.call, OP.results(sample)
    for g, pair in enumerate(factors_of_groups(call)):
        rows = call["group_of_row"] == g
        A, B = (factor.detach().requires_grad_() for factor in pair)
        y = functional.lora_delta_(call["y"][rows], call["x"][rows], A, B, float(call["scalings"][g]))
        grads = torch.autograd.grad(y, (A, B), sample.grads[0][rows])
        assert torch.equal(found[f"grad of lora_As[{g}]"], grads[0])
        assert torch.equal(found[f"grad of lora_Bs[{g}]"], grads[1])


@pytest.mark.cpu_only("about threads of the CPU's kernels")
def test_the_same_bits_with_any_number_of_threads():
    sample = grouped(tokens=900, features=(70, 40), entries=[5, (2, 3)], groups=torch.arange(900) // 450)
    first, *others = with_threads((1, 2, 3), lambda: OP.results(sample.with_dropout(0.3)))
    for found in others:
        assert_bits(found, first)


# --- forms of the arguments -------------------------------------------------------------------------------------------


def test_a_stack_and_a_list_of_its_slots_are_the_same():
    sample = grouped(tokens=30, entries=[(4, 8)])
    call, of_stack = sample.call, OP.results(sample)
    (As,), (Bs,) = call["lora_As"], call["lora_Bs"]
    sample.call = call | {"lora_As": list(As), "lora_Bs": list(Bs)}
    of_list = OP.results(sample)
    for what in ("lora_As", "lora_Bs"):
        of_list[f"grad of {what}[0]"] = torch.stack([of_list.pop(f"grad of {what}[{i}]") for i in range(4)])
    assert_bits(of_list, of_stack)
    for form in ({"lora_As": As, "lora_Bs": Bs}, {"scalings": call["scalings"].tolist()}):
        y = functional.lora_grouped_(**call | form | {"y": call["y"].clone()})
        assert torch.equal(y, of_stack["result 0"])


@each_op
def test_numbers_that_no_row_chooses_may_be_anything(op):
    """A slot of a pool may hold garbage while it is filled; its factors are NaN in all samples of groups with ranks."""
    sample = op.small(groups=torch.tensor([3, 0, -1, 0, 0, 3]))
    assert sample.call["lora_As"][0][1:].isnan().all()
    expected = op.results(sample)
    sample.call["scalings"][1], sample.call["ranks"][2] = torch.nan, 99
    assert_bits(op.results(sample), expected)


def test_xa_is_zero_beyond_the_rank():
    call = grouped(tokens=30, entries=[(4, 8), 3], ranks=True).call
    xa, _ = torch.ops.lora_ext.lora_grouped_(**call)
    ranks = torch.cat([call["ranks"], torch.zeros(1, dtype=torch.int64)])[call["group_of_row"]]
    assert xa.shape == (30, 8) and not xa[torch.arange(8) >= ranks[:, None]].any()


def test_a_pool_of_slots_changes_without_another_graph():
    call = grouped(entries=[(3, 4)], ranks=[4, 4, 4]).call
    counter = CompileCounterWithBackend("aot_eager")
    torch._dynamo.reset()
    compiled = torch.compile(lambda y, **call: functional.lora_grouped_(y * 1, **call), backend=counter)
    for _ in range(3):
        call["lora_As"][0].normal_(), call["lora_Bs"][0].normal_(), call["scalings"].uniform_()
        call["ranks"].copy_(torch.randint(5, (3,))), call["group_of_row"].copy_(torch.randint(-1, 3, (6,)))
        expected = functional.lora_grouped_(**call | {"y": call["y"].clone()})
        torch.testing.assert_close(compiled(**call), expected)
    assert counter.frame_count == 1


# --- refusals of values; test_bad_arguments.py has the others ---------------------------------------------------------

BAD_VALUES = {
    "group too large": ("group_of_row", [[4, 0, 0], [0, 0, 0]], r"\[0, 0\] is 4, want -1 \(none"),
    "group too small": ("group_of_row", [[0, 0, 0], [0, -2, 0]], r"\[1, 1\] is -2, want -1 \(none"),
    "group of a prompt": ("group_of_row", [0, 5], r"\[1\] is 5, want -1 \(none"),
    "one group": ("group_of_row", 9, r" is 9, want -1 \(none\) to 3"),
    "a scaling": ("scalings", [1.0, 1.0, torch.inf, 1.0], r"\[2\] is inf, want a finite"),
    "a rank": ("ranks", [4, 4, 4, 3], r"\[3\] is 3, want 0 to 2, the rank of lora_As\[1\]"),
    "a negative rank": ("ranks", [-1, 4, 4, 2], r"\[0\] is -1, want 0 to 4"),
}


@reads_values
@pytest.mark.parametrize("requires_grad", [False, True])
@each_op
@pytest.mark.parametrize("case", BAD_VALUES)
def test_values_are_refused_and_nothing_changes(case, op, requires_grad):
    argument, values, text = BAD_VALUES[case]
    call = op.small(leading=(2, 3), groups=torch.tensor([[3, 0, -1], [2, 0, 1]])).call
    call[argument] = torch.tensor(values, dtype=call[argument].dtype)
    call["x"].requires_grad_(requires_grad)
    before = call["y"].clone() if "y" in call else None
    with pytest.raises(ValueError, match=f"^lora_grouped_(linear)?: {argument}{text}"):
        getattr(functional, op.name)(**call)
    with pytest.raises((RuntimeError, ValueError), match="lora_grouped_(linear)?: "):
        getattr(torch.ops.lora_ext, op.name)(**call)
    assert before is None or torch.equal(call["y"], before)


@each_op
def test_scalings_that_require_a_gradient_are_refused(op):
    call = op.small().call
    call["scalings"].requires_grad_()
    for function in (getattr(functional, op.name), getattr(torch.ops.lora_ext, op.name)):
        with pytest.raises(RuntimeError, match="scalings requires grad, but the op computes no gradient of it; detach"):
            function(**call)
