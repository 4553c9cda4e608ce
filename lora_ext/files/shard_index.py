"""The index of tensors that are spread over several safetensors files in one directory."""

from __future__ import annotations

import os
import re
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

from lora_ext._common.printable import check_name, listed, shown
from lora_ext.files.untrusted_json import read_json_object

_NUMBERED = re.compile(r"(.+)-[0-9]+-of-([0-9]+)\.safetensors")
_LARGEST = 100_000_000  # bytes, as for a safetensors header; the largest index of a real model has 20 million


def read_index(path: Path) -> tuple[dict[str, Any], list[str]]:
    """Reads the index file ``path``. Returns its content, with a good ``weight_map``, and the names of the files.

    Raises:
        FileNotFoundError: a file that it names is missing.
        OSError: as ``open``.
        ValueError: it is no index, a name in it leads out of the directory, or it leaves out a file of its checkpoint.
    """
    index = read_json_object(path, "", _LARGEST)
    weight_map, metadata = index.get("weight_map"), index.get("metadata")
    for part, values, wanted in (("weight_map", weight_map, dict), ("metadata", metadata, dict | None)):
        if not isinstance(values, wanted):
            raise ValueError(f"{path} is not an index of a checkpoint: {part} is {shown(values)}, want an object")
    for name in weight_map.values():
        _check_file_name(path, name)
    names = list(dict.fromkeys(weight_map.values()))
    if not names:
        raise ValueError(f"{path} is not an index of a checkpoint: it names no file")
    if missing := [name for name in names if not (path.parent / name).exists()]:
        raise FileNotFoundError(f"{path} names files that are missing:{listed(missing)}")
    families = {match.group(1, 2) for name in names if (match := _NUMBERED.fullmatch(name))}
    others = [name for name in sorted(os.listdir(path.parent)) if name not in names]
    if unnamed := [name for name in others if (m := _NUMBERED.fullmatch(name)) and m.group(1, 2) in families]:
        raise ValueError(f"{path} does not name all files of its checkpoint:{listed(unnamed)}")
    return index, names


def check_shards(path: Path, weight_map: Mapping[str, str], shards: Mapping[str, Collection[str]]) -> None:
    """Checks that the files hold the tensors of the index ``path``. ``shards`` maps file names to keys.

    Raises:
        ValueError: they disagree; the message lists every such key.
    """
    counts: dict[str, int] = {}
    for keys in shards.values():
        for key in keys:
            counts[key] = counts.get(key, 0) + 1
    problems = [f"twice: {key}" for key, count in counts.items() if count > 1]
    problems += [f"not in {name}: {key}" for key, name in weight_map.items() if key not in shards[name]]
    problems += [f"not in the index: {key}" for key in counts if key not in weight_map]
    if problems:
        raise ValueError(f"{path} and its files disagree:{listed(problems)}")


def _check_file_name(index: Path, name: object) -> None:
    """Raises ValueError for an entry of an index that is not the name of a file in the same directory."""
    if not isinstance(name, str) or os.path.basename(name) != name or "\\" in name or ":" in name:
        raise ValueError(f"{index} names the file {shown(name)}, want a name without a path; nothing was read from it")
    if not name.endswith(".safetensors") or name.startswith("."):
        raise ValueError(f"{index} names the file {shown(name)}, want a name that ends with .safetensors")
    check_name(name, str(index), 255)
