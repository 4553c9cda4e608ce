"""Runs the kernels of lora_linear on torch tensors: allocates device memory, launches, downloads the results.

Every run also checks that tests/simt reports nothing, that every byte of every output was written, and that the launch
stayed inside the workspace it asked for. The kernels do not compute the base product: y and grad_x already hold it if
`base` points to them; otherwise they start undefined.
"""

from __future__ import annotations

import ctypes
from dataclasses import dataclass, field

import torch
from torch import Tensor

from lora_ext.reference import dropout_threshold

from . import params
from .driver import Library, kernels

DTYPES = {torch.float64: 0, torch.float32: 1, torch.bfloat16: 2, torch.float16: 3}  # csrc/common/dtype.h
WORKSPACE_ALIGNMENT = 256


@dataclass
class Sibling:
    """One of several layers that read the same x."""

    lora_A: Tensor  # [rank, in_features]
    lora_B: Tensor  # [out_features, rank]
    scaling: float
    bias: Tensor | None = None  # [out_features]


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


def run(p: ctypes.Structure, library: Library) -> None:
    """Launches the kernels for these parameters, with a workspace of exactly the bytes they ask for."""
    name, pointer, workspace = type(p).__name__, ctypes.byref(p), None
    workspace_bytes = getattr(library.c, f"workspace_bytes_{name}", None) if name != "DropoutMaskParams" else None
    if workspace_bytes:
        workspace_bytes.restype = ctypes.c_int64
        workspace = library.allocate(workspace_bytes(pointer), "workspace", WORKSPACE_ALIGNMENT)
    getattr(library.c, f"run_{name}")(pointer, ctypes.c_void_p(workspace))
    library.check()


def _fill_siblings(p: ctypes.Structure, siblings: list[Sibling], dropout_p: float) -> None:
    """Fills in the shapes, ranks, scales and factor dtype of a forward or backward."""
    threshold = dropout_threshold(dropout_p)
    p.num_siblings, p.factor_dtype = len(siblings), DTYPES[siblings[0].lora_A.dtype]
    for s, sibling in zip(p.siblings, siblings, strict=False):
        s.out_features, s.rank = sibling.lora_B.shape
        s.rank_begin = p.total_rank
        s.scale = sibling.scaling * 65536.0 / (65536.0 - threshold)
        p.total_rank += s.rank


def lora_forward(
    x: Tensor,
    siblings: list[Sibling],
    dropout_p: float = 0.0,
    seed: int = 0,
    ys: list[Tensor] | None = None,
    schedule: int = 0,
    library: Library | None = None,
) -> Forward:
    """Runs a forward. ys: the base layers' products, to which the results are added; None: y is not read."""
    library = library or kernels()
    library.reset(schedule)
    p = params.LoraForwardParams(num_tokens=x.shape[0], in_features=x.shape[1], x_stride=x.stride(0))
    p.dtype, p.threshold = DTYPES[x.dtype], dropout_threshold(dropout_p)
    _fill_siblings(p, siblings, dropout_p)
    p.x = library.upload(x, "x")
    acc = accumulation_dtype(x.dtype)
    p.xa = library.allocate(p.num_tokens * p.total_rank * acc.itemsize, "xa")
    mask_shape = (p.num_tokens, mask_row_bytes(p.in_features))
    if p.threshold:
        p.seed = library.upload(torch.tensor([seed]), "seed")
        p.mask = library.allocate(mask_shape[0] * mask_shape[1], "mask")
    for i, sibling in enumerate(siblings):
        s = p.siblings[i]
        s.lora_A, s.lora_B = library.upload(sibling.lora_A, "lora_A"), library.upload(sibling.lora_B, "lora_B")
        s.bias = library.upload(sibling.bias, "bias")
        s.y = library.upload(ys[i], "y") if ys else library.allocate(x.shape[0] * s.out_features * x.itemsize, "y")
        s.base = s.y if ys else None
    run(p, library)
    results = [library.download(s.y, (x.shape[0], s.out_features), x.dtype, "y") for s in p.siblings[: p.num_siblings]]
    xa = library.download(p.xa, (p.num_tokens, p.total_rank), acc, "xa")
    return Forward(results, xa, library.download(p.mask, mask_shape, torch.uint8, "mask") if p.threshold else None)


def lora_backward(
    grad_ys: list[Tensor],
    x: Tensor,
    siblings: list[Sibling],
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
    p = params.LoraBackwardParams(num_tokens=x.shape[0], in_features=x.shape[1], x_stride=x.stride(0))
    p.dtype, p.has_dropout = DTYPES[x.dtype], mask is not None
    p.wants_grad_x, p.wants_grad_lora_A, p.wants_grad_lora_B = output_mask
    _fill_siblings(p, siblings, dropout_p)
    if want_A:
        p.x = library.upload(x, "x")
    if want_B:
        p.xa = library.upload(xa, "xa")
    if want_A or want_x:
        p.mask = library.upload(mask, "mask")
    if want_x:
        num_bytes = x.numel() * x.itemsize
        p.grad_x = library.allocate(num_bytes, "grad_x") if grad_x is None else library.upload(grad_x, "grad_x")
        p.base = None if grad_x is None else p.grad_x
    for s, sibling, grad_y in zip(p.siblings, siblings, grad_ys, strict=False):
        A, B = sibling.lora_A, sibling.lora_B
        s.grad_y, s.grad_y_stride = library.upload(grad_y, "grad_y"), grad_y.stride(0)
        s.lora_A, s.lora_B = library.upload(A, "lora_A"), library.upload(B, "lora_B")
        if want_A:
            s.grad_lora_A = library.allocate(A.numel() * A.itemsize, "grad_lora_A")
        if want_B:
            s.grad_lora_B = library.allocate(B.numel() * B.itemsize, "grad_lora_B")
    run(p, library)
    result = Backward(library.download(p.grad_x, tuple(x.shape), x.dtype, "grad_x") if want_x else None)
    for s, sibling in zip(p.siblings, siblings, strict=False):
        A, B = sibling.lora_A, sibling.lora_B
        if want_A:
            result.grad_As.append(library.download(s.grad_lora_A, tuple(A.shape), A.dtype, "grad_lora_A"))
        if want_B:
            result.grad_Bs.append(library.download(s.grad_lora_B, tuple(B.shape), B.dtype, "grad_lora_B"))
    return result


SHRINK, EXPAND = 1, 2  # csrc/common/params.h: Products


def _product(params_type, products: int, like: Tensor, factor: Tensor) -> ctypes.Structure:
    """Parameters of one of the products, without dropout, scaling or siblings."""
    rank, features = factor.shape if products == SHRINK else factor.shape[::-1]
    p = params_type(num_tokens=like.shape[0], total_rank=rank, products=products, num_siblings=1)
    p.dtype, p.factor_dtype = DTYPES[like.dtype], DTYPES[factor.dtype]
    p.siblings[0].rank, p.siblings[0].scale = rank, 1.0
    if products == SHRINK:
        p.in_features = features
    else:
        p.siblings[0].out_features = features
    return p


def shrink(x: Tensor, lora_A: Tensor, schedule: int = 0) -> Tensor:
    library = kernels()
    library.reset(schedule)
    p = _product(params.LoraForwardParams, SHRINK, x, lora_A)
    acc = accumulation_dtype(x.dtype)
    p.x, p.x_stride = library.upload(x, "x"), x.stride(0)
    p.siblings[0].lora_A = library.upload(lora_A, "lora_A")
    p.xa = library.allocate(p.num_tokens * p.total_rank * acc.itemsize, "xa")
    run(p, library)
    return library.download(p.xa, (p.num_tokens, p.total_rank), acc, "xa")


def expand(base: Tensor, xa: Tensor, lora_B: Tensor, bias: Tensor | None, schedule: int = 0) -> Tensor:
    library = kernels()
    library.reset(schedule)
    p = _product(params.LoraForwardParams, EXPAND, base, lora_B)
    s = p.siblings[0]
    p.xa, s.lora_B = library.upload(xa, "xa"), library.upload(lora_B, "lora_B")
    s.base, s.bias = library.upload(base, "base"), library.upload(bias, "bias")
    s.y = library.allocate(base.numel() * base.itemsize, "y")
    run(p, library)
    return library.download(s.y, tuple(base.shape), base.dtype, "y")


def shrink_backward(
    grad_xa: Tensor, x: Tensor, lora_A: Tensor, base: Tensor | None, output_mask: tuple[bool, bool], schedule: int = 0
) -> tuple[Tensor | None, Tensor | None]:
    library = kernels()
    library.reset(schedule)
    want_x, want_A = output_mask
    p = _product(params.LoraBackwardParams, SHRINK, x, lora_A)
    s = p.siblings[0]
    p.wants_grad_x, p.wants_grad_lora_A = output_mask
    p.grad_xa, s.lora_A = library.upload(grad_xa, "grad_xa"), library.upload(lora_A, "lora_A")
    if want_x:
        p.grad_x, p.base = library.allocate(x.numel() * x.itemsize, "grad_x"), library.upload(base, "base")
    if want_A:
        p.x, p.x_stride = library.upload(x, "x"), x.stride(0)
        s.grad_lora_A = library.allocate(lora_A.numel() * lora_A.itemsize, "grad_lora_A")
    run(p, library)
    return (
        library.download(p.grad_x, tuple(x.shape), x.dtype, "grad_x") if want_x else None,
        library.download(s.grad_lora_A, tuple(lora_A.shape), lora_A.dtype, "grad_lora_A") if want_A else None,
    )


def expand_backward(
    grad_y: Tensor, xa: Tensor, lora_B: Tensor, output_mask: tuple[bool, bool], schedule: int = 0
) -> tuple[Tensor | None, Tensor | None]:
    library = kernels()
    library.reset(schedule)
    want_xa, want_B = output_mask
    p = _product(params.LoraBackwardParams, EXPAND, grad_y, lora_B)
    s, acc = p.siblings[0], accumulation_dtype(grad_y.dtype)
    s.grad_y, s.grad_y_stride = library.upload(grad_y, "grad_y"), grad_y.stride(0)
    s.lora_B = library.upload(lora_B, "lora_B")
    p.wants_grad_xa, p.wants_grad_lora_B = output_mask
    if want_xa:
        p.grad_xa = library.allocate(p.num_tokens * p.total_rank * acc.itemsize, "grad_xa")
    if want_B:
        p.xa = library.upload(xa, "xa")
        s.grad_lora_B = library.allocate(lora_B.numel() * lora_B.itemsize, "grad_lora_B")
    run(p, library)
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
