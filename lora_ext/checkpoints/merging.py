"""``lora-ext merge``: merges adapters into a checkpoint on disk, some rows of a tensor at a time."""

from __future__ import annotations

import dataclasses
import math
import os
import shutil
import statistics
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from lora_ext._common.messages import shown
from lora_ext._common.progress import Progress
from lora_ext.checkpoints.changes import TensorChange, find_changes
from lora_ext.checkpoints.checkpoint import CONFIG_FILE, INDEX_FILE, Checkpoint
from lora_ext.files.adapter_file import METHOD_FILE
from lora_ext.files.contents import AdapterContents, open_adapter
from lora_ext.files.reading import open_tensors, read_json
from lora_ext.files.writing import new_directory, stream_tensors, write_json
from lora_ext.merging.errors import Sample, kept_by
from lora_ext.merging.rounding import Draws, LayerSeed, draws_for, stochastic_seed
from lora_ext.merging.weights import merge_all_, pack_factors

BLOCK_BYTES = 8 << 20
"""Bytes of rows that are merged at a time: bounds the memory."""


@dataclasses.dataclass(frozen=True)
class MergeReport:
    """The result of a merge: numbers of tensors and files."""

    merged: int  # tensors that got updates
    replaced: int  # tensors that an adapter replaced
    added: int  # tensors that the base lacks: a new head, or one that was tied to the embedding
    copied: int  # tensors that are the base's
    files: int  # files of the checkpoint
    skipped: list[str]  # files of the base that were not copied
    kept: dict[str, float]  # of tensors rounded to nearest in 16 bits, the share of the update left, from some rows
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
    rounding: str = "nearest",
    seed: int = 0,
    show_progress: bool = False,
) -> MergeReport:
    """Writes the checkpoint ``base`` with ``adapters`` merged into it to the new directory ``out``.

    A tensor becomes ``round(W + d)``: the updates ``d`` of all adapters are added in float32 (float64 for F64), in the
    given order, and rounded once, to the same bits as :func:`lora_ext.merge`. Tokenizer, configs and other small files
    are copied. If an adapter changes only one of two tied weights, both are stored, and ``config.json`` says so.
    ``out`` appears when everything is on disk, or not at all.

    Args:
        base: a directory with safetensors, sharded or not, or one file.
        adapters: directories in PEFT's format.
        weights: factor of each adapter's updates; None for 1.
        dtype: convert floating-point tensors to it. Updates are added before, in the wider of the two dtypes.
        fan_in_fan_out: layout of square weights that no other weight decides: True for ``[in, out]``, as in Conv1D.
        rounding: as of :func:`lora_ext.merge`. "stochastic" is for tensors that are stored as bfloat16 or float16, and
            stay so.
        seed: of stochastic rounding.

    Raises:
        FileNotFoundError: a file is missing.
        FileExistsError: ``out`` exists, and is not an empty directory.
        ValueError: a file is corrupted; an adapter is a part of a method that has others, or does not fit (the message
            lists every misfit); a result is not finite; a tensor cannot be rounded stochastically.
        OSError: the disk is too small, or cannot be written.
    """
    begin, stochastic = time.perf_counter(), stochastic_seed("merge", rounding, seed)
    checkpoint, out = Checkpoint.open(base), Path(out).absolute()
    contents = _open_adapters(adapters, weights)
    changes = find_changes(checkpoint, contents, fan_in_fan_out=fan_in_fan_out, weights=weights)
    if stochastic is not None:
        _check_rounds_stochastically(changes, dtype)
    table = {key: (change.dtype_as(dtype), change.shape) for key, change in changes.items()}
    total = sum(math.prod(shape) * kind.itemsize for kind, shape in table.values())
    shards = {name: list(tensors) for name, tensors in checkpoint.shards.items()}
    list(shards.values())[-1].extend(key for key in changes if key not in checkpoint)
    copied, skipped = checkpoint.other_files()
    kept: dict[str, list[float]] = {}  # by tensor, of each block
    with new_directory(out, "merge") as staging, Progress("merge", total, show=show_progress) as shown:

        def blocks(key: str) -> Iterator[Tensor]:
            for block in merged_blocks(changes[key], key, checkpoint, dtype, stochastic, kept.setdefault(key, [])):
                yield block
                shown.advance(block.nbytes)

        for name, keys in shards.items():
            shown.note(name)
            with open_tensors(checkpoint.directory / name) as (file, _):
                metadata = file.metadata() or {"format": "pt"}
            stream_tensors(staging / name, {key: table[key] for key in keys}, metadata, blocks)
        if checkpoint.index is not None:
            metadata = checkpoint.index.get("metadata")
            sized = (metadata if isinstance(metadata, dict) else {}) | {"total_size": total}
            if "total_parameters" in sized:
                sized["total_parameters"] = sum(math.prod(shape) for _, shape in table.values())
            weight_map = {key: name for name, keys in shards.items() for key in keys}
            write_json(staging / INDEX_FILE, {"metadata": sized, "weight_map": dict(sorted(weight_map.items()))})
        for name in copied:
            (staging / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(checkpoint.directory / name, staging / name)
        _write_config(staging / CONFIG_FILE, checkpoint, changes, dtype)
    return MergeReport(
        merged=sum(bool(change.terms) for change in changes.values()),
        replaced=sum(change.replacement is not None for change in changes.values()),
        added=len(changes) - len(checkpoint),
        copied=sum(change.replacement is None and not change.terms for change in changes.values()),
        files=len(shards),
        skipped=skipped,
        kept={key: statistics.fmean(shares) for key, shares in kept.items() if shares},
        nbytes=total,
        seconds=time.perf_counter() - begin,
    )


# --- the values -------------------------------------------------------------------------------------------------------


def merged_blocks(
    change: TensorChange,
    key: str,
    base: Checkpoint,
    dtype: torch.dtype | None,
    seed: int | None,
    kept: list[float],
) -> Iterator[Tensor]:
    """Computes a tensor of the result, some rows at a time. ValueError: a result is NaN or infinite.

    Args:
        seed: of stochastic rounding; None: to nearest.
        kept: for each block that is rounded to nearest in 16 bits, the share of the update that is left is added.
    """
    stored, out = change.dtype, change.dtype_as(dtype)
    work = torch.promote_types(stored, out)
    columns = math.prod(change.shape[1:])
    if any(term.update.kind == "parameter" for term in change.terms):
        columns = change.shape[-1]  # a stack of matrices is one matrix above the next
    rows = math.prod(change.shape) // max(columns, 1)
    matrices = [pack_factors(work, terms) for terms in zip(*(term.read() for term in change.terms), strict=True)]
    height = rows // max(len(matrices), 1)
    step = max(BLOCK_BYTES // max(columns * work.itemsize, 1), 1)
    for number, (A, B) in enumerate(matrices or [(None, None)]):
        for begin in range(0, height, step):
            part = slice(begin, min(begin + step, height))
            block = _source(change, base, columns, number * height + part.start, number * height + part.stop).to(work)
            sample = None
            if A is not None:
                if out.itemsize == 2 and seed is None:
                    sample = Sample.of(block, A, B[part])
                draws = None if seed is None else [_draws(seed, key, number, len(matrices), part.start)]
                merge_all_("merge", [block], [A], [B[part]], [key], record=False, draws=draws)
            result = _converted(block, out, key)
            if sample is not None:
                kept += kept_by([sample._replace(weight=result)])
            yield result


def _draws(seed: int, key: str, number: int, matrices: int, first_row: int) -> Draws:
    """Returns the random numbers of rows of a matrix: those of ``lora_ext.merge`` in the model with these names."""
    path, _, name = key.rpartition(".")
    return draws_for(LayerSeed(seed, path), name if matrices == 1 else f"{name}[{number}]", first_row)


def _source(change: TensorChange, base: Checkpoint, columns: int, begin: int, end: int) -> Tensor:
    """Reads rows of the tensor to which updates are added, into new memory."""
    if change.replacement is None:
        return base.rows(change.source, columns, begin, end)
    block = change.replacement.flatten()[begin * columns : end * columns].view(-1, columns)
    return block.to(change.dtype, copy=True)


def _converted(values: Tensor, dtype: torch.dtype, key: str) -> Tensor:
    """Converts the values. What is infinite in the base, such as a mask, may stay so."""
    result = values.to(dtype)
    if dtype != values.dtype and not result.isfinite().all() and values.isfinite().all():
        raise ValueError(f"merge: {key} would have values that {dtype} cannot hold; choose a wider dtype")
    return result


# --- checks and files -------------------------------------------------------------------------------------------------


def _open_adapters(
    adapters: Sequence[str | os.PathLike[str]], weights: Sequence[float] | None
) -> list[AdapterContents]:
    """Opens the adapters, and refuses those that a merged checkpoint cannot hold."""
    if not adapters:
        raise ValueError("merge: no adapter is given")
    if weights is not None and (len(weights) != len(adapters) or not all(map(math.isfinite, weights))):
        raise ValueError(
            f"merge: weights is {list(weights)}, want {len(adapters)} finite numbers, one for each adapter"
        )
    seen = set()
    for directory in map(Path, adapters):
        if (real := directory.resolve()) in seen:
            raise ValueError(f"merge: {directory} is given twice; give it once, with the sum of the weights")
        seen.add(real)
        _check_method(directory)
    return [open_adapter(one, caller="merge") for one in adapters]


def _check_rounds_stochastically(changes: Mapping[str, TensorChange], dtype: torch.dtype | None) -> None:
    """Refuses tensors that do not stay in 16 bits."""
    for key, change in changes.items():
        if change.terms and not (change.dtype == change.dtype_as(dtype) and change.dtype.itemsize == 2):
            raise ValueError(
                f"merge: {key} is stored as {change.dtype} and becomes {change.dtype_as(dtype)}; stochastic rounding "
                "is for tensors that stay bfloat16 or float16: leave it out, or convert the checkpoint before"
            )


def _check_method(directory: Path) -> None:
    """Refuses an adapter that was trained with more than it holds."""
    try:
        note = read_json(directory / METHOD_FILE)
    except (FileNotFoundError, NotADirectoryError):
        return
    if note.get("methods") != [{"name": "lora", "options": {}}] or note.get("pooling") == "mean":
        raise ValueError(
            f"merge: {directory} is a part of {shown(note.get('methods'))}, or was trained with --pooling mean, which "
            "the checkpoint would not say; load it into the model (lora_ext.methods.load_method), and save that"
        )


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
    write_json(path, config)


def _set_dtype(values: dict[str, Any], dtype: str) -> None:
    """Changes the dtype of a config and of the configs in it, except in how the model was quantised."""
    for key, value in values.items():
        if key in ("dtype", "torch_dtype") and isinstance(value, str):
            values[key] = dtype
        elif isinstance(value, dict) and key != "quantization_config":
            _set_dtype(value, dtype)
