"""What a checkpoint's directory holds next to its weights: configs, tokenizer, code, cards."""

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

__all__ = [
    "CONFIG_FILE",
    "RECORD_DIRECTORY",
    "copy_file",
    "list_other_files",
    "read_model_config",
    "write_model_config",
]

RECORD_DIRECTORY = "merge_record"
"""Where a merge keeps what it lost: of no use next to any other weights."""

CONFIG_FILE = "config.json"
"""The model's."""

_LARGEST_CONFIG = 10_000_000  # bytes; those of real models have some thousand
_CHUNK_BYTES = 1 << 20

# Weights in other formats: copied, they would be those from before the merge.
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
    """The files below a checkpoint's directory that go with it, except its weights and hidden ones.

    Returns:
        The paths of what is copied with the checkpoint, and of what is left out as it holds the weights once more.
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
    """Copies a regular file's content, and returns its digest. Makes the target's directory if need be."""
    target.parent.mkdir(parents=True, exist_ok=True)
    digest, offset = TextDigest(), 0
    with open_regular(source) as reading, open(target, "wb", buffering=0) as writing:
        while chunk := reading.read(_CHUNK_BYTES):
            digest.update(chunk)
            write_bytes(writing, offset, memoryview(chunk))
            offset += len(chunk)
    return digest.hexdigest()


def read_model_config(base: Checkpoint) -> dict[str, Any] | None:
    """The content of ``config.json``, or None where there is none. ValueError: it is no JSON object."""
    try:
        return read_json_object(base.directory / CONFIG_FILE, "", _LARGEST_CONFIG)
    except FileNotFoundError:
        return None


def write_model_config(base: Checkpoint, out: Path, changes: Mapping[str, Any]) -> None:
    """Writes the ``config.json`` of ``base`` into the directory ``out``, with changes; nothing if it has none.

    Args:
        changes: ``dtype`` wherever it or ``torch_dtype`` is given, other keys at the top.
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
