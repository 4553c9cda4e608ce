"""A bottleneck adapter (Houlsby et al. 2019, arXiv 1902.00751), made of lora_shrink and lora_expand."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from lora_ext._common.arguments import check_types
from lora_ext._ops import errors
from lora_ext._ops.checks import FLOATING, accumulation_dtype, check_floating, check_matrix, dtype_name, refusal
from lora_ext._ops.nested import by_values
from lora_ext._ops.registration import any_requires_grad, bias_gradient, is_transformed


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


def bottleneck(
    x: Tensor,
    down_weight: Tensor,
    down_bias: Tensor | None,
    up_weight: Tensor,
    up_bias: Tensor | None,
    activation: str = "relu",
    residual: Tensor | None = None,
) -> Tensor:
    """Applies two narrow linear layers with an activation between them, and a residual connection.

    ``y = residual + activation(x @ down_weight.T + down_bias) @ up_weight.T + up_bias``

    The forward reads ``x`` and ``residual`` once and writes ``y`` once; no other tensor of their size exists. If ``x``
    is the residual, the backward adds both gradients in one pass.

    Args:
        x: ``[..., in_features]``, float64, float32, bfloat16 or float16; any leading dimensions, any strides.
        down_weight: ``[size, in_features]``, in any of the four dtypes; rounded as the factors of
            :func:`~lora_ext.functional.lora_linear`.
        down_bias: ``[size]`` or None.
        up_weight: ``[out_features, size]``, in any of the four dtypes.
        up_bias: ``[out_features]`` or None; rounded to the dtype of the result.
        activation: one of :data:`ACTIVATIONS`.
        residual: ``[..., out_features]`` with the tokens of ``x``, and its accumulation dtype (float64 for float64,
            else float32); None: ``x``.

    Returns:
        ``[..., out_features]``, dtype of the residual. The hidden features are float32 (float64 for float64), and so
        are the sums, each rounded once.

    Raises:
        ValueError, TypeError: naming the argument and both values.
        torch.OutOfMemoryError: memory is short.
    """
    if not isinstance(activation, str):
        check_types(bottleneck, {"activation": activation})
    if activation not in ACTIVATIONS:
        raise ValueError(f"bottleneck: activation is {activation!r}, want one of {', '.join(ACTIVATIONS)}")
    tensors = (x, down_weight, down_bias, up_weight, up_bias, residual)
    if torch.compiler.is_compiling() and not x.is_nested:
        _check(*tensors)
        return _forward(*tensors, activation)[0]
    try:
        if x.is_nested and (residual is None or residual is x):
            layer = down_weight, down_bias, up_weight, up_bias, activation
            return by_values("bottleneck", x, lambda tokens: bottleneck(tokens, *layer))
        if not (_fits(down_bias, down_weight) and _fits(up_bias, up_weight)):
            # PyTorch would broadcast it, cast it or, if it is a meta tensor, leave it out.
            raise RuntimeError("bottleneck: a bias does not fit")
        if is_transformed(*tensors):
            return _forward(*tensors, activation)[0]  # its ops know what to do
        if any_requires_grad(*tensors):
            return _Bottleneck.apply(*tensors, activation)
        return _forward(*tensors, activation)[0]
    except errors.UNEXPLAINED as error:
        arguments = {"x": x, "down_weight": down_weight, "down_bias": down_bias, "up_weight": up_weight}
        arguments |= {"up_bias": up_bias, "activation": activation, "residual": residual}
        errors.explain(error, bottleneck, arguments, _check)
        raise


def _check(
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
