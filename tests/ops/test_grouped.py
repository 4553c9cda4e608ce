"""lora_grouped_: rows that choose their adapters."""

from __future__ import annotations

import pytest
import torch
from support.groups import Grouped, random_groups
from support.layers import DTYPES, assert_errors_as_plain, saved_bytes
from torch import Tensor

from lora_ext import functional, reference

of_delta = pytest.mark.cpu_only("only the CPU's kernels sum as lora_delta_ does")

SEED = torch.tensor(0x1234_5678_9ABC_DEF0 >> 1)
DOUBLE = (torch.float64, torch.float64)


def ours(case: Grouped, y: Tensor, x: Tensor, *factors: Tensor, dropout_p: float = 0.0) -> Tensor:
    n = len(factors) // 2
    return functional.lora_grouped_(y.clone(), x, factors[:n], factors[n:], *case.choice(), dropout_p, SEED)


def plain(case: Grouped, y: Tensor, x: Tensor, *factors: Tensor, dropout_p: float = 0.0) -> Tensor:
    n = len(factors) // 2
    return (y + reference.lora_grouped(x, factors[:n], factors[n:], *case.choice(), dropout_p, SEED)).to(y.dtype)


def results(function, case: Grouped, dropout_p: float = 0.0) -> dict[str, Tensor]:
    leaves = [t.detach().clone().requires_grad_() for t in (case.y, case.x, *case.lora_As, *case.lora_Bs)]
    y = function(case, *leaves, dropout_p=dropout_p)
    grads = torch.autograd.grad(y, leaves, case.grad_y, materialize_grads=True)
    n = len(case.lora_As)
    found = {"y": y.detach(), "grad_y": grads[0], "grad_x": grads[1]}
    found |= {f"grad_A{i}": grad for i, grad in enumerate(grads[2 : 2 + n])}
    return found | {f"grad_B{i}": grad for i, grad in enumerate(grads[2 + n :])}


def assert_as_good_as_torch(case: Grouped, dropout_p: float = 0.0) -> None:
    """The error of each result is judged over all factors: those of few rows can be exact by chance."""
    compared = (
        results(ours, case, dropout_p),
        results(plain, case.to(torch.float64), dropout_p),
        results(plain, case, dropout_p),
    )
    joint = []
    for found in compared:
        names = {name.rstrip("0123456789") for name in found}
        parts = {name: [v for key, v in found.items() if key.rstrip("0123456789") == name] for name in names}
        joint.append({name: torch.cat([value.flatten() for value in values]) for name, values in parts.items()})
    assert_errors_as_plain([tuple(joint)], case.x.dtype, case.lora_As[0].dtype)


def all_of(group: int, num_tokens: int) -> Tensor:
    return torch.full((num_tokens,), group)


CASES = {
    "no rows": lambda dtypes: random_groups(0, (24, 20), [4, 3], dtypes),
    "one row": lambda dtypes: random_groups(1, (24, 20), [4], dtypes, groups=all_of(0, 1)),
    "one row of none": lambda dtypes: random_groups(1, (24, 20), [4], dtypes, groups=all_of(-1, 1)),
    "all of none": lambda dtypes: random_groups(9, (24, 20), [4, 3], dtypes, groups=all_of(-1, 9)),
    "matrices": lambda dtypes: random_groups(33, (63, 130), [1, 8, 17, 3], dtypes),
    "a stack": lambda dtypes: random_groups(70, (97, 131), [(5, 8)], dtypes),
    "ranks of a stack": lambda dtypes: random_groups(40, (64, 48), [(6, 16)], dtypes, ranks=True),
    "stacks and matrices": lambda dtypes: random_groups(
        50, (40, 24), [(3, 8), 5, (0, 2), (2, 16), 1], dtypes, ranks=True
    ),
    "a large rank": lambda dtypes: random_groups(37, (320, 257), [300, 2], dtypes),
    "panels and items": lambda dtypes: random_groups(
        700, (70, 40), [5, 3], dtypes, groups=(torch.arange(700) % 5 == 0) * 1
    ),
    "empty groups": lambda dtypes: random_groups(20, (24, 20), [3] * 9, dtypes, groups=torch.tensor([7, 2] * 10)),
}


@pytest.mark.pairs
@pytest.mark.parametrize("dropout_p", [0.0, 0.3])
@pytest.mark.parametrize("dtypes", DTYPES, ids=lambda d: f"{d[0]}-{d[1]}".replace("torch.", ""))
@pytest.mark.parametrize("name", CASES)
def test_values_and_gradients(name, dtypes, dropout_p):
    assert_as_good_as_torch(CASES[name](dtypes), dropout_p)


def test_a_thousand_groups():
    case = random_groups(1500, (16, 24), [(600, 4), *[2] * 400])
    assert_as_good_as_torch(case)


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
    found = results(ours, case, dropout_p)
    for g, (A, B) in enumerate(case.pairs()):
        rows = case.group_of_row == g
        if len(A) == 0:
            assert torch.equal(found["y"][rows], case.y[rows]) and not found["grad_x"][rows].any()
            continue
        x, A, B = (t.detach().clone().requires_grad_() for t in (case.x, A, B))
        y = functional.lora_delta_(case.y.clone(), x, A, B, float(case.scalings[g]), dropout_p, SEED)
        (grad_x,) = torch.autograd.grad(y, x, case.grad_y)
        assert torch.equal(found["y"][rows], y[rows]) and torch.equal(found["grad_x"][rows], grad_x[rows])
    rows = case.group_of_row == -1
    assert torch.equal(found["y"][rows], case.y[rows]) and not found["grad_x"][rows].any()


@of_delta
@pytest.mark.parametrize("dtypes", DTYPES[:5], ids=lambda d: f"{d[0]}-{d[1]}".replace("torch.", ""))
def test_gradients_of_factors_of_few_rows_have_the_bits_of_lora_delta(dtypes):
    case = random_groups(90, (130, 70), [8, 17, 3], dtypes, groups=torch.arange(90) % 3)
    found = results(ours, case)
    for g, (A, B) in enumerate(case.pairs()):
        rows = case.group_of_row == g
        A, B = (t.detach().clone().requires_grad_() for t in (A, B))
        y = functional.lora_delta_(case.y[rows], case.x[rows], A, B, float(case.scalings[g]))
        grads = torch.autograd.grad(y, (A, B), case.grad_y[rows])
        assert torch.equal(found[f"grad_A{g}"], grads[0]) and torch.equal(found[f"grad_B{g}"], grads[1])


def test_the_mask_is_that_of_all_rows():
    case = random_groups(40, (70, 20), [4, 3])
    _, mask = torch.ops.lora_ext.lora_grouped_(*case.args(), 0.3, SEED)
    expected = torch.ops.lora_ext.lora_dropout_mask(SEED, 40, 70, 0.3)
    keep = [reference.unpack_mask(bits, 70) for bits in (mask, expected)]
    assert torch.equal(*keep)


@pytest.mark.cpu_only("about threads of the CPU's kernels")
def test_the_same_bits_with_any_number_of_threads():
    case = random_groups(900, (70, 40), [5, (2, 3)], groups=torch.arange(900) // 450)
    found = []
    threads = torch.get_num_threads()
    try:
        for number in (1, 2, 3):
            torch.set_num_threads(number)
            found.append(results(ours, case, 0.3))
    finally:
        torch.set_num_threads(threads)
    for other in found[1:]:
        assert all(torch.equal(other[name], value) for name, value in found[0].items())


# --- forms of the arguments -------------------------------------------------------------------------------------------


def test_a_stack_and_a_list_of_its_slots_are_the_same():
    case = random_groups(30, (24, 20), [(4, 8)])
    listed = Grouped(**vars(case) | {"lora_As": list(case.lora_As[0]), "lora_Bs": list(case.lora_Bs[0])})
    of_stack, of_list = results(ours, case), results(ours, listed)
    assert torch.equal(of_stack["y"], of_list["y"]) and torch.equal(of_stack["grad_x"], of_list["grad_x"])
    for name in ("grad_A", "grad_B"):
        assert torch.equal(of_stack[f"{name}0"], torch.stack([of_list[f"{name}{i}"] for i in range(4)]))
    y = functional.lora_grouped_(case.y.clone(), case.x, case.lora_As[0], case.lora_Bs[0], *case.choice())
    assert torch.equal(y, of_stack["y"])
    scalings = case.scalings.tolist()
    y = functional.lora_grouped_(case.y.clone(), case.x, case.lora_As, case.lora_Bs, case.group_of_row, scalings)
    assert torch.equal(y, of_stack["y"])


def test_padding_of_slots_is_not_read():
    case = random_groups(30, (24, 20), [(4, 8)], ranks=True)
    expected = results(ours, case)
    for g, rank in enumerate(case.ranks.tolist()):
        case.lora_As[0][g, rank:] = torch.nan
        case.lora_Bs[0][g, :, rank:] = torch.nan
    for name, value in results(ours, case).items():
        assert torch.equal(value, expected[name]), name


@pytest.mark.parametrize("shape", [(), (4,), (4, 3), (4, 3, 2)], ids=str)
def test_group_of_row_has_the_first_dimensions_of_x(shape):
    group = torch.randint(-1, 3, shape)
    case = random_groups(0, (24, 20), [4, 3, 2], leading=(4, 3, 2), groups=group)
    whole = group.reshape(*shape, *[1] * (3 - len(shape))).expand(4, 3, 2)
    each = Grouped(**vars(case) | {"group_of_row": whole})
    expected = results(ours, each, 0.3)
    for name, value in results(ours, case, 0.3).items():
        assert torch.equal(value, expected[name]), name
    assert_as_good_as_torch(case, 0.3)


def test_tensors_of_any_strides():
    case = random_groups(30, (24, 20), [(4, 8), 3], groups=torch.randint(-1, 5, (30,)))
    expected = results(ours, case, 0.3)
    n = len(case.lora_As)
    x = case.x.T.contiguous().T
    wide = case.grad_y.repeat(1, 2)[:, :20]
    As = [case.lora_As[0].mT.contiguous().mT, case.lora_As[1].repeat(2, 2)[:3, :24]]
    Bs = [case.lora_Bs[0].permute(1, 2, 0).contiguous().permute(2, 0, 1), case.lora_Bs[1].repeat(1, 2)[:, :3]]
    choice = case.group_of_row.repeat_interleave(2)[::2], case.scalings.repeat_interleave(2)[::2]
    leaves = [t.detach().requires_grad_() for t in (x, *As, *Bs)]
    y = functional.lora_grouped_(
        case.y.clone(), leaves[0], leaves[1 : 1 + n], leaves[1 + n :], *choice, None, 0.3, SEED
    )
    grads = torch.autograd.grad(y, leaves, wide)
    names = ["grad_x", *(f"grad_A{i}" for i in range(n)), *(f"grad_B{i}" for i in range(n))]
    assert torch.equal(y, expected["y"])
    for name, grad in zip(names, grads, strict=True):
        assert torch.equal(grad, expected[name]), name


def test_slots_that_are_part_of_wider_storage_are_not_copied():
    storage_A, storage_B = torch.randn(5, 32, 64), torch.randn(5, 48, 32)
    A, B = storage_A[1:4, :8, :40], storage_B[1:4, :, 16:24]
    case = random_groups(20, (40, 48), [(3, 8)], groups=torch.randint(3, (20,)))
    y = functional.lora_grouped_(case.y.clone(), case.x, A, B, *case.choice())
    expected = functional.lora_grouped_(case.y.clone(), case.x, A.contiguous(), B.contiguous(), *case.choice())
    assert torch.equal(y, expected)


def test_groups_of_no_rows():
    """Each entry of group_of_row stands for no row: gradients are zero, and written."""
    case = random_groups(0, (24, 20), [4, 3], leading=(3, 0), groups=torch.tensor([0, 1, -1]))
    garbage = [torch.full((4, 24), torch.nan) for _ in range(50)]
    del garbage  # memory that the gradients are likely to get
    grads = torch.ops.lora_ext.lora_grouped_backward(
        case.grad_y, case.x, case.lora_As, case.lora_Bs, *case.choice(), torch.zeros(0, 4), None, 0.0, [True] * 5
    )
    assert grads[0].shape == (3, 0, 24) and not any(grad.any() for grad in (*grads[1], *grads[2]))


def test_no_features():
    assert_as_good_as_torch(random_groups(9, (0, 20), [4, 3]))
    assert_as_good_as_torch(random_groups(9, (24, 0), [4, 3]))


# --- what is kept and computed ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("wanted", [(i >> 0 & 1, i >> 1 & 1, i >> 2 & 1, i >> 3 & 1, i >> 4 & 1) for i in range(1, 32)])
def test_only_what_is_wanted_is_computed_and_kept(wanted):
    case = random_groups(12, (24, 20), [4, 3], DOUBLE)
    leaves = [case.y, case.x, *case.lora_As, *case.lora_Bs]
    for leaf, is_wanted in zip((case.x, *case.lora_As, *case.lora_Bs), wanted, strict=True):
        leaf.requires_grad_(bool(is_wanted))
    used = [leaf for leaf in leaves if leaf.requires_grad]
    outputs = []
    saved = saved_bytes(lambda: outputs.append(ours(case, *leaves, dropout_p=0.3)))
    expected = plain(case, *leaves, dropout_p=0.3)
    torch.testing.assert_close(outputs[0], expected)
    grads = [torch.autograd.grad(y, used, case.grad_y, materialize_grads=True) for y in (outputs[0], expected)]
    torch.testing.assert_close(*grads)
    shapes = [shape for shape, _ in saved]
    assert (tuple(case.x.shape) in shapes) == any(wanted[1:3])
    assert ((12, 4) in shapes) == any(wanted[3:])  # xa
    assert tuple(case.grad_y.shape) not in shapes  # y is not kept


def test_the_gradient_of_a_group_without_rows_is_zero():
    case = random_groups(8, (24, 20), [4, (2, 3)], groups=all_of(1, 8))
    found = results(ours, case)
    assert not found["grad_A0"].any() and not found["grad_B0"].any()
    assert found["grad_A1"][0].any() and not found["grad_A1"][1].any() and not found["grad_B1"][1].any()


def test_xa_is_zero_beyond_the_rank():
    case = random_groups(30, (24, 20), [(4, 8), 3], ranks=True)
    xa, _ = torch.ops.lora_ext.lora_grouped_(*case.args())
    ranks = torch.cat([case.ranks, torch.zeros(1, dtype=torch.int64)])[case.group_of_row]
    assert xa.shape == (30, 8) and not xa[torch.arange(8) >= ranks[:, None]].any()


# --- every instruction set --------------------------------------------------------------------------------------------
