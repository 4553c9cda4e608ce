"""Records in a merged checkpoint's files which adapters they contain, so that none is merged into it twice."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lora_ext._common.printable import shown
from lora_ext.files.untrusted_json import parse_json_object

if TYPE_CHECKING:
    from lora_ext.checkpoints.checkpoint_files import Checkpoint

KEY = "lora_ext_merged"  # in a file's metadata: a JSON object, digest of an adapter -> name of its directory


def read_mark(checkpoint: Checkpoint) -> dict[str, str]:
    """Returns digest -> name of the adapters that were merged into ``checkpoint`` by ``lora-ext merge``.

    Other programs drop the note when they write the weights again.

    Raises:
        ValueError: the note is damaged.
    """
    found: dict[str, str] = {}
    for name, metadata in checkpoint.metadata.items():
        if metadata and KEY in metadata:
            source = f"{checkpoint.directory / name}: its metadata {KEY!r}"
            values = parse_json_object(metadata[KEY], source)
            if not all(isinstance(value, str) for value in values.values()):
                raise ValueError(f"{source} is {shown(values)}, want digests and names of adapters")
            found |= values
    return found


def changed_mark(
    checkpoint: Checkpoint, adapters: Mapping[Path, list[list[Any]]], *, subtract: bool, caller: str
) -> dict[str, str]:
    """Returns the note of ``checkpoint`` after ``adapters`` have been added to it, or subtracted.

    Args:
        adapters: directory -> fingerprint of its files.

    Raises:
        ValueError: the note is damaged; an adapter is to be added that is in it already.
    """
    mark = read_mark(checkpoint)
    for directory, fingerprint in adapters.items():
        digest = _digest(fingerprint)
        if subtract:
            mark.pop(digest, None)
        elif digest in mark:
            raise ValueError(
                f"{caller}: {directory} is merged into {checkpoint.directory} already, as "
                f"{shown(mark[digest])}, and its update would count twice; merge it into the original base, or unmerge "
                "this one first (lora-ext unmerge)"
            )
        else:
            mark[digest] = directory.name
    return mark


def with_mark(metadata: Mapping[str, str], mark: Mapping[str, str]) -> dict[str, str]:
    """Returns the metadata of a file with the note ``mark``, without one if ``mark`` is empty."""
    rest = {key: value for key, value in metadata.items() if key != KEY}
    return rest | ({KEY: json.dumps(mark)} if mark else {})


def _digest(fingerprint: list[list[Any]]) -> str:
    """The SHA-256 of both files of an adapter: the same factors with another scaling are another adapter."""
    return hashlib.sha256(json.dumps([sha256 for _, sha256 in fingerprint]).encode()).hexdigest()
