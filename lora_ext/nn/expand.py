"""Adds an up-projection to a base layer's output in place, in PyTorch.

For layers whose xa is not made by our kernels: embeddings, convolutions, layers that are split over devices.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from lora_ext._ops.registration import is_transformed, rows_of

# Elements per step of a product that cannot be accumulated in place: 4 MiB of float32.
_CHUNK = 1 << 20


def expand_onto_(y: Tensor, xa: Tensor, lora_B: Tensor, scaling: float, dim: int = -1) -> Tensor:
    """``y += scaling * xa @ lora_B.T`` along ``dim``; the sum is rounded once.

    In plain PyTorch, out of place, where a transform of torch.func, forward-mode differentiation, a nested tensor or
    ``torch.jit.trace`` needs it.

    Args:
        y: ``[..., out_features]``, or ``[batch, out_features, *spatial]`` with ``dim=1``; contiguous or channels-last.
            Written in place, so the op that made it must not need it in its backward (autograd checks that).
        xa: like ``y``, with ``r`` instead of ``out_features``. If ``y`` has 16 bits and the factors are float32, the
            product is in float32.
        lora_B: ``[out_features, r]``, dtype of ``xa``.
        scaling: the factor of the update.
        dim: the dimension of the features, -1 or 1.

    Returns:
        ``y``, or a new tensor: use what is returned.
    """
    if y.is_nested or torch.jit.is_tracing() or is_transformed(y, xa, lora_B):
        return (y + _update(xa, lora_B, scaling, dim)).to(y.dtype)
    return _Expand.apply(y, xa, lora_B, scaling, dim)


def _update(xa: Tensor, lora_B: Tensor, scaling: float, dim: int) -> Tensor:
    return scaling * (xa.transpose(dim, -1) @ lora_B.T).transpose(dim, -1)


class _Expand(torch.autograd.Function):
    """Never holds the whole product or, if dtypes differ, the whole cast of the gradient."""

    @staticmethod
    def forward(ctx, y: Tensor, xa: Tensor, lora_B: Tensor, scaling: float, dim: int) -> Tensor:
        last = y.movedim(dim, -1).is_contiguous()
        Y, X = _matrices(y, dim, last), _matrices(xa, dim, last)
        if y.dtype == xa.dtype:
            _add_product_(Y, lora_B, X, scaling)
        else:
            acc = torch.promote_types(y.dtype, xa.dtype)
            for part in _chunks(Y):  # adding tensors of two dtypes is many times slower than converting first
                total = Y[part].to(acc)
                _add_product_(total, lora_B.to(acc), X[part].to(acc), scaling)
                Y[part].copy_(total)
        ctx.mark_dirty(y)
        ctx.save_for_backward(xa, lora_B)
        ctx.scaling, ctx.dim, ctx.last = scaling, dim, last
        return y

    @staticmethod
    def backward(ctx, grad_y: Tensor):
        xa, lora_B = ctx.saved_tensors
        if torch.is_grad_enabled() or is_transformed(grad_y):
            G, X = (tensor.transpose(ctx.dim, -1) for tensor in (grad_y.to(xa.dtype), xa))
            grad_xa = ctx.scaling * (G @ lora_B).transpose(ctx.dim, -1)
            return grad_y, grad_xa, ctx.scaling * (rows_of(G).T @ rows_of(X)), None, None
        G, X = _matrices(grad_y, ctx.dim, ctx.last), _matrices(xa, ctx.dim, ctx.last)
        grad_X = torch.empty_like(X)
        grad_B = torch.zeros_like(lora_B)
        for part in _chunks(G) if grad_y.dtype != xa.dtype else [(slice(None),)]:
            grad = G[part].to(xa.dtype)
            grad_X[part] = _product(ctx.scaling * lora_B.T, grad)
            if len(grad) == 1:
                grad_B.addmm_(grad[0], X[part][0].T, alpha=ctx.scaling)
            else:
                grad_B.add_((grad @ X[part].mT).sum(0), alpha=ctx.scaling)
        if ctx.last:
            grad_xa = grad_X.mT.reshape(xa.movedim(ctx.dim, -1).shape).movedim(-1, ctx.dim)
        else:
            grad_xa = grad_X.reshape(xa.shape)
        return grad_y, grad_xa, grad_B, None, None


def _add_product_(Y: Tensor, factor: Tensor, X: Tensor, alpha: float) -> None:
    if Y.shape[0] == 1:  # not len(Y), which would fix the batch size of an exported program
        Y[0].addmm_(factor, X[0], alpha=alpha)
    else:
        Y.baddbmm_(factor.expand(Y.shape[0], *factor.shape), X, alpha=alpha)


def _product(factor: Tensor, X: Tensor) -> Tensor:
    """``factor @ X`` in the memory layout of ``X``."""
    return factor @ X if X.stride(-1) == 1 else (X.mT @ factor.T).mT


def _matrices(tensor: Tensor, dim: int, last: bool) -> Tensor:
    """Reshapes to ``[batch, features, rest]``; with ``last``, features are last in memory and the batch is 1."""
    if last:
        return tensor.movedim(dim, -1).reshape(1, -1, tensor.shape[dim]).mT
    return tensor.flatten(2)


def _chunks(Y: Tensor) -> Iterator[tuple[slice, ...]]:
    """Yields indices of parts of at most ``_CHUNK`` elements: several matrices, or columns of one."""
    batch, features, rest = Y.shape
    if torch.compiler.is_compiling() or batch * features * rest <= _CHUNK:
        yield (slice(None),)
    elif features * rest <= _CHUNK:
        step = _CHUNK // (features * rest)
        for begin in range(0, batch, step):
            yield (slice(begin, begin + step),)
    else:
        step = max(1, _CHUNK // features)
        for i in range(batch):
            for begin in range(0, rest, step):
                yield slice(i, i + 1), slice(None), slice(begin, begin + step)
