"""``lora-ext inspect``: describes an adapter or a checkpoint."""

from __future__ import annotations

import math
import os
from collections import Counter
from pathlib import Path
from typing import Any

import torch

from lora_ext.checkpoints.checkpoint import Checkpoint
from lora_ext.checkpoints.contents import AdapterContents, LowRankUpdate, open_adapter
from lora_ext.files.adapter_file import AdapterFile, holds_adapter
from lora_ext.files.reading import DTYPE_NAMES


def inspect(path: str | os.PathLike[str]) -> dict[str, Any]:
    """Describes an adapter's directory, a checkpoint's directory or a safetensors file, as values that JSON can hold.

    Returns:
        ``kind`` (``adapter`` or ``checkpoint``), ``parameters``, ``bytes``, ``dtypes`` (dtype -> number of elements).
        For an adapter also ``layers``, each with the Frobenius ``norm`` of its scaled update, ``saved`` (name -> shape
        of each tensor that is saved in full), ``config``; for a checkpoint ``files`` (name -> bytes), ``tensors``.

    Raises:
        FileNotFoundError, ValueError: ``path`` is neither, or is corrupted, or its adaptation method is not supported.
    """
    path = Path(path)
    if holds_adapter(path):
        return _adapter(open_adapter(path, caller="inspect"))
    return _checkpoint(Checkpoint.open(path))


def _adapter(contents: AdapterContents) -> dict[str, Any]:
    file, tensors = contents.file, contents.file.tensors
    dtypes: Counter[str] = Counter()
    for tensor in tensors.values():
        dtypes[_name(tensor.dtype)] += tensor.numel()
    layers = [
        {
            "path": update.path,
            "kind": update.kind,
            "r": update.r,
            "scaling": update.scaling,
            "dtype": _name(tensors[update.lora_A].dtype),
            "parameters": sum(tensors[key].numel() for key in (update.lora_A, update.lora_B, *update.others.values())),
            "norm": _norm(file, update),
        }
        for update in contents.updates
    ]
    saved = contents.replaced | {f"{rows.path}.weight[{len(rows.indices)} rows]": rows.key for rows in contents.tokens}
    return {
        "kind": "adapter",
        "parameters": sum(dtypes.values()),
        "bytes": sum(tensor.nbytes for tensor in tensors.values()),
        "dtypes": dict(dtypes),
        "layers": layers,
        "saved": {name: list(tensors[key].shape) for name, key in saved.items()},
        "config": file.config,
    }


def _checkpoint(checkpoint: Checkpoint) -> dict[str, Any]:
    infos = {key: checkpoint.info(key) for key in checkpoint}
    dtypes: Counter[str] = Counter()
    for info in infos.values():
        dtypes[DTYPE_NAMES[info.dtype]] += math.prod(info.shape)
    return {
        "kind": "checkpoint",
        "parameters": sum(dtypes.values()),
        "bytes": checkpoint.nbytes,
        "dtypes": dict(dtypes),
        "files": {name: (checkpoint.directory / name).stat().st_size for name in checkpoint.shards},
        "tensors": {
            key: {"dtype": DTYPE_NAMES[info.dtype], "shape": list(info.shape), "bytes": info.nbytes}
            for key, info in infos.items()
        },
    }


def _norm(file: AdapterFile, update: LowRankUpdate) -> float:
    """``||scaling * lora_B @ lora_A||`` (Frobenius norm), from the factors' QR decompositions, without the product."""
    square = 0.0
    for A, B in update.split(file.tensors[update.lora_A].double(), file.tensors[update.lora_B].double()):
        if not (A.isfinite().all() and B.isfinite().all()):
            return math.nan
        left, right = torch.linalg.qr(B, mode="r").R, torch.linalg.qr(A.T, mode="r").R
        square += torch.linalg.matrix_norm(left @ right.T).item() ** 2
    return abs(update.scaling) * math.sqrt(square)


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
