"""The arithmetic that DoRA (Liu et al. 2024, arXiv 2402.09353) adds to LoRA's, made of PyTorch's operations and ours.

DoRA scales row ``i`` of the updated weight to the norm ``magnitude[i]``, which is trained. As the norms before that are
constants to the gradient (section 4.3 there), a layer is LoRA's product, each feature of which is multiplied by
``magnitude / norm``.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator

import torch
from torch import Tensor

from lora_ext._ops.checks import accumulation_dtype
from lora_ext._ops.fast_path import any_requires_grad, is_transformed

# On the CPU a part fits the L2 cache of a core; on other devices parts keep temporary tensors small.
_PART_ELEMENTS, _PART_ELEMENTS_ELSEWHERE = 1 << 17, 1 << 22


@torch.no_grad()
def row_norms(weight: Tensor, lora_A: Tensor, lora_B: Tensor, scaling: float) -> Tensor:
    """Returns the Euclidean norm of each row of ``weight + scaling * lora_B @ lora_A``, without making that tensor.

    ``|w + s b A|^2 = |w|^2 + 2 s (w A.T) b + s^2 (b A A.T) b`` for the row ``w`` of the weight and ``b`` of ``lora_B``.

    Args:
        weight: ``[out_features, in_features]``, any strides.
        lora_A: ``[r, in_features]``.
        lora_B: ``[out_features, r]``, dtype of ``lora_A``.

    Returns:
        ``[out_features]``, float32 (float64 for a float64 weight). No gradient flows through it.
    """
    dtype = accumulation_dtype(weight.dtype)
    shrink = torch.ops.lora_ext.lora_shrink
    # In parts, because 16 bits are converted: for their sums, and because a product rounds wider factors to them.
    is_exact = lora_A.dtype is weight.dtype
    norms, products = [], []
    for rows in row_parts(weight) if weight.dtype is not dtype else (weight,):
        wide = rows.to(dtype)
        norms.append(torch.linalg.vector_norm(wide, dim=1))
        products.append(shrink(rows if is_exact else wide, lora_A))
    of_weight, of_both = (parts[0] if len(parts) == 1 else torch.cat(parts) for parts in (norms, products))
    lora_A, lora_B = lora_A.to(dtype), lora_B.to(dtype)
    of_update = shrink(lora_B, shrink(lora_A, lora_A))
    squares = of_weight.square() + ((2.0 * scaling * of_both + scaling * scaling * of_update) * lora_B).sum(1)
    return squares.clamp_min(0.0).sqrt()  # rounding may leave a small negative square


def scale_of_rows(magnitude: Tensor, norms: Tensor) -> Tensor:
    """Returns ``magnitude / norms``, finite for a row of zeros too."""
    return magnitude.to(norms.dtype) / torch.where(norms > 0.0, norms, 1.0)


def rescale(z: Tensor, factor: Tensor, base: Tensor | None) -> Tensor:
    """Returns ``base + factor * z``, rounded once to the dtype of ``z``.

    Args:
        z: ``[..., features]``.
        factor: ``[features]``, float32 (float64 for float64).
        base: ``[features]``, or the shape of ``z``; or None.
    """
    if torch.compiler.is_compiling() or is_transformed(z, factor, base):
        y = z * factor  # compilers make one loop of it
        return (y if base is None else base + y).to(z.dtype)
    if any_requires_grad(z, factor, base):
        return _Rescale.apply(z, factor, base)
    return _rescaled(z, factor, base)


class _Rescale(torch.autograd.Function):
    """Keeps ``z`` only; PyTorch's own operations on 16 bits would make float32 tensors of its size."""

    @staticmethod
    def forward(ctx, z, factor, base):
        ctx.save_for_backward(z if ctx.needs_input_grad[1] else None, factor)
        ctx.base_dims = 0 if base is None else base.dim()
        ctx.base_dtype = None if base is None else base.dtype
        return _rescaled(z, factor, base)

    @staticmethod
    def backward(ctx, grad_y):
        z, factor = ctx.saved_tensors
        want_z, want_factor, want_base = ctx.needs_input_grad
        grad_z = grad_factor = grad_base = None
        if torch.is_grad_enabled():  # a gradient's gradient
            grad_z = (grad_y * factor).to(grad_y.dtype) if want_z else None
            grad_factor = _as_rows(grad_y * z).sum(0, dtype=factor.dtype) if want_factor else None
        else:
            grad_z, grad_factor = _gradients(grad_y, z, factor, want_z)
        if want_base:
            is_whole = ctx.base_dims == grad_y.dim()
            grad_base = grad_y if is_whole else _as_rows(grad_y).sum(0, dtype=factor.dtype).to(ctx.base_dtype)
        return grad_z, grad_factor, grad_base


def _rescaled(z: Tensor, factor: Tensor, base: Tensor | None) -> Tensor:
    """Computes 16 bits in parts: PyTorch converts all of an operation's arguments and its result."""
    if z.dtype is factor.dtype:
        return z * factor if base is None else torch.addcmul(base, z, factor)
    y = torch.empty_like(z, memory_format=torch.contiguous_format)
    if base is None or base.dim() < z.dim():
        bases = itertools.repeat(base if base is None else base.to(factor.dtype))
    else:
        bases = row_parts(_as_rows(base))
    for of_z, of_y, of_base in zip(row_parts(_as_rows(z)), row_parts(_as_rows(y)), bases, strict=False):
        if of_base is None:
            torch.mul(of_z, factor, out=of_y)
        else:
            torch.addcmul(of_base, of_z, factor, out=of_y)
    return y


def _gradients(grad_y: Tensor, z: Tensor | None, factor: Tensor, want_z: bool) -> tuple[Tensor | None, Tensor | None]:
    """Returns the gradients of ``z``, if wanted, and of ``factor``, if there is a ``z``; reads ``grad_y`` once."""
    grad_z = torch.empty_like(grad_y, memory_format=torch.contiguous_format) if want_z else None
    grad_factor = None if z is None else torch.zeros_like(factor)
    none = itertools.repeat(None)
    of_z, of_grad_z = (none if tensor is None else row_parts(_as_rows(tensor)) for tensor in (z, grad_z))
    for grads, values, out in zip(row_parts(_as_rows(grad_y)), of_z, of_grad_z, strict=False):
        grads = grads.to(factor.dtype)
        if values is not None:
            grad_factor += (grads * values).sum(0)
        if out is not None:
            torch.mul(grads, factor, out=out)
    return grad_z, grad_factor


def _as_rows(tensor: Tensor) -> Tensor:
    return tensor.reshape(-1, tensor.shape[-1]) if tensor.dim() != 2 else tensor


def row_parts(matrix: Tensor) -> Iterator[Tensor]:
    """Yields the rows of ``matrix`` in parts; in traces, all at once."""
    if torch.compiler.is_compiling():
        yield matrix
        return
    elements = torch.get_num_threads() * _PART_ELEMENTS if matrix.device.type == "cpu" else _PART_ELEMENTS_ELSEWHERE
    rows = max(1, elements // max(1, matrix.shape[1]))
    yield from matrix.split(rows) if len(matrix) > rows else (matrix,)
