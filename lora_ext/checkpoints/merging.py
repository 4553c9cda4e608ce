"""``lora-ext merge``: merges adapters into a checkpoint on disk, a block of rows at a time."""

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
from lora_ext.checkpoints.changes import MergeChanges, TensorChange, find_changes
from lora_ext.checkpoints.checkpoint_files import SINGLE_FILE, Checkpoint
from lora_ext.checkpoints.contents import open_adapter
from lora_ext.checkpoints.merged_mark import changed_mark, with_mark
from lora_ext.checkpoints.merged_rows import blocks
from lora_ext.checkpoints.other_files import CONFIG_FILE, read_model_config
from lora_ext.checkpoints.output import Output, check_apart, index_metadata, shard_metadata
from lora_ext.checkpoints.record_writer import RecordWriter
from lora_ext.checkpoints.writing import Description
from lora_ext.files.method_note import read_method_note
from lora_ext.files.safetensors_format import DTYPE_NAMES, DTYPES


@dataclasses.dataclass(frozen=True)
class MergeReport:
    """The result of a merge.

    Attributes:
        merged: number of tensors that got updates.
        replaced: number of tensors that an adapter replaced, in full or in part.
        added: number of replaced tensors that the base lacks.
        copied: number of tensors that are the base's.
        files: number of checkpoint files.
        kept: number of these files that an interrupted run had written.
        skipped: files of the base that were not copied.
        nbytes: bytes of all tensors.
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

    A tensor becomes ``round(W + d)``: the updates ``d`` of all adapters are added in float32 (float64 for F64), in the
    given order, and rounded once, to the same bits as :func:`lora_ext.merge`. Tokenizer, configs and other small files
    are copied. ``out`` appears when everything is on disk, or not at all. A run with the same arguments continues a
    killed one.

    Args:
        base: a directory with safetensors, sharded or not.
        adapters: directories in PEFT's format, with any layers that PEFT adapts.
        dtype: convert floating-point tensors to it. Updates are added before, in the wider of the two dtypes.
        shard_bytes: most bytes of a file, except for one that holds a single larger tensor; None for the base's files.
        fan_in_fan_out: layout of square weights that no other weight decides: True for ``[in, out]``, as in Conv1D.
        untie: store tied weights apart if an adapter changes only one of them.
        record: also write ``merge_record/``, from which :func:`~lora_ext.checkpoints.unmerge` restores every bit.
        verify: read the result back, and compare every bit with a second computation.
        overwrite: replace the checkpoint at ``out``. Files there that a merge of ``base`` would not write are refused.
        allow_pickle: read ``adapter_model.bin`` where there is no safetensors file.
        subtract: subtract the updates, up to rounding.

    Raises:
        FileNotFoundError: a file is missing.
        FileExistsError: ``out`` exists.
        ValueError: a file is corrupted; an adapter is given twice, is in ``base`` already, is a part of a method that
            has others, or does not fit (the message lists every misfit); a result is not finite.
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
    adapters = list(adapters)
    for i, directory in enumerate(adapters):
        if any(os.path.realpath(directory) == os.path.realpath(other) for other in adapters[:i]):
            raise ValueError(f"{caller}: {directory} is given twice, and its update would count twice; give it once")
    contents = [
        open_adapter(directory, allow_pickle=allow_pickle, with_dora=True, caller=caller) for directory in adapters
    ]
    for held in contents:
        if held.is_dora and (record or subtract):
            raise ValueError(
                f"{caller}: {held.file.directory} is a DoRA adapter (use_dora), whose merge on disk cannot be undone; "
                + ("keep the base, and merge without record" if record else "take the base in place of the merged one")
            )
        if held.file.config.get("alora_invocation_tokens"):
            raise ValueError(
                f"{caller}: {held.file.directory} acts from its alora_invocation_tokens on (aLoRA), and a checkpoint's "
                "weights act on all tokens; load it into the model (load_adapter), and run it unmerged"
            )
        if not subtract:
            _check_is_whole(held.file.directory, checkpoint)
    fingerprints = {one.file.directory: one.fingerprint() for one in contents}
    mark = changed_mark(checkpoint, fingerprints, subtract=subtract, caller=caller)
    changes = find_changes(
        checkpoint, contents, fan_in_fan_out=fan_in_fan_out, untie=untie, multiplier=-1.0 if subtract else 1.0
    )
    if subtract and (whole := [key for key, tensor in changes.tensors.items() if tensor.replacement or tensor.rows]):
        raise ValueError(
            f"{caller}: the adapter replaced tensors in full, whose old values only a record has (merge --record):"
            f"{listed(whole)}"
        )
    out = Path(out).absolute()
    check_apart(caller, out, [checkpoint.directory, *(one.file.directory for one in contents)])
    shards = _shards(checkpoint, changes, dtype, shard_bytes)
    output = Output(
        checkpoint,
        shards,
        lambda key: blocks(changes.tensors[key], key, checkpoint, _target(changes.tensors[key], dtype)),
        metadata={name: with_mark(one, mark) for name, one in shard_metadata(checkpoint, shards).items()},
        index_metadata=index_metadata(checkpoint),
        what={
            "version": _load.build_info()["version"],
            "base": checkpoint.fingerprint(),
            "adapters": [*fingerprints.values()],
            "options": [str(dtype), shard_bytes, fan_in_fan_out, untie, record, subtract],
        },
        config_changes=_config_changes(changes, dtype),
        recorder=RecordWriter(changes, checkpoint) if record else None,
    )
    written = output.write(out, caller, verify=verify, overwrite=overwrite, show_progress=show_progress)
    tensors = changes.tensors.values()
    return MergeReport(
        merged=sum(bool(tensor.terms) for tensor in tensors),
        replaced=sum(bool(tensor.replacement or tensor.rows) for tensor in tensors),
        added=len(changes.tensors) - len(checkpoint),
        copied=sum(not tensor.is_changed for tensor in tensors),
        files=len(output.shards),
        kept=written.kept,
        skipped=written.skipped,
        nbytes=output.nbytes,
        seconds=time.perf_counter() - begin,
        verified=verify,
    )


def _check_is_whole(adapter: Path, base: Checkpoint) -> None:
    """Raises ValueError if the trained model had more than the adapter, which the merged checkpoint would lack."""
    note = read_method_note(adapter)
    if note.has_other_parts:
        raise ValueError(
            f"merge: {adapter} holds the low-rank part of {note.name}, and the checkpoint would lack the rest; load it "
            "into the model (lora_ext.methods.load_method), and run it unmerged"
        )
    config = read_model_config(base)
    if note.pooling == "mean" and config is not None and config.get("classifier_pooling") != "mean":
        raise ValueError(
            f"merge: {adapter} was trained with --pooling mean, and the checkpoint would not say so; write "
            f'"classifier_pooling": "mean" into {base.directory / CONFIG_FILE} first'
        )


def _target(tensor: TensorChange, dtype: torch.dtype | None) -> torch.dtype | None:
    """The dtype that a tensor is converted to; None for indices and quantised weights, which stay as they are."""
    return dtype if DTYPES.get(tensor.dtype) in FLOATING else None


def _config_changes(changes: MergeChanges, dtype: torch.dtype | None) -> dict[str, Any]:
    values: dict[str, Any] = {} if dtype is None else {"dtype": str(dtype).removeprefix("torch.")}
    return values | ({"tie_word_embeddings": False} if changes.untied else {})


def _shards(
    base: Checkpoint, changes: MergeChanges, dtype: torch.dtype | None, shard_bytes: int | None
) -> dict[str, dict[str, Description]]:
    """File name -> its tensors."""
    described = {key: _describe(tensor, base, _target(tensor, dtype)) for key, tensor in changes.tensors.items()}
    files: list[dict[str, Description]] = []
    if shard_bytes is None:
        names = list(base.shards)
        files = [{key: described[key] for key in base.shards[name]} for name in names]
        for key in list(described)[len(base) :]:
            place = names.index(base.shard_of(changes.untied[key])) if key in changes.untied else -1
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


def _describe(tensor: TensorChange, base: Checkpoint, to: torch.dtype | None) -> Description:
    if to is None and tensor.source is not None:
        return tensor.dtype, tensor.shape, base.info(tensor.source).nbytes
    dtype = DTYPES[tensor.dtype] if to is None else to
    return DTYPE_NAMES[dtype], tensor.shape, math.prod(tensor.shape) * dtype.itemsize
