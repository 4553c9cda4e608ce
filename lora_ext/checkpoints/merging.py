"""``lora-ext merge``: merges adapters into a checkpoint on disk, one tensor at a time."""

from __future__ import annotations

import dataclasses
import json
import math
import os
import shutil
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from lora_ext._common.progress import Progress
from lora_ext._ops.dora import row_norms, scale_of_rows
from lora_ext.checkpoints.changes import TensorChange, find_changes
from lora_ext.checkpoints.checkpoint import CONFIG_FILE, INDEX_FILE, Checkpoint
from lora_ext.checkpoints.contents import AdapterContents, open_adapter
from lora_ext.files.adapter_file import read_method_note
from lora_ext.files.reading import BITS, DTYPE_NAMES, DTYPES, open_tensors
from lora_ext.files.writing import check_new, new_directory, stream_tensors
from lora_ext.merging.weights import merge_all_, pack_factors

BLOCK_BYTES = 8 << 20
"""Bytes of rows that are merged at a time: bounds the memory next to the tensor itself."""


@dataclasses.dataclass(frozen=True)
class MergeReport:
    """The result of a merge: numbers of tensors and files."""

    merged: int  # tensors that got updates
    replaced: int  # tensors that an adapter replaced, in full or in part
    added: int  # tensors that the base lacks: a new head, or one that was tied to the embedding
    copied: int  # tensors that are the base's
    files: int  # files of the checkpoint
    skipped: list[str]  # files of the base that were not copied
    nbytes: int  # of all tensors
    seconds: float


def merge(
    base: str | os.PathLike[str],
    adapters: Sequence[str | os.PathLike[str]],
    out: str | os.PathLike[str],
    *,
    weights: Sequence[float] | None = None,
    dtype: torch.dtype | None = None,
    fan_in_fan_out: bool | None = None,
    show_progress: bool = False,
) -> MergeReport:
    """Writes the checkpoint ``base`` with ``adapters`` merged into it to the new directory ``out``.

    A tensor becomes ``round(W + d)``: the updates ``d`` of all adapters are added in float32 (float64 for F64), in the
    given order, and rounded once, to the same bits as :func:`lora_ext.merge`. Tokenizer, configs and other small files
    are copied. If an adapter changes only one of two tied weights, both are stored, and ``config.json`` says so.
    ``out`` appears when everything is on disk, or not at all.

    Args:
        base: a directory with safetensors, sharded or not, or one file.
        adapters: directories in PEFT's format, with any layers that PEFT adapts.
        weights: factor of each adapter's updates; None for 1.
        dtype: convert floating-point tensors to it. Updates are added before, in the wider of the two dtypes.
        fan_in_fan_out: layout of square weights that no other weight decides: True for ``[in, out]``, as in Conv1D.

    Raises:
        FileNotFoundError: a file is missing.
        FileExistsError: ``out`` exists, and is not an empty directory.
        ValueError: a file is corrupted; an adapter is a part of a method that has others, or does not fit (the message
            lists every misfit); a result is not finite.
        OSError: the disk is too small, or cannot be written.
    """
    begin = time.perf_counter()
    checkpoint, out = Checkpoint.open(base), Path(out).absolute()
    contents = _open_adapters(checkpoint, adapters, weights)
    changes = find_changes(checkpoint, contents, fan_in_fan_out=fan_in_fan_out, weights=weights)
    check_new(out, "merge")
    # Indices and quantised weights keep their dtype.
    dtypes = {key: DTYPE_NAMES[dtype] if dtype and one.is_floating else one.dtype for key, one in changes.items()}
    table = {key: (dtypes[key], tensor.shape) for key, tensor in changes.items()}
    sizes = {key: math.prod(shape) * BITS[name] // 8 for key, (name, shape) in table.items()}
    shards = {name: list(tensors) for name, tensors in checkpoint.shards.items()}
    list(shards.values())[-1].extend(key for key in changes if key not in checkpoint)
    total = sum(sizes.values())
    copied, skipped = checkpoint.other_files()
    with new_directory(out, "merge") as staging, Progress("merge", total, show=show_progress) as shown:

        def values(key: str) -> Tensor:
            tensor = merged_tensor(changes[key], key, checkpoint, dtype)
            shown.advance(sizes[key])
            return tensor

        for name, keys in shards.items():
            shown.note(name)
            with open_tensors(checkpoint.directory / name) as (file, _):
                metadata = file.metadata() or {"format": "pt"}
            stream_tensors(staging / name, {key: table[key] for key in keys}, metadata, values)
        if checkpoint.index is not None:
            sized = dict(checkpoint.index.get("metadata") or {}) | {"total_size": total}
            if "total_parameters" in sized:
                sized["total_parameters"] = sum(math.prod(shape) for _, shape in table.values())
            weight_map = {key: name for name, keys in shards.items() for key in keys}
            _write_json(staging / INDEX_FILE, {"metadata": sized, "weight_map": dict(sorted(weight_map.items()))})
        for name in copied:
            (staging / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(checkpoint.directory / name, staging / name)
        _write_config(staging / CONFIG_FILE, checkpoint, changes, dtype)
    tensors = changes.values()
    return MergeReport(
        merged=sum(bool(tensor.terms) for tensor in tensors),
        replaced=sum(bool(tensor.replacement or tensor.rows) for tensor in tensors),
        added=len(changes) - len(checkpoint),
        copied=sum(not (tensor.terms or tensor.replacement or tensor.rows) for tensor in tensors),
        files=len(shards),
        skipped=skipped,
        nbytes=total,
        seconds=time.perf_counter() - begin,
    )


# --- the values -------------------------------------------------------------------------------------------------------


def merged_tensor(change: TensorChange, key: str, base: Checkpoint, dtype: torch.dtype | None) -> Tensor:
    """Computes a tensor of the result, in new memory. ValueError: a result is NaN or infinite."""
    stored = DTYPES.get(change.dtype)
    if change.replacement is not None:
        file, name = change.replacement
        tensor = file.tensors[name].to(stored, copy=True)
    else:
        tensor = base.tensor(change.source)
    for file, name, indices in change.rows:
        tensor[torch.tensor(indices, dtype=torch.long)] = file.tensors[name].to(stored)
    out = stored if dtype is None or not change.is_floating else dtype
    if out == stored and not change.terms:
        return tensor
    work = torch.promote_types(stored, out)
    is_in_place = out.itemsize == stored.itemsize  # blocks are converted one by one
    result = tensor.view(out) if is_in_place else torch.empty(change.shape, dtype=out)
    rows, columns = _matrix_shape(change)
    source, target = tensor.view(rows, columns), result.view(rows, columns)
    factors = _factors(change, work)
    height = rows // max(len(factors), 1)
    step = max(BLOCK_BYTES // max(columns * work.itemsize, 1), 1)
    for number, (A, B, magnitude) in enumerate(factors or [(None, None, None)]):
        for begin in range(0, height, step):
            part = slice(begin, min(begin + step, height))
            here = slice(number * height + part.start, number * height + part.stop)
            values = source[here].to(work)  # the tensor's memory, if it has the dtype already
            if magnitude is not None:
                values = _with_norms(values, A, B[part], magnitude[part])
            elif A is not None:
                merge_all_("merge", [values], [A], [B[part]], [key], record=False)
            if out != stored or magnitude is not None:
                target[here] = _rounded(values, out, key, magnitude is not None)
    return result


def _matrix_shape(change: TensorChange) -> tuple[int, int]:
    """``(rows, columns)`` of the tensor as a matrix; a stack of matrices is one matrix above the next."""
    shape = change.shape
    if len(shape) < 2:
        return 1, math.prod(shape)
    if any(term.update.kind == "parameter" for term in change.terms):
        return math.prod(shape[:-1]), shape[-1]
    return shape[0], math.prod(shape[1:])


def _factors(change: TensorChange, dtype: torch.dtype) -> list[tuple[Tensor, Tensor, Tensor | None]]:
    """The factors of all terms side by side, and the magnitude, for each matrix of the tensor."""
    stacks = [term.read() for term in change.terms]
    packed = [pack_factors(dtype, terms) for terms in zip(*stacks, strict=True)]
    magnitude = None
    for term in change.terms:
        if term.magnitude is not None:
            magnitude = term.file.tensors[term.magnitude].to(packed[0][0].dtype)
    return [(A, B, magnitude) for A, B in packed]


def _with_norms(values: Tensor, A: Tensor, B: Tensor, magnitude: Tensor) -> Tensor:
    """Returns the rows plus their updates, scaled to the norms ``magnitude`` (DoRA), in the accumulation dtype."""
    values = values.to(A.dtype, copy=True)
    factor = scale_of_rows(magnitude, row_norms(values, A, B, 1.0)).unsqueeze(1)
    return values.mul_(factor).addmm_(factor * B, A)


def _rounded(values: Tensor, dtype: torch.dtype, key: str, check_all: bool) -> Tensor:
    """Converts the values. What is infinite in the base, such as a mask, may stay so unless ``check_all`` is set."""
    result = values.to(dtype)
    if not result.isfinite().all() and (check_all or values.isfinite().all()):
        raise ValueError(
            f"merge: {key} would have values that are NaN or infinite, or that {dtype} cannot hold; check the adapter, "
            "or choose a wider dtype"
        )
    return result


# --- checks and files -------------------------------------------------------------------------------------------------


def _open_adapters(
    base: Checkpoint,
    adapters: Sequence[str | os.PathLike[str]],
    weights: Sequence[float] | None,
) -> list[AdapterContents]:
    """Opens the adapters, and refuses those that a merged checkpoint cannot hold."""
    if not adapters:
        raise ValueError("merge: no adapter is given")
    if weights is not None and (len(weights) != len(adapters) or not all(map(math.isfinite, weights))):
        wanted = f"want {len(adapters)} finite numbers, one for each adapter"
        raise ValueError(f"merge: weights is {list(weights)}, {wanted}")
    opened = [open_adapter(one, caller="merge") for one in adapters]
    for contents in opened:
        directory = contents.file.directory
        method, pooling = read_method_note(directory)
        if method not in ("", "lora"):
            raise ValueError(
                f"merge: {directory} holds the low-rank part of {method}, and the checkpoint would lack the rest; "
                "load it into the model (lora_ext.methods.load_method), and run it unmerged"
            )
        config = base.config()
        if pooling == "mean" and config and config.get("classifier_pooling") != "mean":
            raise ValueError(
                f"merge: {directory} was trained with --pooling mean, and the checkpoint would not say so; write "
                f'"classifier_pooling": "mean" into {base.directory / CONFIG_FILE} first'
            )
    return opened


def _write_config(path: Path, base: Checkpoint, changes: Mapping[str, TensorChange], dtype: torch.dtype | None) -> None:
    """Writes the copied ``config.json`` again where the merge changes what it says."""
    is_untied = any(tensor.source is not None and tensor.source != key for key, tensor in changes.items())
    if not path.exists() or (dtype is None and not is_untied):
        return
    config = base.config()
    if dtype is not None:
        _set_dtype(config, str(dtype).removeprefix("torch."))
    if is_untied:
        config["tie_word_embeddings"] = False
    _write_json(path, config)


def _write_json(path: Path, values: Mapping[str, Any]) -> None:
    path.write_text(json.dumps(values, indent=2) + "\n", encoding="utf-8")


def _set_dtype(values: dict[str, Any], dtype: str) -> None:
    """Changes the dtype of a config and of the configs in it, except in how the model was quantised."""
    for key, value in values.items():
        if key in ("dtype", "torch_dtype") and isinstance(value, str):
            values[key] = dtype
        elif isinstance(value, dict) and key != "quantization_config":
            _set_dtype(value, dtype)
