"""The files next to a checkpoint's weights: configs, tokenizer, code, cards."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from lora_ext.checkpoints.checkpoint_files import Checkpoint
from lora_ext.checkpoints.digests import TextDigest
from lora_ext.files.file_bytes import write_bytes
from lora_ext.files.regular_file import open_regular
from lora_ext.files.untrusted_json import read_json_object

RECORD_DIRECTORY = "merge_record"
"""The directory of a merge's record. It fits only the weights that it was written with."""

CONFIG_FILE = "config.json"
"""The model's config."""

_LARGEST_CONFIG = 10_000_000  # bytes; configs of real models have some thousand
_CHUNK_BYTES = 1 << 20

# Weights in other formats. A copy would hold the weights from before the merge.
_OTHER_WEIGHTS = (
    "*.safetensors",
    "*.safetensors.index.json",
    "pytorch_model*",
    "tf_model*",
    "flax_model*",
    "rust_model*",
    "consolidated*",
    "*.pt",
    "*.pth",
    "*.ckpt",
    "*.gguf",
    "*.onnx",
    "*.onnx_data",
    "*.msgpack",
    "*.h5",
    "*.mlmodel",
    "adapter_model*",
    "adapter_config.json",
)


def list_other_files(base: Checkpoint) -> tuple[list[str], list[str]]:
    """Lists the files below a checkpoint's directory, except its weights and hidden files.

    Returns:
        The paths of files to copy, and of files to leave out because they hold the weights again.
    """
    copied: list[str] = []
    skipped: list[str] = []
    for file in sorted(base.directory.rglob("*")) if base.is_directory else ():
        name = file.relative_to(base.directory)
        hidden = any(part.startswith(".") for part in name.parts) or name.parts[0] == RECORD_DIRECTORY
        if hidden or not file.is_file() or str(name) in base.shards or name.match("*.safetensors.index.json"):
            continue
        weights = any(name.match(pattern) for pattern in _OTHER_WEIGHTS)
        (skipped if weights else copied).append(str(name))
    return copied, skipped


def copy_file(source: Path, target: Path) -> str:
    """Copies the content of a regular file and returns its digest. Makes the target's directory if necessary."""
    target.parent.mkdir(parents=True, exist_ok=True)
    digest, offset = TextDigest(), 0
    with open_regular(source) as reading, open(target, "wb", buffering=0) as writing:
        while chunk := reading.read(_CHUNK_BYTES):
            digest.update(chunk)
            write_bytes(writing, offset, memoryview(chunk))
            offset += len(chunk)
    return digest.hexdigest()


def read_model_config(base: Checkpoint) -> dict[str, Any] | None:
    """Reads ``config.json``; returns None if there is none. Raises ValueError if it is not a JSON object."""
    try:
        return read_json_object(base.directory / CONFIG_FILE, "", _LARGEST_CONFIG)
    except FileNotFoundError:
        return None


def write_model_config(base: Checkpoint, out: Path, changes: Mapping[str, Any]) -> None:
    """Writes the ``config.json`` of ``base``, if it has one, into the directory ``out``, with changes.

    Args:
        changes: new values. ``dtype`` replaces every ``dtype`` and ``torch_dtype``; other keys are of the top level.
    """
    values = read_model_config(base)
    if values is None:
        return
    if "dtype" in changes:
        _set_dtype(values, changes["dtype"])
    values |= {key: value for key, value in changes.items() if key != "dtype"}
    (out / CONFIG_FILE).write_text(json.dumps(values, indent=2) + "\n", encoding="utf-8")


def _set_dtype(values: dict[str, Any], dtype: str) -> None:
    for key, value in values.items():
        if key in ("dtype", "torch_dtype") and isinstance(value, str):
            values[key] = dtype
        elif isinstance(value, dict) and key != "quantization_config":
            _set_dtype(value, dtype)
