"""Tests ``lora_grouped_`` in plain PyTorch, which float32 and float64 take on CUDA, against the compiled op."""

from __future__ import annotations

import pytest
import torch
from support.op_table import OPS, Sample, grouped
from torch import Tensor
from torch.utils import _pytree as pytree

from lora_ext._ops import plain_grouped

pytestmark = pytest.mark.cpu_only("compares with the CPU's kernels, which take these dtypes")

F32, F64, BF16 = torch.float32, torch.float64, torch.bfloat16
PLAIN, OURS = torch.ops.lora_ext_plain, torch.ops.lora_ext
SAMPLES = OPS["lora_grouped_"].samples | OPS["lora_grouped_"].empty


def results(ops, sample: Sample, dropout_p: float = 0.0, wanted: list[bool] | None = None) -> list[Tensor]:
    call = {"ranks": None} | sample.call | {"dropout_p": dropout_p}
    y = call.pop("y").clone()
    saved = ops.lora_grouped_(y, **call, seed=torch.tensor(3))
    xa, mask = (value[0] if isinstance(value, list) else value for value in saved)
    call |= {"xa": xa, "mask": mask, "output_mask": wanted or [True] * (2 * len(call["lora_As"]) + 1)}
    grads = pytree.tree_leaves(ops.lora_grouped_backward(sample.grads[0], **call))
    return [y, xa, mask, *(grad for grad in grads if grad is not None)]


@pytest.mark.parametrize("dropout_p", [0.0, 0.3])
@pytest.mark.parametrize("dtypes", [(F32, F32), (F64, F64), (F32, BF16)], ids=str)
@pytest.mark.parametrize("name", SAMPLES)
def test_results_are_those_of_the_kernels(name, dtypes, dropout_p):
    """Also compares samples in which the factors that no row may read are NaN."""
    sample = SAMPLES[name](dtypes)
    found, expected = results(PLAIN, sample, dropout_p), results(OURS, sample, dropout_p)
    assert len(found) == len(expected)
    for value, wanted in zip(found, expected, strict=True):
        eps = torch.finfo(value.dtype).eps if value.is_floating_point() else 0.0
        largest = wanted.abs().max().item() if wanted.numel() else 0.0
        near = 16 * torch.finfo(dtypes[0]).eps * largest  # sums in another order
        torch.testing.assert_close(value, wanted, rtol=2 * eps, atol=near)


@pytest.mark.parametrize("wanted", [[True, False, False], [False, True, False], [False, False, True]], ids=str)
def test_only_what_is_wanted(wanted):
    sample = grouped(tokens=30, entries=[4])
    found, expected = results(PLAIN, sample, wanted=wanted), results(OURS, sample, wanted=wanted)
    assert len(found) == len(expected) == 4
    torch.testing.assert_close(found[3], expected[3], rtol=0, atol=1e-5)


def test_what_does_not_exist_gives_nan_to_its_rows_only():
    """The compiled CPU op refuses these, a kernel on CUDA cannot."""
    sample = grouped(tokens=20, entries=[4, (2, 8)], groups=torch.arange(20) % 3, ranks=[4, 8, 8])
    expected, groups = results(PLAIN, sample), sample.call["group_of_row"]
    groups[0], groups[5], groups[7], sample.call["ranks"][1] = 3, -2, 1 << 40, 9
    bad = (groups == 1) | ~torch.isin(groups, torch.tensor([-1, 0, 1, 2]))
    y, xa, _, grad_x, *grads = results(PLAIN, sample)
    for value, before in ((y, expected[0]), (grad_x, expected[3])):
        assert value[bad].isnan().all() and torch.equal(value[~bad], before[~bad])
    assert not any(grad.isnan().any() for grad in grads) and not xa.isnan().any()


def test_infinite_rows_leave_the_gradients_of_other_groups_and_ranks():
    groups = torch.arange(40) % 2
    sample = grouped(tokens=40, entries=[(3, 8)], groups=groups, ranks=[3, 8, 8])
    sample.call["x"][0, 0] = sample.grads[0][2, 1] = torch.inf  # rows of group 0
    grad_A, grad_B = results(PLAIN, sample)[-2:]
    assert not grad_A[0, 3:].any() and not grad_B[0, :, 3:].any() and grad_A[0, :3].isnan().any()
    assert not grad_A[1:].isnan().any() and not grad_B[1:].isnan().any()


def test_rows_are_gathered_in_parts(monkeypatch):
    sample = grouped(tokens=20, entries=[4, 3])
    whole = results(PLAIN, sample, 0.2)
    monkeypatch.setattr(plain_grouped, "_ROWS", 7)
    torch.testing.assert_close(results(PLAIN, sample, 0.2), whole)
