"""Runs csrc/bindings/cuda_merge.cpp on the CPU: its counts, records, and what it does when something fails.

The binding is compiled with a stand-in for its header cuda_stream.h, and with launches in plain C++ (merge_binding/).
"""

from __future__ import annotations

import functools

import pytest
import torch
from cpp import cuda_bindings
from support.merging import hard_weight, same_bits, update_factors
from torch import Tensor

from lora_ext.merging.weights import pack_factors

pytestmark = [pytest.mark.cpu_only("runs a CUDA binding on the CPU"), pytest.mark.full]

SCHEMAS = "kLoraMerge", "kLoraUnmerge", "kLoraMergeRecord", "kLoraMergeCheck"


@pytest.fixture(scope="module")
def ops(tmp_path_factory):
    return cuda_bindings.load(
        tmp_path_factory.mktemp("merge"), "cuda_merge", "merge_binding", SCHEMAS, "lora_ext_cuda_merge"
    )


def layers(size: float) -> tuple[list[Tensor], list[Tensor], list[Tensor]]:
    weights = [hard_weight(n, k + 3, torch.float32)[:, :k] for n, k in [(5, 300), (0, 5), (7, 1), (3, 0), (9, 600)]]
    factors = [pack_factors(torch.float32, [update_factors(weight, 3, size)]) for weight in weights]
    return weights, [A for A, _ in factors], [B for _, B in factors]


def copies(weights: list[Tensor]) -> list[Tensor]:
    return [weight.clone() for weight in weights]


all_same = functools.partial(map, same_bits)


@pytest.mark.parametrize("size", [1e-30, 0.1, 1e5])
def test_weights_and_records_are_those_of_the_cpu_op(ops, size):
    weights, As, Bs = layers(size)
    before, on_cpu = copies(weights), copies(weights)
    assert torch.equal(ops.lora_merge_check(weights, As, Bs), torch.zeros(5, dtype=torch.int64))
    result, expected = ops.lora_merge_record_(weights, As, Bs), torch.ops.lora_ext.lora_merge_record_(on_cpu, As, Bs)
    assert all(all_same(weights, on_cpu)) and torch.equal(result[0], expected[0])
    assert all(map(torch.equal, result[1] + result[2], expected[1] + expected[2]))
    ops.lora_unmerge_(weights, As, Bs, *result[1:])
    assert all(all_same(weights, before))
    ops.lora_merge_(weights, As, Bs)
    assert all(all_same(weights, on_cpu))


def test_results_that_are_not_finite_leave_the_weights(ops):
    weights, As, Bs = layers(0.1)
    weights[0][1, 1], As[4][1, 2] = float("inf"), float("nan")
    before = copies(weights)
    assert ops.lora_merge_check(weights, As, Bs).tolist() == [1, 0, 0, 0, 9]
    non_finite, words, corrections = ops.lora_merge_record_(weights, As, Bs)
    assert non_finite.tolist() == [1, 0, 0, 0, 9] and words == corrections == []
    assert all(all_same(weights, before))


def test_no_memory_for_the_record_leaves_the_weights(ops, monkeypatch):
    weights, As, Bs = layers(0.1)
    before = copies(weights)
    monkeypatch.setenv("LORA_EXT_TEST_NO_CORRECTIONS", "1")
    with pytest.raises(RuntimeError, match="lora_merge_record_: .*(out of memory|cannot allocate)"):
        ops.lora_merge_record_(weights, As, Bs)
    assert all(all_same(weights, before))
