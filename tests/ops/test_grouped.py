"""Mixed batches: the bits of lora_delta_, forms of the factors, a pool's slots, groups of no rows.

test_values.py has the arithmetic of lora_grouped_ and lora_grouped_linear.
"""

from __future__ import annotations

import pytest
import torch
from support.groups import Grouped, random_groups
from support.layers import DTYPES, with_threads
from support.op_table import (
    FLOAT,
    OPS,
    SEED,
    assert_as_good_as_plain,
    assert_bits,
    grouped,
    grouped_linear,
    of_groups,
    results,
)
from torch import Tensor
from torch._dynamo.testing import CompileCounterWithBackend

from lora_ext import functional

OP, LINEAR = OPS["lora_grouped_"], OPS["lora_grouped_linear"]
of_delta = pytest.mark.cpu_only("only the CPU's kernels sum as lora_delta_ does")
reads_values = pytest.mark.cpu_only("CUDA kernels cannot refuse: the rows become NaN (test_cuda.py)")


def found_in(case: Grouped, dropout_p: float = 0.0) -> dict[str, Tensor]:
    sample = of_groups(case).with_dropout(dropout_p)
    return results(OP.run, sample, OP.leaves(sample))


@pytest.mark.cpu_only("the kernel is the CPU's")
@pytest.mark.parametrize("num_tokens", [5, 33])
def test_many_groups_and_wide_layers(num_tokens):
    sample = grouped_linear(tokens=num_tokens, features=(2050, 1030), entries=((200, 64),))
    torch.testing.assert_close(results(LINEAR.run, sample, []), results(LINEAR.plain, sample, []), rtol=1e-4, atol=1e-3)


# --- the bits of lora_delta_ ------------------------------------------------------------------------------------------


@pytest.mark.pairs
@of_delta
@pytest.mark.parametrize("dropout_p", [0.0, 0.3])
@pytest.mark.parametrize("dtypes", DTYPES, ids=lambda d: f"{d[0]}-{d[1]}".replace("torch.", ""))
@pytest.mark.parametrize("rows", ["many", "few"])
def test_rows_have_the_bits_of_lora_delta(rows, dtypes, dropout_p):
    """With the same seed, all rows have one mask: lora_delta_ gets all of x, and the group's rows are compared.

    Groups of one to four rows have kernels of their own.
    """
    groups = torch.randint(-1, 6, (100,))
    if rows == "few":
        groups = torch.arange(-1, 6).repeat_interleave(torch.tensor([1, 2, 3, 4, 5, 1, 1]))[torch.randperm(17)]
    case = random_groups(len(groups), (515, 257), [8, 17, (3, 40), 100], dtypes, ranks=True, groups=groups)
    found = found_in(case, dropout_p)
    y, grad_x = found["result 0"], found["grad of x"]
    for g, (A, B) in enumerate(case.pairs()):
        rows = case.group_of_row == g
        if len(A) == 0:
            assert torch.equal(y[rows], case.y[rows]) and not grad_x[rows].any()
            continue
        x = case.x.detach().requires_grad_()
        expected = functional.lora_delta_(case.y.clone(), x, A, B, float(case.scalings[g]), dropout_p, SEED)
        (expected_grad,) = torch.autograd.grad(expected, x, case.grad_y)
        assert torch.equal(y[rows], expected[rows]) and torch.equal(grad_x[rows], expected_grad[rows])
    rows = case.group_of_row == -1
    assert torch.equal(y[rows], case.y[rows]) and not grad_x[rows].any()


@of_delta
@pytest.mark.parametrize("dtypes", DTYPES[:5], ids=lambda d: f"{d[0]}-{d[1]}".replace("torch.", ""))
def test_gradients_of_factors_of_few_rows_have_the_bits_of_lora_delta(dtypes):
    case = random_groups(90, (130, 70), [8, 17, 3], dtypes, groups=torch.arange(90) % 3)
    found = found_in(case)
    for g, (A, B) in enumerate(case.pairs()):
        rows = case.group_of_row == g
        A, B = (t.detach().clone().requires_grad_() for t in (A, B))
        y = functional.lora_delta_(case.y[rows], case.x[rows], A, B, float(case.scalings[g]))
        grads = torch.autograd.grad(y, (A, B), case.grad_y[rows])
        assert torch.equal(found[f"grad of lora_As[{g}]"], grads[0])
        assert torch.equal(found[f"grad of lora_Bs[{g}]"], grads[1])


@pytest.mark.cpu_only("about threads of the CPU's kernels")
def test_the_same_bits_with_any_number_of_threads():
    case = random_groups(900, (70, 40), [5, (2, 3)], groups=torch.arange(900) // 450)
    found = with_threads((1, 2, 3), lambda: found_in(case, 0.3))
    assert_bits(found[1], found[0])
    assert_bits(found[2], found[0])


# --- forms of the arguments -------------------------------------------------------------------------------------------


def test_a_stack_and_a_list_of_its_slots_are_the_same():
    case = random_groups(30, (24, 20), [(4, 8)])
    listed = Grouped(**vars(case) | {"lora_As": list(case.lora_As[0]), "lora_Bs": list(case.lora_Bs[0])})
    of_stack, of_list = found_in(case), found_in(listed)
    for what in ("lora_As", "lora_Bs"):
        of_list[f"grad of {what}[0]"] = torch.stack([of_list.pop(f"grad of {what}[{i}]") for i in range(4)])
    assert_bits(of_list, of_stack)
    for As, Bs, scalings in (
        (case.lora_As[0], case.lora_Bs[0], case.scalings),
        (case.lora_As, case.lora_Bs, case.scalings.tolist()),
    ):
        y = functional.lora_grouped_(case.y.clone(), case.x, As, Bs, case.group_of_row, scalings)
        assert torch.equal(y, of_stack["result 0"])


@pytest.mark.parametrize("op", [OP, LINEAR], ids=lambda op: op.name)
def test_padding_of_slots_is_not_read(op):
    sample = (grouped if op is OP else grouped_linear)(tokens=30, entries=[(4, 8)], ranks=True)
    expected = results(op.run, sample, op.leaves(sample))
    for g, rank in enumerate(sample.call["ranks"].tolist()):
        sample.call["lora_As"][0][g, rank:] = torch.nan
        sample.call["lora_Bs"][0][g, :, rank:] = torch.nan
    assert_bits(results(op.run, sample, op.leaves(sample)), expected)


def test_what_no_row_chooses_may_be_anything():
    """A slot of a pool may hold garbage while it is filled."""
    call = grouped(groups=torch.tensor([3, 0, -1, 0, 0, 3]), ranks=True).call
    expected = functional.lora_grouped_(**call | {"y": call["y"].clone()})
    call["scalings"][1], call["ranks"][2] = torch.nan, 99
    call["lora_As"][0][1:] = torch.nan
    assert torch.equal(functional.lora_grouped_(**call), expected)


@pytest.mark.parametrize("shape", [(), (4,), (4, 3), (4, 3, 2)], ids=str)
def test_group_of_row_has_the_first_dimensions_of_x(shape):
    group = torch.randint(-1, 3, shape)
    case = random_groups(0, (24, 20), [4, 3, 2], leading=(4, 3, 2), groups=group)
    whole = group.reshape(*shape, *[1] * (3 - len(shape))).expand(4, 3, 2)
    assert_bits(found_in(case, 0.3), found_in(Grouped(**vars(case) | {"group_of_row": whole}), 0.3))
    assert_as_good_as_plain(OP, lambda _: of_groups(case), FLOAT, 0.3)


def test_choices_of_any_strides():
    case = random_groups(30, (24, 20), [(4, 8), 3], groups=torch.randint(-1, 5, (30,)))
    expected = found_in(case, 0.3)
    case.group_of_row = case.group_of_row.repeat_interleave(2)[::2]
    case.scalings = case.scalings.repeat_interleave(2)[::2]
    assert_bits(found_in(case, 0.3), expected)


def test_a_saved_mask_may_lie_at_any_byte():
    """Kernels read words of the mask, which may be packed with other saved tensors."""
    case = random_groups(40, (100, 24), [8, (2, 4)], (torch.bfloat16, torch.bfloat16))
    xa, mask = torch.ops.lora_ext.lora_grouped_(*case.args(), 0.3, torch.tensor(3))
    moved = torch.zeros(mask.numel() + 3, dtype=torch.uint8)[3:].view_as(mask).copy_(mask)

    def gradients(mask):
        grad_x, *factors = torch.ops.lora_ext.lora_grouped_backward(
            case.grad_y, case.x, case.lora_As, case.lora_Bs, *case.choice(), xa, mask, 0.3, [True] * 5
        )
        return [grad_x, *factors[0], *factors[1]]

    assert all(map(torch.equal, gradients(moved), gradients(mask)))


def test_xa_is_zero_beyond_the_rank():
    case = random_groups(30, (24, 20), [(4, 8), 3], ranks=True)
    xa, _ = torch.ops.lora_ext.lora_grouped_(*case.args())
    ranks = torch.cat([case.ranks, torch.zeros(1, dtype=torch.int64)])[case.group_of_row]
    assert xa.shape == (30, 8) and not xa[torch.arange(8) >= ranks[:, None]].any()


def test_a_pool_of_slots_changes_without_another_graph():
    case = random_groups(6, (24, 20), [(3, 4)], ranks=True, groups=torch.randint(-1, 3, (6,)))
    counter = CompileCounterWithBackend("aot_eager")
    torch._dynamo.reset()
    compiled = torch.compile(lambda y, x, *rest: functional.lora_grouped_(y * 1, x, *rest), backend=counter)
    for _ in range(3):
        case.lora_As[0].normal_(), case.lora_Bs[0].normal_(), case.scalings.uniform_()
        case.ranks.copy_(torch.randint(5, (3,))), case.group_of_row.copy_(torch.randint(-1, 3, (6,)))
        expected = functional.lora_grouped_(*case.args())
        torch.testing.assert_close(compiled(*case.args()), expected)
    assert counter.frame_count == 1


# --- refusals of values and of shared memory; test_bad_arguments.py has the others ------------------------------------

BAD_VALUES = {
    "group too large": ({"group_of_row": torch.tensor([4, 0, 0, 0, 0, 0])}, r"group_of_row\[0\] is 4, want -1 \(none"),
    "group too small": ({"group_of_row": torch.tensor([0, 0, -2, 0, 0, 0])}, r"group_of_row\[2\] is -2, want -1 \(non"),
    "one group": ({"group_of_row": torch.tensor(9)}, r"group_of_row is 9, want -1 \(none\) to 3"),
    "a scaling": ({"scalings": 1 / torch.tensor([1, 1, 0, 1]).double()}, r"scalings\[2\] is inf, want a finite"),
    "a rank": ({"ranks": torch.tensor([4, 4, 4, 3])}, r"ranks\[3\] is 3, want 0 to 2, the rank of lora_As\[1\]"),
    "a negative rank": ({"ranks": torch.tensor([-1, 4, 4, 2])}, r"ranks\[0\] is -1, want 0 to 4"),
}


@reads_values
@pytest.mark.parametrize("requires_grad", [False, True])
@pytest.mark.parametrize("op", [OP, LINEAR], ids=lambda op: op.name)
@pytest.mark.parametrize("case", BAD_VALUES)
def test_values_are_refused_and_nothing_changes(case, op, requires_grad):
    change, text = BAD_VALUES[case]
    make = grouped if op is OP else grouped_linear
    call = make(groups=torch.tensor([3, 0, -1, 2, 0, 1]), ranks=True).call | change
    call["x"].requires_grad_(requires_grad)
    before = call["y"].clone() if "y" in call else None
    with pytest.raises(ValueError, match=f"^lora_grouped_(linear)?: {text}"):
        getattr(functional, op.name)(**call)
    with pytest.raises((RuntimeError, ValueError), match="lora_grouped_(linear)?: "):
        getattr(torch.ops.lora_ext, op.name)(**call)
    assert before is None or torch.equal(call["y"], before)


@reads_values
def test_the_position_of_a_bad_group_has_every_dimension():
    call = grouped(leading=(2, 3)).call
    with pytest.raises(ValueError, match=r"group_of_row\[1, 2\] is 5, want"):
        functional.lora_grouped_(**call | {"group_of_row": torch.tensor([[0, 1, 2], [3, -1, 5]])})


@pytest.mark.parametrize("op", [OP, LINEAR], ids=lambda op: op.name)
def test_scalings_that_require_a_gradient_are_refused(op):
    call = (grouped if op is OP else grouped_linear)().call
    call["scalings"].requires_grad_()
    for function in (getattr(functional, op.name), getattr(torch.ops.lora_ext, op.name)):
        with pytest.raises(RuntimeError, match="scalings requires grad, but the op computes no gradient of it; detach"):
            function(**call)


@pytest.mark.parametrize("requires_grad", [False, True])
def test_a_y_that_shares_memory_is_refused(requires_grad):
    square, A, B = torch.randn(6, 20), torch.randn(4, 20, requires_grad=requires_grad), torch.randn(20, 4)
    row = torch.randn(1, 80)
    choice = torch.zeros(6, dtype=torch.int64), torch.ones(1).double()
    with pytest.raises(ValueError, match="lora_grouped_: y shares memory with x"):
        functional.lora_grouped_(square, square, [A], [B], *choice)
    with pytest.raises(ValueError, match=r"lora_grouped_: y shares memory with lora_Bs\[0\]"):
        functional.lora_grouped_(row[:, :20], torch.randn(1, 20), [A], [row.view(20, 4)], choice[0][:1], choice[1])
