"""``lora-ext unmerge``: restores the base of a merged checkpoint from its record, or subtracts an adapter's update."""

from __future__ import annotations

import dataclasses
import os
import time
from collections.abc import Mapping, Sequence
from pathlib import Path

from lora_ext import _load
from lora_ext.checkpoints.checkpoint_files import Checkpoint
from lora_ext.checkpoints.merging import merge
from lora_ext.checkpoints.other_files import RECORD_DIRECTORY
from lora_ext.checkpoints.output import Output, check_apart
from lora_ext.checkpoints.record import Record
from lora_ext.files.file_bytes import fingerprint


@dataclasses.dataclass(frozen=True)
class UnmergeReport:
    """The result of an unmerge.

    Attributes:
        exact: every bit of the base's tensors, by their digests, and of the files next to them is restored.
        because: reasons why the result is not exact; empty if it is.
        tensors: number of restored tensors; the merge had not changed the others.
        files: number of checkpoint files.
        kept: number of these files that an interrupted run had written.
        nbytes: bytes of all tensors.
    """

    exact: bool
    because: list[str]
    tensors: int
    files: int
    kept: int
    nbytes: int
    seconds: float


def unmerge(
    merged: str | os.PathLike[str],
    out: str | os.PathLike[str],
    *,
    adapters: Sequence[str | os.PathLike[str]] = (),
    fan_in_fan_out: bool | None = None,
    verify: bool = False,
    overwrite: bool = False,
    allow_pickle: bool = False,
    show_progress: bool = False,
) -> UnmergeReport:
    """Writes the base of the checkpoint ``merged`` to the new directory ``out``.

    With the record of ``merge(record=True)``, every bit of every tensor is restored, or nothing is written. Other files
    are copied; the report names those that are not the base's any more. Without a record, the updates of ``adapters``
    are subtracted. The result is rounded: it differs from the base by the rounding errors of the merge and of this.

    Args:
        merged: a merged checkpoint.
        adapters: the adapters that were merged into it, if it has no record.
        fan_in_fan_out, verify, overwrite, allow_pickle: see :func:`~lora_ext.checkpoints.merge`.

    Raises:
        FileNotFoundError: a file is missing.
        FileExistsError: ``out`` exists.
        ValueError: there is neither a record nor an adapter, or both; a tensor or the record was changed since the
            merge, or the record is of another merge; an adapter does not fit, or had replaced tensors, whose old values
            it does not hold.
        OSError: the disk is too small, or cannot be written.
    """
    begin = time.perf_counter()
    checkpoint = Checkpoint.open(merged)
    has_record = (checkpoint.directory / RECORD_DIRECTORY).is_dir()
    if adapters and has_record:
        raise ValueError(f"unmerge: {merged} has a record of its merge, which is exact; give no adapter, or remove it")
    if adapters:
        report = merge(
            merged,
            adapters,
            out,
            fan_in_fan_out=fan_in_fan_out,
            verify=verify,
            overwrite=overwrite,
            allow_pickle=allow_pickle,
            show_progress=show_progress,
            subtract=True,
        )
        return UnmergeReport(
            exact=False,
            because=["the updates were subtracted, which rounds"],
            tensors=report.merged,
            files=report.files,
            kept=report.kept,
            nbytes=report.nbytes,
            seconds=report.seconds,
        )
    if not has_record:
        raise ValueError(
            f"unmerge: {merged} has no {RECORD_DIRECTORY}, which merge --record writes; give the adapters that were "
            "merged, to subtract them (rounded)"
        )
    record = Record(checkpoint)
    out = Path(out).absolute()
    check_apart("unmerge", out, [checkpoint.directory])
    shards = {}
    for name, tensors in checkpoint.shards.items():
        infos = {key: record.info(key) for key in tensors if key not in record.added}
        if infos:
            shards[name] = {key: (info.dtype, info.shape, info.nbytes) for key, info in infos.items()}
    what = {
        "version": _load.build_info()["version"],
        "merged": checkpoint.fingerprint() + fingerprint(record.files, contents=False),
    }
    output = Output(
        checkpoint,
        shards,
        record.restored,
        metadata=record.manifest.metadata,
        index_metadata=record.manifest.index_metadata,
        what=what,
    )
    written = output.write(out, "unmerge", verify=verify, overwrite=overwrite, show_progress=show_progress)
    because = _differences(record.manifest.other_files, written.copied)
    return UnmergeReport(
        exact=not because,
        because=because,
        tensors=record.num_tensors,
        files=len(shards),
        kept=written.kept,
        nbytes=output.nbytes,
        seconds=time.perf_counter() - begin,
    )


def _differences(expected: Mapping[str, str], copied: Mapping[str, str]) -> list[str]:
    """The differences of the files next to the weights from the base's. Both arguments: path -> digest."""
    problems = [f"{name} is not of the base" for name in copied if name not in expected]
    changed = [name for name in copied if name in expected and copied[name] != expected[name]]
    problems += [f"{name} was changed since the merge" for name in changed]
    return problems + [f"{name} is missing" for name in expected if name not in copied]
