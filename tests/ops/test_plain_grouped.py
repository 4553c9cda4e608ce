"""Tests ``lora_grouped_`` in plain PyTorch, which float32 and float64 take on CUDA, against the compiled op."""

from __future__ import annotations

import pytest
import torch
from support.groups import Grouped, random_groups
from support.op_table import OPS, Sample
from torch import Tensor

from lora_ext._ops import plain_grouped

pytestmark = pytest.mark.cpu_only("compares with the CPU's kernels, which take these dtypes")

F32, F64, BF16 = torch.float32, torch.float64, torch.bfloat16
PLAIN, OURS = torch.ops.lora_ext_plain, torch.ops.lora_ext

TABLE = OPS["lora_grouped_"]
CASES = TABLE.samples | TABLE.empty


def case_of(sample: Sample) -> Grouped:
    return Grouped(**{"ranks": None} | sample.call, grad_y=sample.grads[0])


def results(ops, case: Grouped, dropout_p: float, wanted: list[bool] | None = None) -> list[Tensor]:
    y, n = case.y.clone(), len(case.lora_As)
    factors, choice = (case.lora_As, case.lora_Bs), case.choice()
    xa, mask = ops.lora_grouped_(y, case.x, *factors, *choice, dropout_p, torch.tensor(3))
    xa, mask = (value[0] if isinstance(value, list) else value for value in (xa, mask))
    saved = xa, mask, dropout_p
    grads = ops.lora_grouped_backward(case.grad_y, case.x, *factors, *choice, *saved, wanted or [True] * (2 * n + 1))
    grads = [grad for part in grads if part is not None for grad in ([part] if isinstance(part, Tensor) else part)]
    return [y, xa, mask, *grads]


@pytest.mark.parametrize("dropout_p", [0.0, 0.3])
@pytest.mark.parametrize("dtypes", [(F32, F32), (F64, F64), (F32, BF16)], ids=str)
@pytest.mark.parametrize("name", CASES)
def test_results_are_those_of_the_kernels(name, dtypes, dropout_p):
    case = case_of(CASES[name](dtypes))
    found, expected = results(PLAIN, case, dropout_p), results(OURS, case, dropout_p)
    assert len(found) == len(expected)
    for value, wanted in zip(found, expected, strict=True):
        eps = torch.finfo(value.dtype).eps if value.is_floating_point() else 0.0
        largest = wanted.abs().max().item() if wanted.numel() else 0.0
        near = 16 * torch.finfo(dtypes[0]).eps * largest  # sums in another order
        torch.testing.assert_close(value, wanted, rtol=2 * eps, atol=near)


@pytest.mark.parametrize("wanted", [[True, False, False], [False, True, False], [False, False, True]], ids=str)
def test_only_what_is_wanted(wanted):
    case = random_groups(30, (24, 20), [4], (F32, F32))
    found, expected = results(PLAIN, case, 0.0, wanted), results(OURS, case, 0.0, wanted)
    assert len(found) == len(expected) == 4
    torch.testing.assert_close(found[3], expected[3], rtol=0, atol=1e-5)


def test_what_does_not_exist_gives_nan_to_its_rows_only():
    """The compiled CPU op refuses these, a kernel on CUDA cannot."""
    case = random_groups(20, (24, 20), [4, (2, 8)], (F32, F32), groups=torch.arange(20) % 3)
    case.ranks = torch.tensor([4, 8, 8])
    expected = results(PLAIN, case, 0.0)
    case.group_of_row[0], case.group_of_row[5], case.group_of_row[7] = 3, -2, 1 << 40
    case.ranks = torch.tensor([4, 9, 8])
    bad = (case.group_of_row == 1) | ~torch.isin(case.group_of_row, torch.tensor([-1, 0, 1, 2]))
    y, xa, _, grad_x, *grads = results(PLAIN, case, 0.0)
    for value, before in ((y, expected[0]), (grad_x, expected[3])):
        assert value[bad].isnan().all() and torch.equal(value[~bad], before[~bad])
    assert not any(grad.isnan().any() for grad in grads) and not xa.isnan().any()


def test_a_row_meets_no_other_groups_factors():
    """NaN in unused slots and ranks reaches nothing."""
    case = random_groups(40, (24, 20), [(3, 8)], (F32, F32), groups=torch.arange(40) % 2)
    case.ranks = torch.tensor([3, 8, 8])
    clean = results(PLAIN, case, 0.0)
    case.lora_As[0][2] = case.lora_Bs[0][2] = torch.nan
    case.lora_As[0][0, 3:] = case.lora_Bs[0][0, :, 3:] = torch.nan
    assert all(torch.equal(value, before) for value, before in zip(results(PLAIN, case, 0.0), clean, strict=True))
    case.x[0, 0] = case.grad_y[2, 1] = torch.inf  # rows of group 0
    grad_A, grad_B = results(PLAIN, case, 0.0)[-2:]
    assert not grad_A[0, 3:].any() and not grad_B[0, :, 3:].any() and grad_A[0, :3].isnan().any()
    assert not grad_A[1:].isnan().any() and not grad_B[1:].isnan().any()


def test_rows_are_gathered_in_parts(monkeypatch):
    case = random_groups(20, (24, 20), [4, 3], (F32, F32))
    whole = results(PLAIN, case, 0.2)
    monkeypatch.setattr(plain_grouped, "_ROWS", 7)
    for value, wanted in zip(results(PLAIN, case, 0.2), whole, strict=True):
        torch.testing.assert_close(value, wanted)
