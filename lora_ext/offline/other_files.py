"""What a checkpoint's directory holds beside its weights: configs, tokenizer, code, cards."""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from .checkpoint_files import Checkpoint

__all__ = ["RECORD_DIRECTORY", "copy_other_files"]

RECORD_DIRECTORY = "merge_record"
"""Where a merge keeps what it lost: of no use beside any other weights."""

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


def copy_other_files(base: Checkpoint, out: Path, changes: Mapping[str, Any]) -> list[str]:
    """Copies all files but weights and hidden ones into ``out``; returns what else was left out.

    Args:
        changes: of ``config.json``: ``dtype`` wherever it or ``torch_dtype`` is given, other keys at the top.
    """
    skipped: list[str] = []
    if not base.is_directory:
        return skipped
    for file in sorted(base.directory.rglob("*")):
        name = file.relative_to(base.directory)
        if not file.is_file() or any(part.startswith(".") for part in name.parts):
            continue
        if any(name.match(pattern) for pattern in _OTHER_WEIGHTS):
            ours = str(name) in base.shards or name.parts[0] == RECORD_DIRECTORY
            if not ours and not name.match("*.safetensors.index.json"):
                skipped.append(str(name))
            continue
        (out / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(file, out / name)
    config = out / "config.json"
    if changes and config.is_file():
        values = json.loads(config.read_text(encoding="utf-8"))
        if "dtype" in changes:
            _set_dtype(values, changes["dtype"])
        values |= {key: value for key, value in changes.items() if key != "dtype"}
        config.write_text(json.dumps(values, indent=2) + "\n", encoding="utf-8")
    return skipped


def _set_dtype(values: dict[str, Any], dtype: str) -> None:
    for key, value in values.items():
        if key in ("dtype", "torch_dtype") and isinstance(value, str):
            values[key] = dtype
        elif isinstance(value, dict) and key != "quantization_config":
            _set_dtype(value, dtype)
