"""Few tokens: a product of lora_ext streams the weight (csrc/cpu/gemm/few_tokens.inc); other calls use ATen's."""

from __future__ import annotations

import pytest
import torch
from support.layers import with_threads
from support.op_table import linear

from lora_ext import _load, functional
from lora_ext.nn.base_product import few_tokens


def test_for_how_many_tokens_the_kernel_is_used():
    multiplies_pairs = _load.cpu_isa() in ("avx512_bf16", "amx")
    numbers = {"float64": 8, "float32": 32, "bfloat16": 32 if multiplies_pairs else 8, "float16": 8}
    assert {dtype: _load.few_tokens(dtype) for dtype in numbers} == numbers


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_row_does_not_depend_on_the_number_of_threads(dtype):
    call = linear((dtype, dtype), size=(4, 600, 900, 16)).call
    results = with_threads((1, 2, 3), lambda: functional.lora_linear(**call))
    assert all(torch.equal(result, results[0]) for result in results)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("num_tokens", [1, 4, 9, 31, 32])
def test_a_row_has_the_same_bits_in_any_batch(num_tokens, dtype):
    """Which tells that the kernel computes it, and not the library. AMX's tiles are for three tokens and more."""
    if num_tokens > few_tokens(dtype):
        pytest.skip(f"the library multiplies {num_tokens} tokens of {dtype} here")
    call = linear((dtype, torch.float32), size=(32, 600, 200, 16)).call
    fewest = 3 if _load.cpu_isa() == "amx" and dtype == torch.bfloat16 and num_tokens > 2 else 1
    alone, batch = (functional.lora_linear(**call | {"x": call["x"][:n]}) for n in (fewest, num_tokens))
    assert torch.equal(batch[:fewest], alone)


@pytest.mark.large
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_tokens_far_apart(dtype):
    """Strides as in a long batch: the third row begins beyond 2**31 bytes. Only rows that are read take memory."""
    call = linear((dtype, dtype), size=(3, 40, 24, 4)).call
    distance = 2**31 // (2 * dtype.itemsize) + 8
    far = torch.empty(3 * distance, dtype=dtype).as_strided((3, 40), (distance, 1)).copy_(call["x"])
    assert torch.equal(functional.lora_linear(**call | {"x": far}), functional.lora_linear(**call))
