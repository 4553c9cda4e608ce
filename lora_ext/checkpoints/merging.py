"""``lora-ext merge``: adapters into a checkpoint, both on disk, in the memory of a block of rows."""

from __future__ import annotations

import dataclasses
import math
import os
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from lora_ext import _load
from lora_ext._common.printable import listed
from lora_ext._ops.checks import FLOATING
from lora_ext.checkpoints.changes import MergePlan, TensorPlan, plan_merge
from lora_ext.checkpoints.checkpoint_files import SINGLE_FILE, Checkpoint
from lora_ext.checkpoints.contents import open_adapter
from lora_ext.checkpoints.merged_rows import blocks
from lora_ext.checkpoints.output import Output, check_apart, index_metadata, shard_metadata
from lora_ext.checkpoints.record_writer import RecordWriter
from lora_ext.checkpoints.writing import Description
from lora_ext.files.safetensors_format import DTYPE_NAMES, DTYPES

__all__ = ["MergeReport", "merge"]


@dataclasses.dataclass(frozen=True)
class MergeReport:
    """What a merge did.

    Attributes:
        merged, replaced, added, copied: tensors that got updates; that an adapter holds in full or in part; of these,
            those that the base lacks; that are the base's.
        files: written checkpoint files; ``kept`` of them by an earlier run that did not end.
        skipped: files of the base that were not copied.
        nbytes: of all tensors.
    """

    merged: int
    replaced: int
    added: int
    copied: int
    files: int
    kept: int
    skipped: list[str]
    nbytes: int
    seconds: float
    verified: bool


def merge(
    base: str | os.PathLike[str],
    adapters: Sequence[str | os.PathLike[str]],
    out: str | os.PathLike[str],
    *,
    dtype: torch.dtype | None = None,
    shard_bytes: int | None = None,
    fan_in_fan_out: bool | None = None,
    untie: bool = False,
    record: bool = False,
    verify: bool = False,
    overwrite: bool = False,
    allow_pickle: bool = False,
    subtract: bool = False,
    show_progress: bool = False,
) -> MergeReport:
    """Writes the checkpoint ``base`` with ``adapters`` merged into it to the new directory ``out``.

    Tensors are ``round(W + d)``: the updates ``d`` of all adapters are added in float32 (float64 for F64), in the order
    given, and rounded once, to the bits of :func:`lora_ext.merge`. Tokenizer, configs and other small files are copied.
    ``out`` appears when all is written to disk, or not at all; a run that was killed is continued by the next one with
    the same arguments.

    Args:
        base: a directory with safetensors, sharded or not.
        adapters: directories in PEFT's format, of any layers that PEFT adapts.
        dtype: convert floating-point tensors to it, after all is added in the wider of the two dtypes.
        shard_bytes: at most so many in a file, except where one tensor has more; None: the files of the base.
        fan_in_fan_out: how square weights lie whose neighbours do not tell: True for ``[in, out]``, as in Conv1D.
        untie: store tied weights apart where an adapter changes one of them only.
        record: also write ``merge_record/``, from which :func:`~lora_ext.checkpoints.unmerge` restores every bit.
        verify: read the result back, and compare every bit with a second computation.
        overwrite: replace the checkpoint that is at ``out``.
        allow_pickle: read ``adapter_model.bin`` where there is no safetensors file.
        subtract: take the updates out again, up to rounding.

    Raises:
        FileNotFoundError: something is missing.
        FileExistsError: ``out`` exists.
        ValueError: a file is corrupted; an adapter does not fit: all that does not is listed; a result is not finite.
        OSError: the disk is too small, or cannot be written.
    """
    caller = "unmerge" if subtract else "merge"
    if record and (dtype is not None or untie):
        raise ValueError("merge: record goes without dtype and untie, which cannot be undone")
    begin = time.perf_counter()
    checkpoint = Checkpoint.open(base)
    if not adapters:
        raise ValueError(f"{caller}: no adapter is given")
    if not len(checkpoint):
        raise ValueError(f"{caller}: {base} holds no tensor")
    contents = [open_adapter(directory, allow_pickle=allow_pickle, caller=caller) for directory in adapters]
    plan = plan_merge(
        checkpoint, contents, fan_in_fan_out=fan_in_fan_out, untie=untie, multiplier=-1.0 if subtract else 1.0
    )
    if subtract and (whole := [key for key, tensor in plan.tensors.items() if tensor.replacement or tensor.rows]):
        raise ValueError(
            f"{caller}: the adapter replaced tensors in full, whose old values only a record has (merge --record):"
            f"{listed(whole)}"
        )
    out = Path(out).absolute()
    check_apart(caller, out, [checkpoint.directory, *(one.file.directory for one in contents)])
    shards = _shards(checkpoint, plan, dtype, shard_bytes)
    output = Output(
        checkpoint,
        shards,
        lambda key: blocks(plan.tensors[key], key, checkpoint, _target(plan.tensors[key], dtype)),
        metadata=shard_metadata(checkpoint, shards),
        index_metadata=index_metadata(checkpoint),
        what={
            "version": _load.build_info()["version"],
            "base": checkpoint.fingerprint(),
            "adapters": [one.fingerprint() for one in contents],
            "options": [str(dtype), shard_bytes, fan_in_fan_out, untie, record, subtract],
        },
        config_changes=_config_changes(plan, dtype),
        recorder=RecordWriter(plan, checkpoint) if record else None,
    )
    written = output.write(out, caller, verify=verify, overwrite=overwrite, show_progress=show_progress)
    tensors = plan.tensors.values()
    return MergeReport(
        merged=sum(bool(tensor.terms) for tensor in tensors),
        replaced=sum(bool(tensor.replacement or tensor.rows) for tensor in tensors),
        added=len(plan.tensors) - len(checkpoint),
        copied=sum(not tensor.is_changed for tensor in tensors),
        files=len(output.shards),
        kept=written.kept,
        skipped=written.skipped,
        nbytes=output.nbytes,
        seconds=time.perf_counter() - begin,
        verified=verify,
    )


def _target(tensor: TensorPlan, dtype: torch.dtype | None) -> torch.dtype | None:
    """What a tensor is converted to: indices and quantised weights stay."""
    return dtype if DTYPES.get(tensor.dtype) in FLOATING else None


def _config_changes(plan: MergePlan, dtype: torch.dtype | None) -> dict[str, Any]:
    changes: dict[str, Any] = {} if dtype is None else {"dtype": str(dtype).removeprefix("torch.")}
    return changes | ({"tie_word_embeddings": False} if plan.untied else {})


def _shards(
    base: Checkpoint, plan: MergePlan, dtype: torch.dtype | None, shard_bytes: int | None
) -> dict[str, dict[str, Description]]:
    """File name -> its tensors."""
    described = {key: _describe(tensor, base, _target(tensor, dtype)) for key, tensor in plan.tensors.items()}
    files: list[dict[str, Description]] = []
    if shard_bytes is None:
        names = list(base.shards)
        files = [{key: described[key] for key in base.shards[name]} for name in names]
        for key in list(described)[len(base) :]:
            place = names.index(base.shard_of(plan.untied[key])) if key in plan.untied else -1
            files[place][key] = described[key]
        return dict(zip(names, files, strict=True))
    room = 0
    for key, one in described.items():
        if one[2] > room or not files:
            files.append({})
            room = shard_bytes
        files[-1][key] = one
        room -= one[2]
    if len(files) == 1:
        return {SINGLE_FILE: files[0]}
    return {f"model-{i:05d}-of-{len(files):05d}.safetensors": tensors for i, tensors in enumerate(files, 1)}


def _describe(tensor: TensorPlan, base: Checkpoint, to: torch.dtype | None) -> Description:
    if to is None and tensor.source is not None:
        return tensor.dtype, tensor.shape, base.info(tensor.source).nbytes
    dtype = DTYPES[tensor.dtype] if to is None else to
    return DTYPE_NAMES[dtype], tensor.shape, math.prod(tensor.shape) * dtype.itemsize
