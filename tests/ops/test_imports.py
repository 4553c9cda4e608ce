"""Tests that depend on the state and the environment of the process that imports lora_ext."""

from __future__ import annotations

import pytest
from support.processes import after_torch

pytestmark = [pytest.mark.cpu_only("starts processes"), pytest.mark.full]

PLAIN_STATE = """
with {context}:
    import lora_ext
    from lora_ext._ops.fast_path import takes_fast_path
    assert not takes_fast_path()
assert takes_fast_path()
"""
COUNTER = """
{first}
import sys
assert ("torch.utils.flop_counter" in sys.modules) == ("flop_counter" in {first!r})
import torch, lora_ext
from torch.utils.flop_counter import flop_registry
assert torch.ops.lora_ext.lora_linear in flop_registry
"""
WITH = """
import os
os.environ["{name}"] = "{value}"
import lora_ext
"""
COLUMN_APART = """
import torch
from lora_ext import functional

def apart(column):
    wide = torch.full((column.shape[0], 2), float("nan"), dtype=column.dtype)
    wide[:, 0] = column[:, 0]
    return wide.as_strided(column.shape, (2, 2))

for in_features, out_features in ((1, 40), (40, 1)):
    x, weight, A, B, grad_y = (
        torch.randn(shape).bfloat16()
        for shape in ((128, in_features), (out_features, in_features), (4, in_features), (out_features, 4),
                      (128, out_features))
    )
    x = (apart(x) if in_features == 1 else x).requires_grad_()
    with torch.backends.mkldnn.verbose(torch.backends.mkldnn.VERBOSE_ON):
        y = functional.lora_linear(x, weight, None, A, B, 1.0)
        (grad_x,) = torch.autograd.grad(y, x, apart(grad_y) if out_features == 1 else grad_y)
    # With AMX the tails of the last rows are whatever lies behind the tensor, also in nn.Linear.
    assert y[:96].isfinite().all() and grad_x[:96].isfinite().all()
"""
PROGRAMS = {
    "in inference mode": PLAIN_STATE.format(context="torch.inference_mode()"),
    "under autocast": PLAIN_STATE.format(context="torch.autocast('cpu')"),
    "before the counter": COUNTER.format(first="import lora_ext"),
    "after the counter": COUNTER.format(first="import torch.utils.flop_counter"),
    "an instruction set": WITH.format(name="LORA_EXT_CPU_ISA", value="mmx"),
    "a base product": WITH.format(name="LORA_EXT_BASE_PRODUCT", value="fast"),
    "a single column": WITH.format(name="LORA_EXT_BASE_PRODUCT", value="library") + COLUMN_APART,
}
PROGRAMS |= {name: f"import torch\n{PROGRAMS[name]}" for name in ("in inference mode", "under autocast")}


@pytest.fixture(scope="module")
def ends() -> dict[str, tuple[int, str]]:
    return after_torch(PROGRAMS)


@pytest.mark.parametrize("name", ["in inference mode", "under autocast"])
def test_the_plain_state_is_not_the_one_of_the_import(name, ends):
    assert ends[name] == (0, "")


@pytest.mark.parametrize("name", ["before the counter", "after the counter"])
def test_the_counter_of_operations_is_imported_by_its_users_only(name, ends):
    assert ends[name] == (0, "")


def test_an_unknown_choice_fails_the_import(ends):
    for name, text in (
        ("an instruction set", "LORA_EXT_CPU_ISA is 'mmx', want one of"),
        ("a base product", "LORA_EXT_BASE_PRODUCT is 'fast', want own or library"),
    ):
        status, said = ends[name]
        assert status == 1 and f"ImportError: lora_ext: {text}" in said


def test_a_single_column_is_passed_to_the_library_without_gaps(ends):
    """nn.Linear copies a column of strides (2, 2). As rows that are 2 apart, oneDNN with AMX reads the gaps."""
    status, said = ends["a single column"]
    assert status == 0, said
    products = [line for line in said.splitlines() if ",matmul," in line]
    if not products:
        pytest.skip("bfloat16 is not multiplied by oneDNN here")
    assert not any(":2x1:" in line for line in products), products
