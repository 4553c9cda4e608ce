"""The CPU kernels of every instruction set, and either base product: the op tests run with each; merges agree."""

from __future__ import annotations

import hashlib
import os
from pathlib import Path

import pytest
import torch
from support.layers import with_threads
from support.merging import FLOATING, hard_weight, same_bits, update_factors
from support.processes import run_python

from lora_ext import _load, functional

pytestmark = [pytest.mark.cpu_only("is about the CPU kernels"), pytest.mark.full]

# The tests of the kernels' results. One process runs all of them, because imports take longer than most of them.
TESTS = {
    "test_values": [
        "test_values_and_gradients",
        "test_layers_together_have_the_bits_of_one_by_one",
        "test_any_number_of_threads",
        "test_tensors_of_any_strides",
    ],
    "test_lora_linear": ["test_mask_is_the_reference_mask"],
    "test_roundings": ["test_every_number_rounds_to_the_nearest", "test_what_is_not_finite_stays_so"],
    "test_siblings": ["test_an_overflow_stays_in_its_layer_and_is_nan_at_scaling_zero"],
    "test_base_product": [
        "test_outputs_have_the_same_bits_with_any_number_of_threads",
        "test_outputs_of_mixed_batches_have_the_same_bits_with_any_number_of_threads",
        "test_a_row_does_not_depend_on_the_rows_around_it",
        "test_before_training_the_output_has_the_bits_of_the_base_layer",
        "test_what_is_not_finite_stays_in_its_row",
        "test_tensors_of_any_strides",
    ],
    "test_few_tokens": ["test_for_how_many_tokens_the_kernel_is_used"],
    "test_grouped": [
        "test_rows_have_the_bits_of_lora_delta",
        "test_gradients_of_factors_of_few_rows_have_the_bits_of_lora_delta",
        "test_the_same_bits_with_any_number_of_threads",
    ],
    "test_instruction_sets": ["test_merges_agree_to_the_bit_with_any_number_of_threads"],
}
DIGEST = "LORA_EXT_TEST_DIGEST"


ISAS = ["generic", "avx2", "avx512", "avx512_bf16", "amx"]
LOWEST_AND_HIGHEST = ("generic", [isa for isa in ISAS if isa in _load.available_cpu_isas()][-1])


@pytest.mark.parametrize(
    "isa", [isa if isa in LOWEST_AND_HIGHEST else pytest.param(isa, marks=pytest.mark.slow) for isa in ISAS]
)
def test_ops(isa):
    if isa not in _load.available_cpu_isas():
        pytest.skip(f"this machine does not run {isa}")
    if isa == _load.cpu_isa():
        pytest.skip(f"{isa} is in use: the tests themselves run with it")
    run_tests(TESTS, LORA_EXT_CPU_ISA=isa, LORA_EXT_BASE_PRODUCT="own", **{DIGEST: digest_of_merges()})


@pytest.mark.parametrize("who", ["own", "library"])
def test_base_products(who):
    if who == _load.base_product():
        pytest.skip(f"{who} is in use: the tests themselves run with it")
    tests = {name: TESTS[name] for name in ("test_values", "test_base_product")}
    run_tests(tests, without=f"{OTHERS} or {WITHOUT_WEIGHT} or {OTHER_DTYPES}", LORA_EXT_BASE_PRODUCT=who)


# Ops whose kernels are those of lora_linear, of bits that test_layers_together_... compares, and of lora_shrink; and a
# sample of hundreds of groups, which takes half a second.
OTHERS = "(test_values_and_gradients or any_number or of_any_strides) and (delta or siblings or bottleneck or hundreds)"

# Dtypes of x whose product is PyTorch's in any case.
OTHER_DTYPES = "-float16- or -float64-"

# Ops that do not multiply by a frozen weight.
WITHOUT_WEIGHT = "lora_shrink or lora_expand or (lora_grouped_ and not lora_grouped_linear)"


def run_tests(tests: dict[str, list[str]], without: str = OTHERS, **environment: str) -> None:
    paths = [f"{Path(__file__).parent / file}.py::{name}" for file, names in tests.items() for name in names]
    options = ["-x", "-q", "-p", "no:cacheprovider", "-p", "no:xdist", "-k", f"not ({without})"]
    result = run_python("-m", "pytest", *options, *paths, **environment)
    assert result.returncode == 0, result.stdout[-3000:] + result.stderr[-1000:]


def digest_of_merges() -> str:
    """Merges and unmerges weights that are large enough for three threads; returns a digest of all bits."""
    digest = hashlib.sha256()
    for dtype, seed in [*((dtype, None) for dtype in FLOATING), (torch.bfloat16, 5), (torch.float16, 5)]:
        for size in (1e-5, 0.1, 50.0):
            torch.manual_seed(3)
            weight = hard_weight(187, 531, dtype)
            before = weight.clone()
            record = functional.lora_merge_(weight, *update_factors(weight, 7, size), seed=seed)
            for tensor in (weight, record.words, record.corrections):
                digest.update(tensor.view(torch.int16).numpy().tobytes())
            functional.lora_unmerge_(weight, record)
            assert same_bits(weight, before)
    return digest.hexdigest()


def test_merges_agree_to_the_bit_with_any_number_of_threads():
    """And in the processes above with those of the instruction set that is in use."""
    digests = {*with_threads((1, 2, 3), digest_of_merges)}
    assert digests == {os.environ.get(DIGEST, next(iter(digests)))}
