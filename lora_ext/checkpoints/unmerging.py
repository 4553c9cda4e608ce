"""``lora-ext unmerge``: the base of a merged checkpoint, from the record of the merge, or less an adapter's update."""

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

__all__ = ["UnmergeReport", "unmerge"]


@dataclasses.dataclass(frozen=True)
class UnmergeReport:
    """What an unmerge did.

    Attributes:
        exact: every tensor of the base was restored to the bit, as its digest has shown, and every file next to them.
        because: why it is not exact; empty if it is.
        tensors: that were restored; the others are as they were.
        files: written checkpoint files; ``kept`` of them by an earlier run that did not end.
        nbytes: of all tensors.
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
    """Writes the checkpoint that ``merged`` was made of to the new directory ``out``.

    With the record that ``merge(record=True)`` left in it, every tensor is restored to the bit, or nothing is written.
    Other files are copied; where they are not those of the base any more, the report says so. Without a record, the
    updates of ``adapters`` are subtracted: that is rounded, and differs from the base by what the merge and this lost.

    Args:
        merged: a merged checkpoint.
        adapters: what was merged into it, where it has no record.
        fan_in_fan_out, verify, overwrite, allow_pickle: as :func:`~lora_ext.checkpoints.merge`.

    Raises:
        FileNotFoundError: something is missing.
        FileExistsError: ``out`` exists.
        ValueError: there is neither record nor adapter, or both; a tensor or the record was changed since the merge, or
            the record is that of another merge; an adapter does not fit, or had replaced tensors, whose old values are
            not in it.
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
    """How the files next to the weights differ from those of the base; both are digests by path."""
    problems = [f"{name} is not of the base" for name in copied if name not in expected]
    changed = [name for name in copied if name in expected and copied[name] != expected[name]]
    problems += [f"{name} was changed since the merge" for name in changed]
    return problems + [f"{name} is missing" for name in expected if name not in copied]
