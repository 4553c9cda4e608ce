"""Runs the kernels of lora_linear on torch tensors: allocates device memory, launches, downloads the results.

Every run also checks that tests/simt reports nothing, that every byte of every output was written, and that the launch
stayed inside the workspace it asked for. The kernels do not compute the base product: y and grad_x already hold it if
`base` points to them; otherwise they start undefined.
"""

from __future__ import annotations

import ctypes
import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from support import layers
from support.layers import Siblings
from torch import Tensor

from lora_ext._ops.checks import FLOATING, accumulation_dtype, mask_row_bytes
from lora_ext._ops.plain import scale
from lora_ext.reference import dropout_threshold

from . import params
from .driver import Library, kernels

DTYPES = {dtype: number for number, dtype in enumerate(FLOATING)}
PAIRS = [(x, factor) for x, factor in layers.DTYPES if x.itemsize == 2]  # of x and of the factors
SCRATCH_ALIGNMENT = 256


@dataclass
class Forward:
    ys: list[Tensor]  # per sibling [num_tokens, out_features]
    xa: Tensor  # [num_tokens, total_rank], in the accumulation dtype
    mask: Tensor | None  # uint8 [num_tokens, row_bytes]


@dataclass
class Backward:
    grad_x: Tensor | None = None
    grad_As: list[Tensor] = field(default_factory=list)
    grad_Bs: list[Tensor] = field(default_factory=list)
    grad_xa: Tensor | None = None  # of an expand alone


def run(p: ctypes.Structure, library: Library, *more: Any) -> None:
    """Launches the kernels for these parameters, with scratch memory of exactly the bytes that the plan asks for.

    more: the other arguments of the functions in entry.cpp.
    """
    name, arguments = type(p).__name__, (ctypes.byref(p), *more)
    scratch_bytes = getattr(library.c, f"scratch_bytes_{name}")
    scratch_bytes.restype = ctypes.c_int64
    scratch = library.allocate(scratch_bytes(*arguments, library.sms), "scratch", SCRATCH_ALIGNMENT)
    getattr(library.c, f"run_{name}")(*arguments, ctypes.c_void_p(scratch), library.sms)
    library.check()


def total_rank(siblings: Siblings) -> int:
    return sum(len(layer.lora_A) for layer in siblings.layers)


def _fill_common(p: ctypes.Structure, siblings: Siblings) -> None:
    """Fills in the fields that the parameters of all kernels have: num_tokens, ranks and dtypes."""
    x, group = siblings.x, siblings.layers
    p.num_tokens, p.num_siblings, p.total_rank = len(x), len(group), total_rank(siblings)
    p.dtype, p.factor_dtype = DTYPES[x.dtype], DTYPES[group[0].lora_A.dtype]
    begin = 0  # the first column of a layer's xa
    for s, layer in zip(p.siblings, group, strict=False):
        s.rank, s.rank_begin = len(layer.lora_A), begin
        begin += s.rank


def lora_forward(
    siblings: Siblings,
    dropout_p: float = 0.0,
    seed: int = 0,
    ys: list[Tensor] | None = None,
    schedule: int = 0,
    library: Library | None = None,
    streams: bool = False,
    parts: Sequence[str] = ("shrink", "expand"),
    xa: Tensor | None = None,
) -> Forward:
    """Runs a forward. ys: the base layers' products, to which the results are added; None: y is not read.

    streams: by the kernel for few tokens, which computes the base layers' products, too.
    parts: one of them is what ``lora_shrink`` or ``lora_expand`` launches. An expand alone reads ``xa``, and writes
    other tensors than it reads.
    """
    library = library or kernels()
    library.reset(schedule)
    x, acc = siblings.x, accumulation_dtype(siblings.x.dtype)
    p, weights = params.LoraForwardParams(), params.BaseWeights()
    shrink, expand = p.shrink, p.expand
    for name in parts:
        _fill_common(getattr(p, name), siblings)
    xa_shape, mask_shape = (len(x), total_rank(siblings)), (len(x), mask_row_bytes(x.shape[1]))
    written = []
    if "shrink" in parts:
        shrink.in_features, shrink.x_stride, shrink.threshold = x.shape[1], x.stride(0), dropout_threshold(dropout_p)
        shrink.x = library.upload(x, "x")
        shrink.xa = library.allocate(math.prod(xa_shape) * acc.itemsize, "xa")
        if shrink.threshold:
            shrink.seed = library.upload(torch.tensor([seed]), "seed")
            shrink.mask = library.allocate(math.prod(mask_shape), "mask")
        for s, layer in zip(shrink.siblings, siblings.layers, strict=False):
            s.lora_A, s.scale = library.upload(layer.lora_A, "lora_A"), scale(layer.scaling, dropout_p)
    if "expand" in parts:
        written = expand.siblings[: len(siblings.layers)]
        expand.xa = library.upload(xa, "xa") if xa is not None else shrink.xa
        for i, (s, layer) in enumerate(zip(written, siblings.layers, strict=True)):
            s.out_features = len(layer.lora_B)
            s.lora_B, s.bias = library.upload(layer.lora_B, "lora_B"), library.upload(layer.bias, "bias")
            s.base = library.upload(ys[i], "base") if ys else None
            in_place = ys and xa is None
            s.y = s.base if in_place else library.allocate(len(x) * s.out_features * x.itemsize, "y")
            if streams:
                weights.data[i] = library.upload(layer.weight, "weight")
                weights.strides[i], weights.column_strides[i] = layer.weight.stride()
    given = ctypes.byref(weights) if streams else None
    if streams:
        assert library.c.streams(ctypes.byref(p), given), "the kernel for few tokens does not take this"
    run(p, library, given)
    return Forward(
        [library.download(s.y, (len(x), s.out_features), x.dtype, "y") for s in written],
        library.download(shrink.xa, xa_shape, acc, "xa") if xa is None else xa,
        library.download(shrink.mask, mask_shape, torch.uint8, "mask") if shrink.threshold else None,
    )


def lora_backward(
    siblings: Siblings,
    xa: Tensor,
    mask: Tensor | None = None,
    dropout_p: float = 0.0,
    output_mask: tuple[bool, bool, bool] = (True, True, True),
    grad_x: Tensor | None = None,
    schedule: int = 0,
    library: Library | None = None,
    parts: Sequence[str] = ("expand", "shrink"),
    grad_xa: Tensor | None = None,
) -> Backward:
    """Runs a backward. grad_x: the tensor that the result is added to.

    output_mask: which of grad_x, the grad_As and the grad_Bs are wanted. As in the op, the kernels do not get inputs
    that only unwanted results read. parts: as of a forward; a shrink's backward alone reads ``grad_xa``.
    """
    library = library or kernels()
    library.reset(schedule)
    x, p, result = siblings.x, params.LoraBackwardParams(), Backward()
    want_x, want_A, want_B = output_mask
    expand, shrink = p.expand, p.shrink
    for name in parts:
        _fill_common(getattr(p, name), siblings)
    of_As = shrink.siblings[: len(siblings.layers) if "shrink" in parts else 0]
    of_Bs = expand.siblings[: len(siblings.layers) if "expand" in parts else 0]
    xa_shape, acc = (len(x), total_rank(siblings)), accumulation_dtype(x.dtype)
    if "expand" in parts:
        expand.wants_grad_xa, expand.wants_grad_lora_B = want_x or want_A, want_B
        if want_B:
            expand.xa = library.upload(xa, "xa")
        if "shrink" not in parts and expand.wants_grad_xa:
            expand.grad_xa = library.allocate(math.prod(xa_shape) * acc.itemsize, "grad_xa")
    if "shrink" in parts:
        shrink.in_features, shrink.x_stride, shrink.has_dropout = x.shape[1], x.stride(0), mask is not None
        shrink.wants_grad_x, shrink.wants_grad_lora_A = want_x, want_A
        shrink.grad_xa = library.upload(grad_xa, "grad_xa")
        if want_A:
            shrink.x = library.upload(x, "x")
        if want_A or want_x:
            shrink.mask = library.upload(mask, "mask")
        if want_x:
            shrink.base = library.upload(grad_x, "base")
            in_place = grad_x is not None and grad_xa is None
            shrink.grad_x = shrink.base if in_place else library.allocate(x.numel() * x.itemsize, "grad_x")
    for s, layer in zip(of_As, siblings.layers, strict=False):
        s.lora_A = library.upload(layer.lora_A, "lora_A")
        if want_A:
            s.grad_lora_A = library.allocate(layer.lora_A.nbytes, "grad_lora_A")
    for s, layer in zip(of_Bs, siblings.layers, strict=False):
        s.lora_B = library.upload(layer.lora_B, "lora_B")
        s.out_features, s.scale = len(layer.lora_B), scale(layer.scaling, dropout_p)
        s.grad_y, s.grad_y_stride = library.upload(layer.grad_y, "grad_y"), layer.grad_y.stride(0)
        if want_B:
            s.grad_lora_B = library.allocate(layer.lora_B.nbytes, "grad_lora_B")
    run(p, library)
    if expand.grad_xa:
        result.grad_xa = library.download(expand.grad_xa, xa_shape, acc, "grad_xa")
    if shrink.wants_grad_x:
        result.grad_x = library.download(shrink.grad_x, tuple(x.shape), x.dtype, "grad_x")
    for name, parts_of, wanted, grads in (
        ("lora_A", of_As, want_A, result.grad_As),
        ("lora_B", of_Bs, want_B, result.grad_Bs),
    ):
        for s, layer in zip(parts_of if wanted else [], siblings.layers, strict=False):
            place, factor = getattr(s, f"grad_{name}"), getattr(layer, name)
            grads.append(library.download(place, tuple(factor.shape), factor.dtype, f"grad_{name}"))
    return result


def dropout_mask(seed: int, num_tokens: int, in_features: int, dropout_p: float, schedule: int = 0) -> Tensor:
    library = kernels()
    library.reset(schedule)
    row_bytes = mask_row_bytes(in_features)
    p = params.DropoutMaskParams(num_tokens=num_tokens, row_bytes=row_bytes, threshold=dropout_threshold(dropout_p))
    p.seed = library.upload(torch.tensor([seed]), "seed")
    p.mask = library.allocate(num_tokens * row_bytes, "mask")
    library.c.run_dropout_mask(ctypes.byref(p), library.sms)
    library.check()
    return library.download(p.mask, (num_tokens, row_bytes), torch.uint8, "mask")
