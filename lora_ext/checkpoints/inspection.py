"""``lora-ext inspect``: describes an adapter or a checkpoint."""

from __future__ import annotations

import math
import os
from collections import Counter
from pathlib import Path
from typing import Any

import torch

from lora_ext.checkpoints.checkpoint import Checkpoint
from lora_ext.files.adapter_file import holds_adapter
from lora_ext.files.contents import AdapterContents, LowRankUpdate, open_adapter
from lora_ext.files.normalising import misreadings
from lora_ext.files.reading import DTYPE_NAMES


def inspect(path: str | os.PathLike[str]) -> dict[str, Any]:
    """Describes an adapter's directory, a checkpoint's directory or a safetensors file, as values that JSON can hold.

    Returns:
        ``kind`` (``adapter`` or ``checkpoint``), ``parameters``, ``bytes``, ``dtypes`` (dtype -> number of elements).
        For an adapter also ``layers``, each with the Frobenius ``norm`` of its scaled update, ``saved`` (name -> shape
        of each tensor that is saved in full), ``config``, ``misreadings`` (what other programs are known to read in
        another way); for a checkpoint ``files`` (name -> bytes), ``tensors``.

    Raises:
        FileNotFoundError, ValueError: ``path`` is neither, or is corrupted, or its adaptation method is not supported.
    """
    path = Path(path)
    return _adapter(open_adapter(path, caller="inspect")) if holds_adapter(path) else _checkpoint(Checkpoint.open(path))


def _adapter(contents: AdapterContents) -> dict[str, Any]:
    tensors = contents.file.tensors.values()
    dtypes: Counter[str] = Counter()
    for tensor in tensors:
        dtypes[_name(tensor.dtype)] += tensor.numel()
    layers = [
        {
            "path": update.path,
            "kind": update.kind,
            "r": update.r,
            "scaling": update.scaling,
            "dtype": _name(update.lora_A.dtype),
            "parameters": update.lora_A.numel() + update.lora_B.numel(),
            "norm": _norm(update),
        }
        for update in contents.updates
    ]
    saved = contents.replaced | {f"{path}.weight[{len(rows)} rows]": rows for path, rows in contents.tokens.items()}
    return {
        "kind": "adapter",
        "parameters": sum(dtypes.values()),
        "bytes": sum(tensor.nbytes for tensor in tensors),
        "dtypes": dict(dtypes),
        "layers": layers,
        "saved": {name: list(tensor.shape) for name, tensor in saved.items()},
        "config": contents.file.config,
        "misreadings": misreadings(contents),
    }


def _checkpoint(checkpoint: Checkpoint) -> dict[str, Any]:
    dtypes: Counter[str] = Counter()
    for info in checkpoint.values():
        dtypes[DTYPE_NAMES[info.dtype]] += math.prod(info.shape)
    return {
        "kind": "checkpoint",
        "parameters": sum(dtypes.values()),
        "bytes": checkpoint.nbytes,
        "dtypes": dict(dtypes),
        "files": {name: (checkpoint.directory / name).stat().st_size for name in checkpoint.shards},
        "tensors": {
            key: {"dtype": DTYPE_NAMES[info.dtype], "shape": list(info.shape), "bytes": info.nbytes}
            for key, info in checkpoint.items()
        },
    }


def _norm(update: LowRankUpdate) -> float:
    """``||scaling * lora_B @ lora_A||`` (Frobenius norm), from the factors' QR decompositions, without the product."""
    square = 0.0
    for A, B in update.factors():
        if not (A.isfinite().all() and B.isfinite().all()):
            return math.nan
        left, right = (torch.linalg.qr(factor.double(), mode="r").R for factor in (B, A.T))
        square += torch.linalg.matrix_norm(left @ right.T).item() ** 2
    return abs(update.scaling) * math.sqrt(square)


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
