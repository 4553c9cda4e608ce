"""Runs the kernels of lora_grouped_ on torch tensors, with the same checks as ops.py."""

from __future__ import annotations

import ctypes
from dataclasses import dataclass

import torch
from support.groups import Grouped
from torch import Tensor

from lora_ext._ops.checks import accumulation_dtype, mask_row_bytes
from lora_ext._ops.plain import scale
from lora_ext.reference import dropout_threshold

from . import params
from .driver import Library, kernels
from .ops import DTYPES, SCRATCH_ALIGNMENT, Backward, run


@dataclass
class Forward:
    y: Tensor
    xa: Tensor
    mask: Tensor | None


def _run(p: ctypes.Structure, case: Grouped, dropout_p: float, entries: ctypes.Array, library: Library) -> None:
    rows = params.GroupedRows(num_tokens=case.x.shape[:-1].numel(), num_groups=len(case.scalings))
    rows.num_entries = case.group_of_row.numel()
    rows.rows_per_entry = rows.num_tokens // max(rows.num_entries, 1)
    rows.group_of_row = library.upload(case.group_of_row.reshape(-1), "group_of_row")
    rows.scalings, rows.ranks = library.upload(case.scalings, "scalings"), library.upload(case.ranks, "ranks")
    rows.rescale = scale(1.0, dropout_p)
    run(p, library, ctypes.byref(rows), entries, ctypes.c_int64(len(entries)))


def _upload_factor(factor: Tensor, name: str, library: Library) -> int | None:
    """The matrices of a stack lie as their strides say; between them nothing is defined."""
    return library.upload(factor if factor.dim() == 2 else factor.flatten(0, 1), name)


def _entries(case: Grouped, library: Library, wanted_As=(), wanted_Bs=()) -> ctypes.Array:
    entries = (params.GroupedEntry * len(case.lora_As))()
    first = 0
    for i, (entry, A, B) in enumerate(zip(entries, case.lora_As, case.lora_Bs, strict=True)):
        entry.first_group, entry.rank = first, A.shape[-2]
        first += len(A) if A.dim() == 3 else 1
        entry.lora_A, entry.lora_B = _upload_factor(A, "lora_A", library), _upload_factor(B, "lora_B", library)
        entry.A_stride, entry.B_stride = A.stride(-2), B.stride(-2)
        if A.dim() == 3:
            entry.A_slot_stride, entry.B_slot_stride = A.stride(0), B.stride(0)
        entry.wants_grad_A, entry.wants_grad_B = i in wanted_As, i in wanted_Bs
        if entry.wants_grad_A:
            entry.grad_lora_A = library.allocate(A.numel() * A.itemsize, "grad_lora_A")
        if entry.wants_grad_B:
            entry.grad_lora_B = library.allocate(B.numel() * B.itemsize, "grad_lora_B")
    return entries


def _sizes(p: ctypes.Structure, case: Grouped) -> None:
    p.in_features, p.out_features = case.lora_As[0].shape[-1], case.lora_Bs[0].shape[-2]
    p.max_rank = max(A.shape[-2] for A in case.lora_As)
    p.dtype, p.factor_dtype = DTYPES[case.x.dtype], DTYPES[case.lora_As[0].dtype]


def forward(
    case: Grouped, dropout_p: float = 0.0, seed: int = 0, schedule: int = 0, library: Library | None = None
) -> Forward:
    library = library or kernels()
    library.reset(schedule)
    x, y = case.x.flatten(0, -2), case.y.flatten(0, -2)
    p, acc = params.LoraGroupedForwardParams(), accumulation_dtype(x.dtype)
    _sizes(p, case)
    p.x, p.x_stride, p.y = library.upload(x, "x"), x.stride(0), library.upload(y, "y")
    p.xa = library.allocate(len(x) * p.max_rank * acc.itemsize, "xa")
    p.threshold = dropout_threshold(dropout_p)
    mask_shape = (len(x), mask_row_bytes(p.in_features))
    if p.threshold:
        p.seed = library.upload(torch.tensor([seed]), "seed")
        p.mask = library.allocate(mask_shape[0] * mask_shape[1], "mask")
    _run(p, case, dropout_p, _entries(case, library), library)
    return Forward(
        library.download(p.y, tuple(y.shape), y.dtype, "y").reshape(case.y.shape),
        library.download(p.xa, (len(x), p.max_rank), acc, "xa"),
        library.download(p.mask, mask_shape, torch.uint8, "mask") if p.threshold else None,
    )


def index(group_of_row: Tensor, num_groups: int, schedule: int = 0) -> tuple[Tensor, Tensor]:
    """Returns the rows sorted by group, and where each group begins: those of no group come last, then unknown ones."""
    library = kernels()
    library.reset(schedule)
    rows = params.GroupedRows(num_tokens=len(group_of_row), num_groups=num_groups, num_entries=len(group_of_row))
    rows.rows_per_entry, rows.group_of_row = 1, library.upload(group_of_row, "group_of_row")
    p = params.LoraGroupedForwardParams(in_features=8, out_features=8, max_rank=4, dtype=DTYPES[torch.bfloat16])
    arguments, places = (ctypes.byref(p), ctypes.byref(rows)), (ctypes.c_int64 * 2)()
    scratch_bytes = library.c.scratch_bytes_LoraGroupedForwardParams
    scratch_bytes.restype = ctypes.c_int64
    scratch = library.allocate(scratch_bytes(*arguments, None, ctypes.c_int64(0), 132), "scratch", SCRATCH_ALIGNMENT)
    library.c.run_group_index(*arguments, ctypes.c_void_p(scratch), places)
    library.check()
    order, begin = (scratch + place for place in places)
    return (
        library.download(order, (len(group_of_row),), torch.int32, "order"),
        library.download(begin, (num_groups + 3,), torch.int32, "begin"),
    )


def backward(
    case: Grouped,
    xa: Tensor,
    mask: Tensor | None = None,
    dropout_p: float = 0.0,
    want_x: bool = True,
    wanted_As: range | None = None,
    wanted_Bs: range | None = None,
    schedule: int = 0,
    library: Library | None = None,
) -> Backward:
    """Runs a backward. wanted_As, wanted_Bs: the entries whose gradients are wanted; None: all."""
    library = library or kernels()
    library.reset(schedule)
    every = range(len(case.lora_As))
    wanted_As, wanted_Bs = (every if wanted is None else wanted for wanted in (wanted_As, wanted_Bs))
    x, grad_y = case.x.flatten(0, -2), case.grad_y.flatten(0, -2)
    p = params.LoraGroupedBackwardParams(wants_grad_x=want_x, has_dropout=mask is not None)
    _sizes(p, case)
    p.grad_y, p.grad_y_stride = library.upload(grad_y, "grad_y"), grad_y.stride(0)
    if wanted_As:
        p.x, p.x_stride = library.upload(x, "x"), x.stride(0)
    if wanted_Bs:
        p.xa = library.upload(xa, "xa")
    if want_x or wanted_As:
        p.mask = library.upload(mask, "mask")
    if want_x:
        p.grad_x = library.allocate(x.numel() * x.itemsize, "grad_x")
    entries = _entries(case, library, wanted_As, wanted_Bs)
    _run(p, case, dropout_p, entries, library)

    def download(factors: list[Tensor], wanted: range, name: str) -> list[Tensor]:
        return [
            library.download(getattr(entries[i], name), tuple(factors[i].shape), factors[i].dtype, name) for i in wanted
        ]

    return Backward(
        library.download(p.grad_x, tuple(x.shape), x.dtype, "grad_x").reshape(case.x.shape) if want_x else None,
        download(case.lora_As, wanted_As, "grad_lora_A"),
        download(case.lora_Bs, wanted_Bs, "grad_lora_B"),
    )
