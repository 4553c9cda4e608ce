"""The files of ``merge_record/``, from which every bit of a merged checkpoint's base is restored.

``manifest.json`` has the digest of the header of each other file. These are safetensors files, ``<file>`` for each file
of the checkpoint; their headers have the dtype, shape and digest of each tensor of the base, and the names of those
that the merge added. So whatever is restored can be compared with the base, though the base is gone.

Their tensors are, for a tensor ``key`` that updates were merged into, the parts of its
:class:`~lora_ext.merging.weights.MergeRecord`: ``key:lora_A.<i>``, ``key:lora_B.<i>`` (of each matrix of a stack),
``key:words`` and ``key:corrections``. For replaced rows, the base's: ``key:rows`` and ``key:indices``. For a replaced
tensor, the base's whole: ``key:base``.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from lora_ext._common.printable import shown
from lora_ext.checkpoints.digests import TextDigest
from lora_ext.files.untrusted_json import parse_json_object, read_json_object

__all__ = ["MANIFEST_FILE", "BaseTensor", "FileRecord", "Manifest"]

MANIFEST_FILE = "manifest.json"
_VERSION = 2
_METADATA_KEY = "lora_ext_merge_record"
_LARGEST_MANIFEST = 100_000_000  # bytes


@dataclasses.dataclass(frozen=True)
class BaseTensor:
    """A tensor of the base: ``dtype`` by its name in the file format."""

    dtype: str
    shape: tuple[int, ...]
    digest: str


@dataclasses.dataclass(frozen=True)
class FileRecord:
    """What the header of a record's file says about a file of the checkpoint.

    Attributes:
        tensors: of the base, by key; all that are in the file.
        added: keys in the file that the base lacks.
    """

    tensors: dict[str, BaseTensor]
    added: list[str]

    def to_metadata(self) -> dict[str, str]:
        """The metadata of the record's file."""
        tensors = {key: dataclasses.astuple(tensor) for key, tensor in self.tensors.items()}
        return {"format": "pt", _METADATA_KEY: json.dumps({"tensors": tensors, "added": self.added})}

    @classmethod
    def from_metadata(cls, path: Path, metadata: Mapping[str, str]) -> FileRecord:
        """Raises ValueError where :meth:`to_metadata` did not make it."""
        content = parse_json_object(metadata.get(_METADATA_KEY, "{}"), f"{path}: its metadata")
        tensors, added = content.get("tensors"), content.get("added")
        if not isinstance(tensors, dict) or not _is_list_of(added, str):
            raise ValueError(f"{path} is no record of a merge")
        for key, values in tensors.items():
            if not isinstance(values, list) or [type(value) for value in values] != [str, list, str]:
                raise ValueError(f"{path} is no record of a merge: it does not say what {key} was")
            if not _is_list_of(values[1], int):
                raise ValueError(f"{path} is no record of a merge: it does not say the shape of {key}")
        return cls({key: BaseTensor(values[0], tuple(values[1]), values[2]) for key, values in tensors.items()}, added)


@dataclasses.dataclass(frozen=True)
class Manifest:
    """The content of ``manifest.json``.

    Attributes:
        files: file of the checkpoint -> digest of the header of its record.
        metadata: file of the checkpoint -> metadata of the base's.
        index_metadata: of the base's index; empty without one.
        other_files: copied files -> their digests.
    """

    files: dict[str, str]
    metadata: dict[str, dict[str, str]]
    index_metadata: dict[str, Any]
    other_files: dict[str, str]

    def write(self, path: Path) -> None:
        """Writes it, with a digest of its own."""
        content = dataclasses.asdict(self) | {"version": _VERSION}
        text = json.dumps({"content": content, "digest": _digest(content)}, indent=1)
        path.write_text(text + "\n", encoding="utf-8")

    @classmethod
    def read(cls, path: Path, caller: str) -> Manifest:
        """Raises ValueError where :meth:`write` did not make it, or it was changed since."""
        try:
            values = read_json_object(path, caller, _LARGEST_MANIFEST)
        except FileNotFoundError as error:
            raise ValueError(
                f"{caller}: {path} is missing: the record is not whole, or was written before lora_ext had digests of "
                "all that it restores; unmerge with the version that merged, or merge the base again"
            ) from error
        content = values.get("content")
        if not isinstance(content, dict) or values.get("digest") != _digest(content):
            raise ValueError(f"{caller}: {path} was changed since the merge wrote it")
        if (version := content.pop("version", None)) != _VERSION:
            raise ValueError(
                f"{caller}: {path} is of version {shown(version)}, want {_VERSION}; unmerge with the version of "
                "lora_ext that merged"
            )
        names = {field.name for field in dataclasses.fields(cls)}
        if content.keys() != names or not all(isinstance(one, dict) for one in content.values()):
            raise ValueError(f"{caller}: {path} is no manifest of a record: it has {shown(list(content))}")
        for texts in (content["files"], content["other_files"], *content["metadata"].values()):
            if not isinstance(texts, dict) or not _is_list_of([*texts.values()], str):
                raise ValueError(f"{caller}: {path} is no manifest of a record: want text in place of {shown(texts)}")
        return cls(**content)


def _digest(content: Mapping[str, Any]) -> str:
    return TextDigest(json.dumps(content, sort_keys=True, separators=(",", ":")).encode()).hexdigest()


def _is_list_of(values: Any, kind: type) -> bool:
    return isinstance(values, list) and all(type(value) is kind for value in values)
