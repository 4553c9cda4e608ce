"""A bottleneck adapter (Houlsby et al. 2019, arXiv 1902.00751), made of lora_shrink and lora_expand."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from lora_ext._ops.checks import FLOATING, accumulation_dtype, check_floating, check_matrix, dtype_name, refusal
from lora_ext._ops.fast_path import any_requires_grad, is_transformed
from lora_ext._ops.plain import bias_gradient


def _silu_gradient(grad: Tensor, x: Tensor) -> Tensor:
    if not torch.is_grad_enabled():
        return torch.ops.aten.silu_backward(grad, x)
    sigmoid = torch.sigmoid(x)  # PyTorch does not differentiate silu_backward
    return grad * sigmoid * (1 + x * (1 - sigmoid))


# For each name: the function of the hidden features, and its gradient as a function of the result's gradient and the
# argument.
ACTIVATIONS = {
    "relu": (F.relu, lambda grad, x: torch.ops.aten.threshold_backward(grad, x, 0)),
    "gelu": (F.gelu, lambda grad, x: torch.ops.aten.gelu_backward(grad, x, approximate="none")),
    "silu": (F.silu, _silu_gradient),
    "identity": (lambda x: x, lambda grad, x: grad),
}


def check_bottleneck(
    x: Tensor,
    down_weight: Tensor,
    down_bias: Tensor | None,
    up_weight: Tensor,
    up_bias: Tensor | None,
    residual: Tensor | None,
    **others: object,
) -> None:
    op = "bottleneck"
    base_name, base = ("x", x) if residual is None else ("residual", residual)
    for name, tensor in (("x", x), (base_name, base)):
        check_floating(op, name, tensor)
        if tensor.dim() == 0:
            raise refusal(op, "no_dimension", name, "features")
    for name, weight in (("down_weight", down_weight), ("up_weight", up_weight)):
        check_matrix(op, name, weight)
    size, in_features = down_weight.shape
    out_features = up_weight.shape[0]
    if size == 0:
        raise ValueError(f"{op}: down_weight has size 0, want at least 1")
    if up_weight.shape[1] != size:
        raise ValueError(f"{op}: up_weight has size {up_weight.shape[1]} but down_weight has {size}")
    if x.shape[-1] != in_features:
        raise refusal(op, "features", "down_weight", "in_features", in_features, "x", x.shape[-1])
    if base.shape[-1] != out_features:
        raise refusal(op, "features", "up_weight", "out_features", out_features, base_name, base.shape[-1])
    if base.shape[:-1] != x.shape[:-1]:
        raise refusal(op, "leading_shape", "residual", list(base.shape), "x", list(x.shape))
    if accumulation_dtype(base.dtype) != accumulation_dtype(x.dtype):
        raise refusal(op, "other_dtype", "residual", dtype_name(base.dtype), "x", dtype_name(x.dtype))
    for name, bias, length in (("down_bias", down_bias, size), ("up_bias", up_bias, out_features)):
        if bias is None:
            continue
        check_floating(op, name, bias)
        if tuple(bias.shape) != (length,):
            raise refusal(op, "shape", name, list(bias.shape), [length])


def _fits(bias: Tensor | None, weight: Tensor) -> bool:
    return bias is None or (
        bias.dtype in FLOATING
        and bias.layout is torch.strided
        and bias.shape == weight.shape[:1]
        and bias.device == weight.device
    )


def compute_bottleneck(x, down_weight, down_bias, up_weight, up_bias, residual, activation) -> Tensor:
    """Computes ``lora_ext.functional.bottleneck``. Arguments that are wrong are found after a failure only."""
    if not (_fits(down_bias, down_weight) and _fits(up_bias, up_weight)):
        # PyTorch would broadcast it, cast it or, if it is a meta tensor, leave it out.
        raise RuntimeError("bottleneck: a bias does not fit")
    if residual is not None and residual.shape[:-1] != x.shape[:-1]:  # lora_expand only compares numbers of tokens
        raise RuntimeError("bottleneck: the residual does not fit")
    tensors = x, down_weight, down_bias, up_weight, up_bias, residual
    # Compilers and transforms look inside: the ops know what to do.
    if torch.compiler.is_compiling() or is_transformed(*tensors) or not any_requires_grad(*tensors):
        return _forward(*tensors, activation)[0]
    return _Bottleneck.apply(*tensors, activation)


def _forward(x, down_weight, down_bias, up_weight, up_bias, residual, activation) -> tuple[Tensor, Tensor]:
    """Returns the result and the argument of the activation."""
    base = x if residual is None else residual
    hidden = torch.ops.lora_ext.lora_shrink(x, down_weight)
    if down_bias is not None:
        hidden = (hidden + down_bias).to(hidden.dtype)
    bias = None if up_bias is None else up_bias.to(base.dtype)
    return torch.ops.lora_ext.lora_expand(base, ACTIVATIONS[activation][0](hidden), up_weight, bias), hidden


class _Bottleneck(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, down_weight, down_bias, up_weight, up_bias, residual, activation):
        y, hidden = _forward(x, down_weight, down_bias, up_weight, up_bias, residual, activation)
        want_x, want_down = ctx.needs_input_grad[:2]
        # The only tensor of the size of x that is kept is x itself, which is shared with its producer.
        ctx.save_for_backward(x if want_x or want_down else None, down_weight, down_bias, up_weight, hidden)
        ctx.activation, ctx.is_own_residual = activation, residual is None
        ctx.up_bias_dtype = None if up_bias is None else up_bias.dtype
        return y

    @staticmethod
    def backward(ctx, grad_y):
        x, down_weight, down_bias, up_weight, hidden = ctx.saved_tensors
        if torch.is_grad_enabled():  # a gradient's gradient: the saved hidden features are a constant to autograd
            if x is not None:
                hidden = torch.ops.lora_ext.lora_shrink(x, down_weight)
            if down_bias is not None:
                added = down_bias if x is not None else down_bias - down_bias.detach()
                hidden = (hidden + added).to(hidden.dtype)
        want_x, want_down, want_down_bias, want_up, want_up_bias, want_residual, _ = ctx.needs_input_grad
        function, gradient = ACTIVATIONS[ctx.activation]
        want_hidden = want_x or want_down or want_down_bias
        grad_x = grad_down = grad_down_bias = None
        grad_hidden, grad_up = torch.ops.lora_ext.lora_expand_backward(
            grad_y, function(hidden) if want_up else None, up_weight, (want_hidden, want_up)
        )
        if want_hidden:
            grad_hidden = gradient(grad_hidden, hidden)
        if want_x or want_down:
            base = grad_y if ctx.is_own_residual else None
            grad_x, grad_down = torch.ops.lora_ext.lora_shrink_backward(
                grad_hidden, x, down_weight, base, (want_x, want_down)
            )
        if want_down_bias:
            grad_down_bias = bias_gradient(grad_hidden)
        grad_up_bias = bias_gradient(grad_y, ctx.up_bias_dtype) if want_up_bias else None
        return grad_x, grad_down, grad_down_bias, grad_up, grad_up_bias, grad_y if want_residual else None, None
