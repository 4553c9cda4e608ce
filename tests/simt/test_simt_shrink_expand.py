"""Tests the CUDA kernels of lora_shrink, lora_expand and their backwards on the CPU, like test_simt_kernels.py."""

from __future__ import annotations

import pytest
import torch
from support.layers import assert_errors_as_plain, in_dtypes_of, misaligned
from torch import Tensor

from simt import ops

pytestmark = [pytest.mark.cpu_only("emulates the CUDA kernels on the CPU"), pytest.mark.full]

SHAPES = [(1, 64, 8), (7, 5, 3), (33, 130, 17), (70, 515, 8), (40, 257, 100), (20, 136, 40)]  # tokens, features, rank


def exact_and_plain(function, *arguments: Tensor) -> tuple[Tensor, Tensor]:
    return function(*(each.double() for each in arguments)), function(*arguments)


def offset(tensor: Tensor) -> Tensor:
    """Copies a tensor to a contiguous one that is not aligned to 16 bytes."""
    return torch.cat([tensor.new_empty(1), tensor.flatten()])[1:].view(tensor.shape)


def product(a: Tensor, b: Tensor) -> Tensor:
    """Converts to the wider of two dtypes."""
    dtype = torch.promote_types(a.dtype, b.dtype)
    return a.to(dtype) @ b.to(dtype)


@pytest.mark.pairs
@pytest.mark.parametrize("aligned", [True, False])
@pytest.mark.parametrize("dtypes", ops.PAIRS, ids=lambda d: f"{d[0]}-{d[1]}".replace("torch.", ""))
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_as_good_as_torch(shape, dtypes, aligned):
    tokens, features, rank = shape
    dtype, factor_dtype = dtypes
    acc = ops.accumulation_dtype(dtype)
    x, base = torch.randn(tokens, features).to(dtype), torch.randn(tokens, features).to(dtype)
    A = (torch.randn(rank, features) / features**0.5).to(factor_dtype)
    B, bias = torch.randn(features, rank).to(factor_dtype), torch.randn(features).to(dtype)
    xa = torch.randn(tokens, rank, dtype=acc)
    rows = x if aligned else misaligned(x)
    if not aligned:
        base, bias = offset(base), offset(bias)

    grad_x, grad_A = ops.shrink_backward(xa, rows, A, base, (True, True))
    grad_xa, grad_B = ops.expand_backward(rows, xa, B, (True, True))
    ours = {
        "xa": ops.shrink(rows, A),
        "y": ops.expand(base, xa, B, bias),
        "grad_x": grad_x,
        "grad_A": grad_A,
        "grad_xa": grad_xa,
        "grad_B": grad_B,
    }
    A, B = A.to(dtype), B.to(dtype)  # as the kernels read them
    expected = {
        "xa": exact_and_plain(lambda x, A: product(x, A.T).to(acc), x, A),
        "y": exact_and_plain(lambda y, xa, B, b: (y + b + product(xa, B.T)).to(y.dtype), base, xa, B, bias),
        "grad_x": exact_and_plain(lambda y, xa, A: (y + product(xa, A)).to(y.dtype), base, xa, A),
        "grad_A": exact_and_plain(lambda xa, x, A: product(xa.T, x).to(A.dtype), xa, x, A),
        "grad_xa": exact_and_plain(lambda y, B: product(y, B).to(acc), x, B),
        "grad_B": exact_and_plain(lambda y, xa, B: product(y.T, xa).to(B.dtype), x, xa, B),
    }
    exact, plain = ({name: values[i] for name, values in expected.items()} for i in (0, 1))
    assert_errors_as_plain([(ours, exact, in_dtypes_of(plain, ours))], dtype, dtype)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_a_part_alone_is_the_part_of_both(dtype):
    """Unwanted results are not computed; the others do not change, to the bit."""
    x, base, xa = torch.randn(33, 130).to(dtype), torch.randn(33, 130).to(dtype), torch.randn(33, 17)
    A, B = torch.randn(17, 130).to(dtype), torch.randn(130, 17).to(dtype)
    both = ops.shrink_backward(xa, x, A, base, (True, True))
    assert torch.equal(ops.shrink_backward(xa, x, A, base, (True, False))[0], both[0])
    assert torch.equal(ops.shrink_backward(xa, x, A, None, (False, True))[1], both[1])
    zero = torch.zeros_like(base)
    without = ops.shrink_backward(xa, x, A, None, (True, False))[0]
    assert torch.equal(without, ops.shrink_backward(xa, x, A, zero, (True, False))[0])
    grad_xa = ops.expand_backward(x, xa, B, (True, False))[0]
    torch.testing.assert_close(grad_xa, ops.expand_backward(x, xa, B, (True, True))[0])
    torch.testing.assert_close(
        ops.expand_backward(x, xa, B, (False, True))[1], ops.expand_backward(x, xa, B, (True,) * 2)[1]
    )
