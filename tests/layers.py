"""Random LoRA layers and how results are compared: shared by the op tests."""

from __future__ import annotations

from dataclasses import dataclass, fields, replace

import torch
from torch import Tensor

from lora_ext import reference

# x's dtype and the factors': the usual pairs, and two unusual ones.
DTYPES = [
    (torch.float64, torch.float64),
    (torch.float32, torch.float32),
    (torch.bfloat16, torch.bfloat16),
    (torch.bfloat16, torch.float32),
    (torch.float16, torch.float16),
    (torch.float16, torch.float32),
    (torch.float32, torch.bfloat16),
    (torch.float64, torch.float32),
]

# (num_tokens, in_features, out_features, rank): no rows, one row, odd tails, ranks that are no multiple of 16, and
# sizes that cross every block boundary of the kernels.
SHAPES = [
    (0, 5, 3, 2),
    (1, 1, 1, 1),
    (1, 64, 48, 8),
    (7, 5, 3, 2),
    (31, 63, 130, 3),
    (33, 64, 48, 17),
    (70, 97, 131, 8),
    (100, 515, 257, 100),
    (40, 384, 384, 16),
]


@dataclass
class Layer:
    """The arguments of ``lora_linear`` but for dropout, and a gradient for its output."""

    x: Tensor
    weight: Tensor
    bias: Tensor | None
    lora_A: Tensor
    lora_B: Tensor
    scaling: float
    grad_y: Tensor

    def to(self, dtype: torch.dtype) -> Layer:
        values = {f.name: getattr(self, f.name) for f in fields(self)}
        return replace(self, **{k: v.to(dtype) for k, v in values.items() if isinstance(v, Tensor)})

    def args(self) -> tuple:
        return self.x, self.weight, self.bias, self.lora_A, self.lora_B, self.scaling


def random_layer(shape, dtypes=(torch.float32, torch.float32), bias: bool = True, leading: tuple = ()) -> Layer:
    num_tokens, in_features, out_features, rank = shape
    dtype, factor_dtype = dtypes
    tokens = leading or (num_tokens,)
    return Layer(
        x=torch.randn(*tokens, in_features).to(dtype),
        weight=(torch.randn(out_features, in_features) / in_features**0.5).to(dtype),
        bias=torch.randn(out_features).to(dtype) if bias else None,
        lora_A=(torch.randn(rank, in_features) / in_features**0.5).to(factor_dtype),
        lora_B=torch.randn(out_features, rank).to(factor_dtype),
        scaling=0.75,
        grad_y=torch.randn(*tokens, out_features).to(dtype),
    )


def forward_backward(function, layer: Layer, dropout_p: float = 0.0, seed: Tensor | None = None) -> dict[str, Tensor]:
    """y and the gradients of x, lora_A and lora_B."""
    x, A, B = (t.detach().clone().requires_grad_() for t in (layer.x, layer.lora_A, layer.lora_B))
    y = function(x, layer.weight, layer.bias, A, B, layer.scaling, dropout_p, seed)
    grads = torch.autograd.grad(y, (x, A, B), layer.grad_y)
    return dict(zip(("y", "grad_x", "grad_A", "grad_B"), (y.detach(), *grads), strict=True))


def relative_error(value: Tensor, exact: Tensor) -> float:
    if exact.numel() == 0:
        return 0.0
    return ((value.double() - exact.double()).norm() / exact.double().norm().clamp_min(1e-300)).item()


def assert_as_good_as_torch(ours: dict, layer: Layer, dropout_p: float = 0.0, seed: Tensor | None = None) -> None:
    """The error against float64 is at most twice that of plain PyTorch at the same dtypes."""
    exact = forward_backward(reference.lora_linear, layer.to(torch.float64), dropout_p, seed)
    plain = forward_backward(reference.lora_linear, layer, dropout_p, seed)
    # Where plain PyTorch happens to be exact, the last bit of a float32 (float64) sum is still allowed.
    floor = 1e-14 if layer.x.dtype == torch.float64 else 1e-6
    if layer.lora_A.dtype != layer.x.dtype:
        floor = max(floor, torch.finfo(layer.lora_A.dtype).eps)
    for name, value in ours.items():
        assert value.shape == exact[name].shape and value.dtype == plain[name].dtype, name
        error, allowed = relative_error(value, exact[name]), 2 * relative_error(plain[name], exact[name]) + floor
        assert error <= allowed, f"{name}: error {error:.3g}, plain PyTorch's {(allowed - floor) / 2:.3g}"
