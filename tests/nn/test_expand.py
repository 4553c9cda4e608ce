"""expand_onto against the plain product, in all layouts."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from lora_ext.nn.expand import expand_onto


def plain(y: Tensor, xa: Tensor, lora_B: Tensor, scaling: float, dim: int) -> Tensor:
    return y + (scaling * xa.movedim(dim, -1) @ lora_B.T).movedim(-1, dim)


LAYOUTS = {
    "tokens": ((2, 3, 5), -1, torch.contiguous_format),
    "one token": ((5,), -1, torch.contiguous_format),
    "no token": ((0, 5), -1, torch.contiguous_format),
    "signal": ((3, 5, 7), 1, torch.contiguous_format),
    "image": ((3, 5, 4, 6), 1, torch.contiguous_format),
    "channels last": ((3, 5, 4, 6), 1, torch.channels_last),
    "one pixel": ((3, 5, 1, 1), 1, torch.contiguous_format),
    "volume": ((2, 5, 2, 3, 4), 1, torch.channels_last_3d),
}


@pytest.mark.parametrize("dtypes", [(torch.float64, torch.float64), (torch.float32, torch.float64)], ids=str)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_is_the_product_and_its_gradients(layout, dtypes):
    (shape, dim, memory_format), (y_dtype, dtype) = LAYOUTS[layout], dtypes
    y = torch.randn(shape).to(y_dtype).contiguous(memory_format=memory_format)
    xa = torch.randn([2 if size == 5 else size for size in shape], dtype=dtype).contiguous(memory_format=memory_format)
    inputs = [y.requires_grad_(), xa.requires_grad_(), torch.randn(5, 2, dtype=dtype, requires_grad=True)]
    expected, grad = plain(*inputs, 0.5, dim).to(y_dtype), torch.randn(shape).to(y_dtype)
    actual = expand_onto(y, xa, inputs[2], 0.5, dim)
    assert actual.stride() == y.stride()
    torch.testing.assert_close(actual, expected)
    for ours, theirs in zip(*(torch.autograd.grad(out, inputs, grad) for out in (actual, expected)), strict=True):
        assert ours.dtype == theirs.dtype
        torch.testing.assert_close(ours, theirs)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("layout", ["tokens", "image"])
def test_float32_factors_onto_16_bits_are_rounded_once(dtype, layout):
    shape, dim, _ = LAYOUTS[layout]
    y, B = torch.randn(shape).to(dtype), torch.randn(5, 2)
    xa = torch.randn([2 if size == 5 else size for size in shape])
    exact = plain(y.double(), xa.double(), B.double(), 0.5, dim)
    assert (
        (expand_onto(y, xa, B, 0.5, dim).double() - exact).abs()
        <= 0.51 * torch.finfo(dtype).eps * exact.abs().clamp_min(1e-2)
    ).all()
