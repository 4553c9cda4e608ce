"""The files of ``merge_record/``, from which every bit of a merged checkpoint's base is restored.

For each file of the checkpoint there is a safetensors file of the same name. Its header has the dtype, shape and digest
of each tensor of the base, and the names of tensors that the merge added. So a restored tensor can be checked although
the base is gone. ``manifest.json`` has the digest of each file's header.

The tensors of these files depend on what the merge did to a tensor ``key``:

- Updates were merged into it: the parts of its :class:`~lora_ext.merging.weights.MergeRecord`, which are
  ``key:lora_A.<i>`` and ``key:lora_B.<i>`` (for each matrix of a stack), ``key:words`` and ``key:corrections``.
- Rows were replaced: the base's ``key:rows``, and ``key:indices``.
- The tensor was replaced: the base's whole tensor, ``key:base``.
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

MANIFEST_FILE = "manifest.json"
_VERSION = 2
_METADATA_KEY = "lora_ext_merge_record"
_LARGEST_MANIFEST = 100_000_000  # bytes


@dataclasses.dataclass(frozen=True)
class BaseTensor:
    """Description of a tensor of the base. ``dtype`` is the name in the file format."""

    dtype: str
    shape: tuple[int, ...]
    digest: str


@dataclasses.dataclass(frozen=True)
class FileRecord:
    """The header of a record's file, which describes a file of the checkpoint.

    Attributes:
        tensors: key -> description, of all tensors of the base in the file.
        added: keys in the file that the base lacks.
    """

    tensors: dict[str, BaseTensor]
    added: list[str]

    def to_metadata(self) -> dict[str, str]:
        """The metadata for the record's file."""
        tensors = {key: dataclasses.astuple(tensor) for key, tensor in self.tensors.items()}
        return {"format": "pt", _METADATA_KEY: json.dumps({"tensors": tensors, "added": self.added})}

    @classmethod
    def from_metadata(cls, path: Path, metadata: Mapping[str, str]) -> FileRecord:
        """Parses what :meth:`to_metadata` returned. Raises ValueError for anything else."""
        content = parse_json_object(metadata.get(_METADATA_KEY, "{}"), f"{path}: its metadata")
        tensors, added = content.get("tensors"), content.get("added")
        if not isinstance(tensors, dict) or not _is_list_of(added, str):
            raise ValueError(f"{path} is not a record of a merge")
        for key, values in tensors.items():
            if not isinstance(values, list) or [type(value) for value in values] != [str, list, str]:
                raise ValueError(f"{path} is not a record of a merge: it does not say what {key} was")
            if not _is_list_of(values[1], int):
                raise ValueError(f"{path} is not a record of a merge: it does not say the shape of {key}")
        return cls({key: BaseTensor(values[0], tuple(values[1]), values[2]) for key, values in tensors.items()}, added)


@dataclasses.dataclass(frozen=True)
class Manifest:
    """The content of ``manifest.json``.

    Attributes:
        files: file of the checkpoint -> digest of the header of its record.
        metadata: file of the checkpoint -> metadata of the base's file.
        index_metadata: metadata of the base's index; empty without an index.
        other_files: copied file -> digest.
    """

    files: dict[str, str]
    metadata: dict[str, dict[str, str]]
    index_metadata: dict[str, Any]
    other_files: dict[str, str]

    def write(self, path: Path) -> None:
        """Writes the content and its digest."""
        content = dataclasses.asdict(self) | {"version": _VERSION}
        text = json.dumps({"content": content, "digest": _digest(content)}, indent=1)
        path.write_text(text + "\n", encoding="utf-8")

    @classmethod
    def read(cls, path: Path, caller: str) -> Manifest:
        """Reads the file. Raises ValueError if :meth:`write` did not write it, or if it has changed since."""
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
            raise ValueError(f"{caller}: {path} is not a manifest of a record: it has {shown(list(content))}")
        for texts in (content["files"], content["other_files"], *content["metadata"].values()):
            if not isinstance(texts, dict) or not _is_list_of([*texts.values()], str):
                raise ValueError(f"{caller}: {path} is not a manifest of a record: want text for {shown(texts)}")
        return cls(**content)


def _digest(content: Mapping[str, Any]) -> str:
    return TextDigest(json.dumps(content, sort_keys=True, separators=(",", ":")).encode()).hexdigest()


def _is_list_of(values: Any, kind: type) -> bool:
    return isinstance(values, list) and all(type(value) is kind for value in values)
