"""The arithmetic that DoRA (Liu et al. 2024, arXiv 2402.09353) adds to LoRA's, made of PyTorch's operations and ours.

DoRA scales row ``i`` of the updated weight to the trained length ``magnitude[i]``. As the norms are constants to the
gradient (section 4.3 there), a layer is LoRA's product, each feature of which is multiplied by ``magnitude / norm``.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from lora_ext._ops.checks import accumulation_dtype
from lora_ext._ops.registration import any_requires_grad, is_transformed

# What is done to a part of a tensor stays in the second-level cache of the processor.
_PART_ELEMENTS = 1 << 17


@torch.no_grad()
def row_norms(weight: Tensor, lora_A: Tensor, lora_B: Tensor, scaling: float) -> Tensor:
    """Returns the Euclidean norm of each row of ``weight + scaling * lora_B @ lora_A``, without making that tensor.

    ``|w + s b A|^2 = |w|^2 + 2 s (w A.T) b + s^2 (b A A.T) b`` for the row ``w`` of the weight and ``b`` of ``lora_B``.
    The weight is read once.

    Args:
        weight: ``[out_features, in_features]``, any strides.
        lora_A: ``[r, in_features]``.
        lora_B: ``[out_features, r]``, dtype of ``lora_A``.

    Returns:
        ``[out_features]``, float32 (float64 for a float64 weight). No gradient flows through it.
    """
    dtype = accumulation_dtype(weight.dtype)
    shrink = torch.ops.lora_ext.lora_shrink
    lengths, products = [], []
    for rows in _parts(weight):
        lengths.append(torch.linalg.vector_norm(rows, dim=1, dtype=dtype))
        products.append(shrink(rows, lora_A))
    of_weight, of_both = (parts[0] if len(parts) == 1 else torch.cat(parts) for parts in (lengths, products))
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
            grad_factor = (grad_y * z).flatten(0, -2).sum(0, dtype=factor.dtype) if want_factor else None
        else:
            grad_z = _rescaled(grad_y, factor, None) if want_z else None
            grad_factor = _dot_of_features(grad_y, z, factor.dtype) if want_factor else None
        if want_base:
            whole = ctx.base_dims == grad_y.dim()
            grad_base = grad_y if whole else grad_y.flatten(0, -2).sum(0, dtype=factor.dtype).to(ctx.base_dtype)
        return grad_z, grad_factor, grad_base


def _rescaled(z: Tensor, factor: Tensor, base: Tensor | None) -> Tensor:
    y = torch.empty_like(z, memory_format=torch.contiguous_format)
    bases = None if base is None or base.dim() < z.dim() else _parts(_as_rows(base))
    for of_z, of_y in zip(_parts(_as_rows(z)), _parts(_as_rows(y)), strict=True):
        if base is None:
            torch.mul(of_z, factor, out=of_y)
        else:
            torch.addcmul(base if bases is None else next(bases), of_z, factor, out=of_y)
    return y


def _dot_of_features(a: Tensor, b: Tensor, dtype: torch.dtype) -> Tensor:
    """Returns ``sum over tokens of a * b``, ``[features]``, for ``a`` and ``b`` ``[..., features]``."""
    dot = torch.zeros(a.shape[-1], dtype=dtype, device=a.device)
    for of_a, of_b in zip(_parts(_as_rows(a)), _parts(_as_rows(b)), strict=True):
        dot += (of_a.to(dtype) * of_b).sum(0)
    return dot


def _as_rows(tensor: Tensor) -> Tensor:
    return tensor.reshape(-1, tensor.shape[-1]) if tensor.dim() != 2 else tensor


def _parts(matrix: Tensor) -> Iterator[Tensor]:
    """Yields the rows of ``matrix`` in parts that fit the cache; on other devices, and in traces, all at once."""
    if matrix.device.type != "cpu" or torch.compiler.is_compiling():
        yield matrix
        return
    rows = max(1, torch.get_num_threads() * _PART_ELEMENTS // max(1, matrix.shape[1]))
    yield from matrix.split(rows) if len(matrix) > rows else (matrix,)
