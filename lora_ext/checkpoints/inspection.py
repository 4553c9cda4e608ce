"""``lora-ext inspect``: describes an adapter or a checkpoint."""

from __future__ import annotations

import math
import os
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from lora_ext.checkpoints.checkpoint_files import Checkpoint
from lora_ext.checkpoints.contents import AdapterContents, LowRankUpdate, open_adapter
from lora_ext.checkpoints.layouts import num_matrices
from lora_ext.checkpoints.merged_mark import read_mark
from lora_ext.checkpoints.merged_rows import split_stack
from lora_ext.files.adapter_file import AdapterFile, holds_adapter


def inspect(path: str | os.PathLike[str], *, allow_pickle: bool = False) -> dict[str, Any]:
    """Describes an adapter's directory, a checkpoint's directory or a safetensors file, as values that JSON can hold.

    Returns:
        A dict with ``kind`` (``adapter`` or ``checkpoint``), ``parameters``, ``bytes`` and ``dtypes`` (dtype -> number
        of elements).

        For an adapter also ``layers``, each with ``path``, ``kind``, ``r``, ``scaling``, ``dtype``, ``parameters`` and
        ``norm`` (the Frobenius norm of the scaled update); ``saved`` (name -> shape of each tensor that is saved in
        full); and ``config``.

        For a checkpoint also ``files`` (name -> bytes), ``merged`` (names of the adapters that ``lora-ext merge`` put
        into it) and ``tensors`` (name -> ``dtype``, ``shape``, ``bytes``).

    Raises:
        FileNotFoundError, ValueError: ``path`` is neither, or is corrupted, or its adaptation method is not supported.
    """
    path = Path(path)
    if holds_adapter(path):
        return _adapter(open_adapter(path, allow_pickle=allow_pickle, with_dora=True, caller="inspect"))
    return _checkpoint(Checkpoint.open(path))


def _adapter(contents: AdapterContents) -> dict[str, Any]:
    file, layers = contents.file, []
    for update in contents.updates:
        keys = update.lora_A, update.lora_B, update.lora_bias, update.magnitude
        keys = [key for key in keys if key is not None]
        layers.append(
            {
                "path": update.path,
                "kind": update.kind,
                "r": update.r,
                "scaling": update.scaling,
                "dtype": _name(file.dtype(update.lora_A)),
                "parameters": sum(math.prod(file.shape(key)) for key in keys),
                "norm": update_norm(file, update),
            }
        )
    tensors = {key: (_name(file.dtype(key)), math.prod(file.shape(key))) for key in file.keys()}  # noqa: SIM118
    saved = contents.replaced | {f"{rows.path}.weight[{len(rows.indices)} rows]": rows.key for rows in contents.tokens}
    return {
        "kind": "adapter",
        "parameters": sum(count for _, count in tensors.values()),
        "bytes": sum(count * file.dtype(key).itemsize for key, (_, count) in tensors.items()),
        "dtypes": _by_dtype(tensors.values()),
        "layers": layers,
        "saved": {name: list(file.shape(key)) for name, key in saved.items()},
        "config": file.config,
    }


def _checkpoint(checkpoint: Checkpoint) -> dict[str, Any]:
    infos = {key: checkpoint.info(key) for key in checkpoint}
    return {
        "kind": "checkpoint",
        "parameters": sum(info.numel for info in infos.values()),
        "bytes": checkpoint.nbytes,
        "dtypes": _by_dtype((info.dtype, info.numel) for info in infos.values()),
        "files": {name: (checkpoint.directory / name).stat().st_size for name in checkpoint.shards},
        "merged": list(read_mark(checkpoint).values()),
        "tensors": {
            key: {"dtype": info.dtype, "shape": list(info.shape), "bytes": info.nbytes} for key, info in infos.items()
        },
    }


def update_norm(file: AdapterFile, update: LowRankUpdate) -> float:
    """``||scaling * lora_B @ lora_A||`` (Frobenius norm), from the factors' QR decompositions, without the product."""
    A, B = file.tensor(update.lora_A), file.tensor(update.lora_B)
    pairs = split_stack(A, B, num_matrices(file, update), update.kind == "parameter")
    square = sum(_product_norm(B.double(), A.double()) ** 2 for A, B in pairs)
    return abs(update.scaling) * math.sqrt(square)


def _product_norm(B: Tensor, A: Tensor) -> float:
    if not (A.isfinite().all() and B.isfinite().all()):
        return math.nan
    left, right = torch.linalg.qr(B, mode="r").R, torch.linalg.qr(A.T, mode="r").R
    return torch.linalg.matrix_norm(left @ right.T).item()


def _by_dtype(tensors) -> dict[str, int]:
    counts: dict[str, int] = {}
    for dtype, count in tensors:
        counts[dtype] = counts.get(dtype, 0) + count
    return counts


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
