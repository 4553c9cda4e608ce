"""lora_grouped_linear: when its kernel is called, its bits, and what is not finite. Its arithmetic: test_values.py."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from support.layers import with_threads
from support.op_table import DOUBLE, OPS, grouped_linear, results
from torch.profiler import ProfilerActivity, profile

from lora_ext import functional
from lora_ext.nn.base_product import has_kernel

OP = OPS["lora_grouped_linear"]
SOME = dict(features=(70, 37), entries=((5, 16), 3, 40))
on_cpu = pytest.mark.cpu_only("the op has a kernel on the CPU only")


def calls_kernel(function: Callable[[], object]) -> bool:
    with profile(activities=[ProfilerActivity.CPU]) as profiler:
        function()
    return "lora_ext::lora_grouped_linear" in {event.name for event in profiler.events()}


@on_cpu
def test_the_kernel_computes_where_no_gradient_is_wanted():
    sample = grouped_linear(DOUBLE, tokens=12, **SOME)
    for place in OP.leaves(sample, with_frozen=True):
        assert not calls_kernel(lambda place=place: results(OP.run, sample, [place]))
    sample.call["lora_Bs"][1].requires_grad_()
    with torch.no_grad():
        torch.testing.assert_close(results(OP.run, sample, []), results(OP.plain, sample, []))
        assert calls_kernel(lambda: results(OP.run, sample, []))


@on_cpu
@pytest.mark.parametrize("features", [(514, 260), (1030, 1030)], ids=str)
@pytest.mark.parametrize("num_tokens", [4, 20, 64, 300])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_same_bits_with_any_number_of_threads(dtype, num_tokens, features):
    """If PyTorch multiplies by the weight (small weights, other machines), where F.linear has the same bits, too."""
    call = grouped_linear((dtype, torch.float32), tokens=num_tokens, features=features, entries=((5, 16), 3)).call
    layer = call["x"], call["weight"], call["bias"]
    found = with_threads((1, 2, 3), lambda: (functional.lora_grouped_linear(**call), F.linear(*layer)))
    for y, base in found[1:]:
        assert torch.equal(y, found[0][0]) or not (has_kernel(*layer[:2]) or torch.equal(base, found[0][1]))


def test_what_is_not_finite_stays_in_its_row():
    call = grouped_linear(tokens=20, groups=torch.arange(20) % 7 - 1, **SOME).call
    expected = functional.lora_grouped_linear(**call)
    call["x"][3, 5] = torch.inf
    y = functional.lora_grouped_linear(**call)
    others = torch.arange(20) != 3
    assert torch.equal(y[others], expected[others]) and not y[3].isfinite().any()
