"""``lora-ext merge``: adapters into a checkpoint, both on disk, in the memory of a block of rows."""

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

from .. import _load
from .._checks import FLOATING
from ..adapter_file import AdapterFile
from ..safetensors_format import DTYPE_NAMES, DTYPES
from .checkpoint_files import INDEX_FILE, SINGLE_FILE, Checkpoint
from .contents import read_contents
from .merging import blocks
from .other_files import copy_other_files
from .plan import MergePlan, TensorPlan, plan_merge
from .progress import progress
from .staging import Staging, fingerprint
from .writing import Description, compare_file, write_file

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
    verify: bool = False,
    overwrite: bool = False,
    allow_pickle: bool = False,
    multiplier: float = 1.0,
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
        dtype: convert floating-point tensors to it, once all is added in the wider of the two dtypes.
        shard_bytes: at most so many in a file, but for a larger tensor; None: the files of the base.
        fan_in_fan_out: how square weights lie whose neighbours do not tell: True for ``[in, out]``, as in Conv1D.
        untie: store tied weights apart where an adapter changes one of them only.
        verify: read the result back, and compare every bit with a second computation.
        overwrite: replace the checkpoint that is at ``out``.
        allow_pickle: read ``adapter_model.bin`` where there is no safetensors file.
        multiplier: of every update.

    Raises:
        FileNotFoundError: something is missing.
        FileExistsError: ``out`` exists.
        ValueError: a file is corrupted; an adapter does not fit: all that does not is listed; a result is not finite.
        OSError: the disk is too small, or cannot be written.
    """
    begin = time.perf_counter()
    checkpoint = Checkpoint.open(base)
    files = [AdapterFile.open(directory, allow_pickle=allow_pickle, caller="merge") for directory in adapters]
    if not files:
        raise ValueError("merge: no adapter is given")
    plan = plan_merge(
        checkpoint,
        [read_contents(file) for file in files],
        fan_in_fan_out=fan_in_fan_out,
        untie=untie,
        multiplier=multiplier,
    )
    shards = _shards(checkpoint, plan, dtype, shard_bytes)
    out = Path(out).absolute()
    _check_apart(out, [checkpoint.directory, *(file.directory for file in files)])
    what = {
        "version": _load.build_info()["version"],
        "base": fingerprint([checkpoint.directory / name for name in checkpoint.shards], contents=False),
        "adapters": [fingerprint([file.path, file.directory / "adapter_config.json"], contents=True) for file in files],
        "options": [str(dtype), shard_bytes, fan_in_fan_out, untie, multiplier],
    }
    total = sum(nbytes for tensors in shards.values() for _, _, nbytes in tensors.values())
    with Staging(out, what, overwrite) as staging:
        kept = len(staging.finished)
        _check_space(out, total - sum(staging.finished.values()))
        with progress("merge", total * (1 + verify), show_progress) as shown:
            for name, tensors in shards.items():
                shown.file(name)
                if name in staging.finished:
                    shown.advance(sum(nbytes for _, _, nbytes in tensors.values()))
                    continue
                write_file(
                    staging.path / name,
                    tensors,
                    _metadata(checkpoint),
                    lambda key: blocks(plan.tensors[key], key, checkpoint, _target(plan.tensors[key], dtype)),
                    shown.advance,
                )
                staging.finish(name)
            for name, tensors in shards.items() if verify else ():
                shown.file(name)
                compare_file(
                    staging.path / name,
                    tensors,
                    lambda key: blocks(plan.tensors[key], key, checkpoint, _target(plan.tensors[key], dtype)),
                    shown.advance,
                )
        if list(shards) != [SINGLE_FILE] and (len(shards) > 1 or checkpoint.index is not None):
            (staging.path / INDEX_FILE).write_text(_index(checkpoint, shards), encoding="utf-8")
        changes: dict[str, Any] = {} if dtype is None else {"dtype": str(dtype).removeprefix("torch.")}
        if plan.untied:
            changes["tie_word_embeddings"] = False
        skipped = copy_other_files(checkpoint, staging.path, changes)
        staging.publish()
    tensors = plan.tensors.values()
    return MergeReport(
        merged=sum(bool(tensor.terms) for tensor in tensors),
        replaced=sum(bool(tensor.replacement or tensor.rows) for tensor in tensors),
        added=len(plan.tensors) - len(checkpoint),
        copied=sum(not tensor.is_changed for tensor in tensors),
        files=len(shards),
        kept=kept,
        skipped=skipped,
        nbytes=total,
        seconds=time.perf_counter() - begin,
        verified=verify,
    )


def _target(tensor: TensorPlan, dtype: torch.dtype | None) -> torch.dtype | None:
    """What a tensor is converted to: indices and quantised weights stay."""
    return dtype if DTYPES.get(tensor.dtype) in FLOATING else None


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


def _metadata(base: Checkpoint) -> dict[str, str]:
    return next(iter(base.metadata.values())) or {"format": "pt"}


def _index(base: Checkpoint, shards: Mapping[str, Mapping[str, Description]]) -> str:
    described = {key: one for tensors in shards.values() for key, one in tensors.items()}
    metadata = dict((base.index or {}).get("metadata") or {})
    metadata["total_size"] = sum(nbytes for *_, nbytes in described.values())
    if "total_parameters" in metadata:
        metadata["total_parameters"] = sum(math.prod(shape) for _, shape, _ in described.values())
    weight_map = {key: name for name, tensors in shards.items() for key in tensors}
    return json.dumps({"metadata": metadata, "weight_map": dict(sorted(weight_map.items()))}, indent=2) + "\n"


def _check_apart(out: Path, sources: Sequence[Path]) -> None:
    for source in sources:
        if out.resolve() == source.resolve() or out.resolve() in source.resolve().parents:
            raise ValueError(f"merge: out is {out}, which holds {source}, that is read; choose another directory")


def _check_space(out: Path, needed: int) -> None:
    parent = next(path for path in (out, *out.parents) if path.exists())
    free = shutil.disk_usage(parent).free
    if needed > free:
        raise OSError(f"merge: {out} takes {needed / 1e9:.2f} GB more, but its disk has {free / 1e9:.2f} GB free")
