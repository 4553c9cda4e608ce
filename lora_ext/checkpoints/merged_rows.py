"""Computes the tensors of a merge a block of rows at a time. No tensor is ever whole in memory.

A tensor counts as a matrix with the rows of its first dimension; a stack of matrices as one matrix above the next. The
sum for an element does not depend on other rows, so a block has the same bits as the same rows of the whole.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor

from lora_ext._ops.dora import row_norms, scale_of_rows
from lora_ext.checkpoints.changes import TensorChange, Term
from lora_ext.checkpoints.checkpoint_files import Checkpoint, raw_blocks
from lora_ext.files.file_bytes import empty_block, read_into, tensor_bytes
from lora_ext.files.regular_file import open_regular
from lora_ext.files.safetensors_format import DTYPES
from lora_ext.merging.weights import MergeRecord, merge_all_, pack_factors

BLOCK_BYTES = 32 << 20  # bytes read at a time: large enough for fast reads, small next to PyTorch itself


@dataclasses.dataclass(frozen=True)
class Factors:
    """Factors for the rows ``begin`` to ``end``: ``lora_A [r, cols]`` and the scaled ``lora_B [end - begin, r]``.

    ``magnitude [end - begin]``: the norms that the rows of the sum get (DoRA), or None.
    """

    begin: int
    end: int
    lora_A: Tensor
    lora_B: Tensor
    magnitude: Tensor | None = None


@dataclasses.dataclass(frozen=True)
class Block:
    """Consecutive rows of the result.

    Attributes:
        values: the rows ``[n, cols]``, or bytes of a tensor that is copied.
        records: ``(first row, end row, record)`` of each merge into them.
    """

    values: Tensor
    records: list[tuple[int, int, MergeRecord]] = dataclasses.field(default_factory=list)


def matrix_shape(change: TensorChange) -> tuple[int, int]:
    """``(rows, cols)`` of the tensor as a matrix."""
    shape = change.shape
    if len(shape) < 2:
        return 1, math.prod(shape)
    if any(term.is_parameter for term in change.terms):
        return math.prod(shape[:-1]), shape[-1]
    return shape[0], math.prod(shape[1:])


def factors(change: TensorChange, dtype: torch.dtype) -> list[Factors]:
    """The factors of all terms side by side, for each matrix of the tensor. ``dtype`` is the dtype of the tensor."""
    if not change.terms:
        return []
    rows, _ = matrix_shape(change)
    pairs_of_terms = [_pairs(term) for term in change.terms]
    height = rows // len(pairs_of_terms[0])
    result = []
    for i, pairs in enumerate(zip(*pairs_of_terms, strict=True)):
        A, B = pack_factors(dtype, pairs)
        term = change.terms[0]
        magnitude = None if term.magnitude is None else term.file.tensor(term.magnitude).to(A.dtype, copy=True)
        result.append(Factors(i * height, (i + 1) * height, A, B, magnitude))
    return result


def _pairs(term: Term) -> list[tuple[Tensor, Tensor, float]]:
    """``(lora_A, lora_B, scaling)`` for each matrix of the stack, in the layout of the tensor."""
    B = term.file.tensor(term.lora_B)
    if term.lora_A is None:
        return [(B[None], torch.ones(1, 1, dtype=B.dtype), term.scaling)]
    A = term.file.tensor(term.lora_A)
    pairs = split_stack(A, B, term.matrices, term.is_parameter)
    if term.layout == "plain":
        return [(A, B, term.scaling) for A, B in pairs]
    return [(B.T, A.T, term.scaling) for A, B in pairs]


def split_stack(A: Tensor, B: Tensor, matrices: int, is_parameter: bool) -> list[tuple[Tensor, Tensor]]:
    """Splits PEFT's factors of a stack into ``(lora_A [r, in], lora_B [out, r])`` for each matrix."""
    if is_parameter:  # A [matrices * r, in], B [out, r * matrices], where the matrix is the faster index
        As = A.reshape(matrices, -1, A.shape[-1]).unbind()
        Bs = B.reshape(B.shape[0], -1, matrices).unbind(-1)
    else:
        As, Bs = A.flatten(1).chunk(matrices), B.flatten(1).chunk(matrices)
    return list(zip(As, Bs, strict=True))


def blocks(
    change: TensorChange,
    key: str,
    base: Checkpoint,
    dtype: torch.dtype | None,
    record: bool = False,
    before: Callable[[memoryview], None] = lambda data: None,
) -> Iterator[Block]:
    """Computes the tensor's values from the first row to the last.

    Args:
        dtype: convert to it. Updates are added before, in the wider of this and the base's dtype. None: as stored.
        record: keep the records that undo the merge.
        before: called with the bytes of each block before it is changed or copied.

    Raises:
        ValueError: a result is NaN or infinite, or the files have changed meanwhile.
    """
    stored = DTYPES.get(change.dtype)
    out = stored if dtype is None else dtype
    if stored is None or (out == stored and not change.is_changed):
        for values in raw_blocks(base.file(change.source), base.info(change.source), BLOCK_BYTES):
            before(tensor_bytes(values))
            yield Block(values)
        return
    work = torch.promote_types(stored, out)
    rows, cols = matrix_shape(change)
    row_bytes = cols * max(work.itemsize, stored.itemsize)
    height = max(BLOCK_BYTES // max(row_bytes, 1), 1)
    parts, replaced = factors(change, work), _rows(change)
    with _open_source(change, base, stored) as read:
        for begin in range(0, rows, height):
            end = min(begin + height, rows)
            values = read(begin, end, cols)
            before(tensor_bytes(values))
            values = values.to(work)
            for index, row in replaced.items():
                if begin <= index < end:
                    values[index - begin] = row
            if parts and parts[0].magnitude is not None:
                yield Block(_with_norms(values, begin, parts[0], key, out))
                continue
            records = _merge(values, begin, parts, key, record)
            converted = values.to(out)
            if out != work and not converted.isfinite().all() and values.isfinite().all():
                raise ValueError(f"merge: {key} has values that {out} cannot hold; choose a wider dtype")
            yield Block(converted, records)


def _with_norms(values: Tensor, begin: int, part: Factors, key: str, dtype: torch.dtype) -> Tensor:
    """Returns the rows plus their updates, scaled to the norms of ``part`` and rounded once, to ``dtype``."""
    rows = slice(begin, begin + len(values))
    values, B = values.to(part.lora_A.dtype), part.lora_B[rows]
    factor = scale_of_rows(part.magnitude[rows], row_norms(values, part.lora_A, B, 1.0)).unsqueeze(1)
    result = values.mul_(factor).addmm_(factor * B, part.lora_A).to(dtype)
    if not result.isfinite().all():
        raise ValueError(f"merge: {key} would have values that are NaN or infinite, or that {dtype} cannot hold")
    return result


def _merge(
    values: Tensor, begin: int, parts: list[Factors], key: str, record: bool
) -> list[tuple[int, int, MergeRecord]]:
    merges = []
    for part in parts:
        first, last = max(part.begin, begin), min(part.end, begin + len(values))
        if first < last:
            weight = values[first - begin : last - begin]
            merges.append((first, last, weight, part.lora_A, part.lora_B[first - part.begin : last - part.begin]))
    weights, As, Bs = ([part[i] for part in merges] for i in (2, 3, 4))
    kept = merge_all_("merge", weights, As, Bs, [key] * len(merges), record)
    return [(first, last, one) for (first, last, *_), one in zip(merges, kept, strict=True) if one is not None]


def _rows(change: TensorChange) -> dict[int, Tensor]:
    return {
        index: row for file, key, indices in change.rows for index, row in zip(indices, file.tensor(key), strict=True)
    }


@contextmanager
def _open_source(
    change: TensorChange, base: Checkpoint, dtype: torch.dtype
) -> Iterator[Callable[[int, int, int], Tensor]]:
    """Yields ``read(begin, end, cols)``, which reads rows of the unchanged tensor into new memory."""
    if change.replacement is not None:
        adapter, key = change.replacement

        def read_replacement(begin: int, end: int, cols: int) -> Tensor:
            values = adapter.tensor(key).flatten()[begin * cols : end * cols]  # a row may be empty
            return values.view(end - begin, cols).to(dtype, copy=True)

        yield read_replacement
        return
    info = base.info(change.source)
    with open_regular(base.file(change.source)) as file:

        def read(begin: int, end: int, cols: int) -> Tensor:
            values = empty_block(end - begin, cols, dtype=dtype)
            read_into(file, info.begin + begin * cols * dtype.itemsize, values)
            return values

        yield read
