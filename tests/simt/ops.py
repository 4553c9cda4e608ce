"""Runs the kernels of lora_linear on torch tensors: allocates device memory, launches, downloads the results.

Every run also checks that tests/simt reports nothing, that every byte of every output was written, and that the launch
stayed inside the workspace it asked for. The kernels do not compute the base product: y and grad_x already hold it if
`base` points to them; otherwise they start undefined.
"""

from __future__ import annotations

import ctypes
import itertools
from dataclasses import dataclass, field

import torch
from support import layers
from support.layers import Layer, Siblings
from torch import Tensor

from lora_ext.reference import dropout_threshold

from . import params
from .driver import Library, kernels

DTYPES = {torch.float64: 0, torch.float32: 1, torch.bfloat16: 2, torch.float16: 3}  # csrc/common/dtype.h
PAIRS = [(x, factor) for x, factor in layers.DTYPES if x.itemsize == 2]  # of x and of the factors
SCRATCH_ALIGNMENT = 256


@dataclass
class Forward:
    ys: list[Tensor]  # per sibling [num_tokens, out_features]
    xa: Tensor  # [num_tokens, total_rank], in the accumulation dtype
    mask: Tensor | None  # uint8 [num_tokens, row_bytes]


@dataclass
class Backward:
    grad_x: Tensor | None
    grad_As: list[Tensor] = field(default_factory=list)
    grad_Bs: list[Tensor] = field(default_factory=list)


def accumulation_dtype(dtype: torch.dtype) -> torch.dtype:
    return torch.float64 if dtype == torch.float64 else torch.float32


def mask_row_bytes(in_features: int) -> int:
    return (in_features + 63) // 64 * 8


def run(p: ctypes.Structure, library: Library, weights: ctypes.Structure | None = None) -> None:
    """Launches the kernels for these parameters, with scratch memory of exactly the bytes that the plan asks for.

    weights: BaseWeights, of a forward that also computes the base layers.
    """
    name = "streamed" if weights else type(p).__name__
    arguments = [ctypes.byref(part) for part in (p, weights) if part is not None]
    scratch = None
    if scratch_bytes := getattr(library.c, f"scratch_bytes_{name}", None):
        scratch_bytes.restype = ctypes.c_int64
        num_bytes = scratch_bytes(*arguments, library.sms)
        scratch = library.allocate(num_bytes, "scratch", SCRATCH_ALIGNMENT)
    getattr(library.c, f"run_{name}")(*arguments, ctypes.c_void_p(scratch), library.sms)
    library.check()


def _scale(layer: Layer, dropout_p: float) -> float:
    return layer.scaling * 65536.0 / (65536.0 - dropout_threshold(dropout_p))


def _fill_common(p: ctypes.Structure, siblings: Siblings) -> None:
    """Fills in the fields that the parameters of all kernels have: num_tokens, ranks and dtypes."""
    x, group = siblings.x, siblings.layers
    # The column of xa at which each layer begins, then the total rank.
    *begins, p.total_rank = itertools.accumulate((len(layer.lora_A) for layer in group), initial=0)
    p.num_tokens, p.num_siblings = len(x), len(group)
    p.dtype, p.factor_dtype = DTYPES[x.dtype], DTYPES[group[0].lora_A.dtype]
    for s, layer, begin in zip(p.siblings, group, begins, strict=False):
        s.rank, s.rank_begin = len(layer.lora_A), begin


def lora_forward(
    siblings: Siblings,
    dropout_p: float = 0.0,
    seed: int = 0,
    ys: list[Tensor] | None = None,
    schedule: int = 0,
    library: Library | None = None,
    streams: bool = False,
) -> Forward:
    """Runs a forward. ys: the base layers' products, to which the results are added; None: y is not read.

    streams: by the kernel for few tokens, which computes the base layers' products, too.
    """
    library = library or kernels()
    library.reset(schedule)
    x = siblings.x
    p, base = params.LoraForwardParams(), params.BaseWeights() if streams else None
    shrink, expand = p.shrink, p.expand
    for part in (shrink, expand):
        _fill_common(part, siblings)
    shrink.in_features, shrink.x_stride, shrink.threshold = x.shape[1], x.stride(0), dropout_threshold(dropout_p)
    shrink.x = library.upload(x, "x")
    acc = accumulation_dtype(x.dtype)
    shrink.xa = library.allocate(shrink.num_tokens * shrink.total_rank * acc.itemsize, "xa")
    expand.xa = shrink.xa
    mask_shape = (shrink.num_tokens, mask_row_bytes(shrink.in_features))
    if shrink.threshold:
        shrink.seed = library.upload(torch.tensor([seed]), "seed")
        shrink.mask = library.allocate(mask_shape[0] * mask_shape[1], "mask")
    for i, layer in enumerate(siblings.layers):
        shrink.siblings[i].lora_A = library.upload(layer.lora_A, "lora_A")
        shrink.siblings[i].scale = _scale(layer, dropout_p)
        s = expand.siblings[i]
        s.out_features = len(layer.lora_B)
        s.lora_B, s.bias = library.upload(layer.lora_B, "lora_B"), library.upload(layer.bias, "bias")
        s.y = library.upload(ys[i], "y") if ys else library.allocate(x.shape[0] * s.out_features * x.itemsize, "y")
        s.base = s.y if ys else None
        if streams:
            base.data[i] = library.upload(layer.weight, "weight")
            base.strides[i], base.column_strides[i] = layer.weight.stride()
    if streams:
        assert library.c.streams(ctypes.byref(p), ctypes.byref(base)), "the kernel for few tokens does not take this"
    run(p, library, base)
    written = expand.siblings[: len(siblings.layers)]
    results = [library.download(s.y, (len(x), s.out_features), x.dtype, "y") for s in written]
    xa = library.download(shrink.xa, (shrink.num_tokens, shrink.total_rank), acc, "xa")
    has_mask = shrink.threshold > 0
    return Forward(results, xa, library.download(shrink.mask, mask_shape, torch.uint8, "mask") if has_mask else None)


def lora_backward(
    siblings: Siblings,
    xa: Tensor,
    mask: Tensor | None = None,
    dropout_p: float = 0.0,
    output_mask: tuple[bool, bool, bool] = (True, True, True),
    grad_x: Tensor | None = None,
    schedule: int = 0,
    library: Library | None = None,
) -> Backward:
    """Runs a backward. grad_x: the tensor that the result is added to.

    output_mask: which of grad_x, the grad_As and the grad_Bs are wanted. As in the op, the kernels do not get inputs
    that only unwanted results read.
    """
    library = library or kernels()
    library.reset(schedule)
    want_x, want_A, want_B = output_mask
    x, p = siblings.x, params.LoraBackwardParams()
    expand, shrink = p.expand, p.shrink
    for part in (expand, shrink):
        _fill_common(part, siblings)
    shrink.in_features, shrink.x_stride, shrink.has_dropout = x.shape[1], x.stride(0), mask is not None
    shrink.wants_grad_x, shrink.wants_grad_lora_A, expand.wants_grad_lora_B = output_mask
    expand.wants_grad_xa = want_x or want_A
    if want_A:
        shrink.x = library.upload(x, "x")
    if want_B:
        expand.xa = library.upload(xa, "xa")
    if want_A or want_x:
        shrink.mask = library.upload(mask, "mask")
    if want_x:
        num_bytes = x.numel() * x.itemsize
        shrink.grad_x = library.allocate(num_bytes, "grad_x") if grad_x is None else library.upload(grad_x, "grad_x")
        shrink.base = None if grad_x is None else shrink.grad_x
    for i, layer in enumerate(siblings.layers):
        A, B, grad_y = layer.lora_A, layer.lora_B, layer.grad_y
        of_A, of_B = shrink.siblings[i], expand.siblings[i]
        of_A.lora_A, of_B.lora_B = library.upload(A, "lora_A"), library.upload(B, "lora_B")
        of_B.out_features, of_B.scale = len(B), _scale(layer, dropout_p)
        of_B.grad_y, of_B.grad_y_stride = library.upload(grad_y, "grad_y"), grad_y.stride(0)
        if want_A:
            of_A.grad_lora_A = library.allocate(A.numel() * A.itemsize, "grad_lora_A")
        if want_B:
            of_B.grad_lora_B = library.allocate(B.numel() * B.itemsize, "grad_lora_B")
    run(p, library)
    result = Backward(library.download(shrink.grad_x, tuple(x.shape), x.dtype, "grad_x") if want_x else None)
    for name, part, wanted, grads in (
        ("lora_A", shrink, want_A, result.grad_As),
        ("lora_B", expand, want_B, result.grad_Bs),
    ):
        for s, layer in zip(part.siblings, siblings.layers if wanted else [], strict=False):
            place, factor = getattr(s, f"grad_{name}"), getattr(layer, name)
            grads.append(library.download(place, tuple(factor.shape), factor.dtype, f"grad_{name}"))
    return result


def _single(p: ctypes.Structure, like: Tensor, factor: Tensor, rank: int) -> ctypes.Structure:
    """Fills in and returns a half of a call: one product of one layer, without dropout and scaling."""
    p.num_tokens, p.total_rank, p.num_siblings = len(like), rank, 1
    p.dtype, p.factor_dtype = DTYPES[like.dtype], DTYPES[factor.dtype]
    p.siblings[0].rank = rank
    return p


def shrink(x: Tensor, lora_A: Tensor) -> Tensor:
    library = kernels()
    library.reset()
    call = params.LoraForwardParams()
    p = _single(call.shrink, x, lora_A, rank=lora_A.shape[0])
    s, acc = p.siblings[0], accumulation_dtype(x.dtype)
    p.x, p.x_stride, p.in_features = library.upload(x, "x"), x.stride(0), lora_A.shape[1]
    s.lora_A, s.scale = library.upload(lora_A, "lora_A"), 1.0
    p.xa = library.allocate(p.num_tokens * p.total_rank * acc.itemsize, "xa")
    run(call, library)
    return library.download(p.xa, (p.num_tokens, p.total_rank), acc, "xa")


def expand(base: Tensor, xa: Tensor, lora_B: Tensor, bias: Tensor | None) -> Tensor:
    library = kernels()
    library.reset()
    call = params.LoraForwardParams()
    p = _single(call.expand, base, lora_B, rank=lora_B.shape[1])
    s = p.siblings[0]
    s.out_features = lora_B.shape[0]
    p.xa, s.lora_B = library.upload(xa, "xa"), library.upload(lora_B, "lora_B")
    s.base, s.bias = library.upload(base, "base"), library.upload(bias, "bias")
    s.y = library.allocate(base.numel() * base.itemsize, "y")
    run(call, library)
    return library.download(s.y, tuple(base.shape), base.dtype, "y")


def shrink_backward(
    grad_xa: Tensor, x: Tensor, lora_A: Tensor, base: Tensor | None, output_mask: tuple[bool, bool]
) -> tuple[Tensor | None, Tensor | None]:
    library = kernels()
    library.reset()
    want_x, want_A = output_mask
    call = params.LoraBackwardParams()
    p = _single(call.shrink, x, lora_A, rank=lora_A.shape[0])
    s = p.siblings[0]
    p.in_features = lora_A.shape[1]
    p.wants_grad_x, p.wants_grad_lora_A = output_mask
    p.grad_xa, s.lora_A = library.upload(grad_xa, "grad_xa"), library.upload(lora_A, "lora_A")
    if want_x:
        p.grad_x, p.base = library.allocate(x.numel() * x.itemsize, "grad_x"), library.upload(base, "base")
    if want_A:
        p.x, p.x_stride = library.upload(x, "x"), x.stride(0)
        s.grad_lora_A = library.allocate(lora_A.numel() * lora_A.itemsize, "grad_lora_A")
    run(call, library)
    return (
        library.download(p.grad_x, tuple(x.shape), x.dtype, "grad_x") if want_x else None,
        library.download(s.grad_lora_A, tuple(lora_A.shape), lora_A.dtype, "grad_lora_A") if want_A else None,
    )


def expand_backward(
    grad_y: Tensor, xa: Tensor, lora_B: Tensor, output_mask: tuple[bool, bool]
) -> tuple[Tensor | None, Tensor | None]:
    library = kernels()
    library.reset()
    want_xa, want_B = output_mask
    call = params.LoraBackwardParams()
    p = _single(call.expand, grad_y, lora_B, rank=lora_B.shape[1])
    s, acc = p.siblings[0], accumulation_dtype(grad_y.dtype)
    s.out_features, s.scale = lora_B.shape[0], 1.0
    s.grad_y, s.grad_y_stride = library.upload(grad_y, "grad_y"), grad_y.stride(0)
    s.lora_B = library.upload(lora_B, "lora_B")
    p.wants_grad_xa, p.wants_grad_lora_B = output_mask
    if want_xa:
        p.grad_xa = library.allocate(p.num_tokens * p.total_rank * acc.itemsize, "grad_xa")
    if want_B:
        p.xa = library.upload(xa, "xa")
        s.grad_lora_B = library.allocate(lora_B.numel() * lora_B.itemsize, "grad_lora_B")
    run(call, library)
    return (
        library.download(p.grad_xa, (p.num_tokens, p.total_rank), acc, "grad_xa") if want_xa else None,
        library.download(s.grad_lora_B, tuple(lora_B.shape), lora_B.dtype, "grad_lora_B") if want_B else None,
    )


def dropout_mask(seed: int, num_tokens: int, in_features: int, dropout_p: float, schedule: int = 0) -> Tensor:
    library = kernels()
    library.reset(schedule)
    row_bytes = mask_row_bytes(in_features)
    p = params.DropoutMaskParams(num_tokens=num_tokens, row_bytes=row_bytes, threshold=dropout_threshold(dropout_p))
    p.seed = library.upload(torch.tensor([seed]), "seed")
    p.mask = library.allocate(num_tokens * row_bytes, "mask")
    run(p, library)
    return library.download(p.mask, (num_tokens, row_bytes), torch.uint8, "mask")
