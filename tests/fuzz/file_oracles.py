"""Compares the results of our readers with those of independent readers."""

from __future__ import annotations

import json
import tempfile
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file

from lora_ext.files.reading import read_json, read_tensor, tensor_table

from .calls import CannotTell
from .compare import WrongResult, same_bits


def _by_library(path: Path) -> dict[str, torch.Tensor]:
    """Reads tensors with the safetensors library. WrongResult: it refuses a file that we accepted."""
    try:
        return load_file(path)
    except (SafetensorError, OSError, ValueError) as error:
        raise WrongResult(f"accepted, but the safetensors library refuses {path.name}: {error}") from None


def check_adapter(files: Path, result: Any, space: dict[str, Any]) -> None:
    """Checks that an adapter, loaded and saved again, has the tensors that the library reads from the file."""
    from lora_ext import save_adapter

    theirs = _by_library(files / "adapter" / "adapter_model.safetensors")
    name = next(iter(space["model_adapters"](space["model"])))
    with tempfile.TemporaryDirectory() as directory:
        save_adapter(space["model"], Path(directory) / "again", name)
        ours = load_file(Path(directory) / "again" / "adapter_model.safetensors")
    for key in ours.keys() & theirs.keys():
        if not torch.equal(ours[key].nan_to_num(), theirs[key].to(ours[key].dtype).nan_to_num()):
            raise WrongResult(f"{key} differs from the file")
    if missing := [key for key in theirs if key not in ours and "lora_" in key]:
        raise WrongResult(f"{missing[0]} of the file was left out")


def _shards(directory: Path) -> dict[str, torch.Tensor]:
    tensors: dict[str, torch.Tensor] = {}
    for path in sorted(directory.glob("*.safetensors")):
        tensors |= _by_library(path)
    return tensors


def read_all(directory: Path) -> dict[str, torch.Tensor]:
    """Reads every tensor of the safetensors files with our reader."""
    tensors: dict[str, torch.Tensor] = {}
    for path in sorted(directory.glob("*.safetensors")):
        tensors |= {key: read_tensor(path, info) for key, info in tensor_table(path).items()}
    return tensors


def check_tensors(files: Path, result: dict[str, torch.Tensor], space: dict[str, Any]) -> None:
    theirs = _shards(files / "base")
    if theirs.keys() != result.keys():
        raise WrongResult(f"{sorted(theirs.keys() ^ result.keys())} differ")
    for key, tensor in theirs.items():
        ours = result[key]
        if ours.dtype != tensor.dtype or ours.shape != tensor.shape or not same_bits(ours, tensor):
            raise WrongResult(f"{key} differs from what the library reads")


def read_objects(directory: Path) -> list[dict[str, Any]]:
    """Reads every JSON file with our reader."""
    return [read_json(path) for path in sorted(directory.glob("*.json"))]


def check_objects(files: Path, result: list[dict[str, Any]], space: dict[str, Any]) -> None:
    for path, ours in zip(sorted((files / "base").glob("*.json")), result, strict=True):
        if repr(json.loads(path.read_bytes())) != repr(ours):
            raise WrongResult(f"{path.name} differs from what Python reads")


def check_merged(files: Path, report: Any, space: dict[str, Any]) -> None:
    """Checks that every tensor is the base's plus the adapter's update, multiplied out here."""
    from lora_ext import LoraConfig

    base, factors, out = (_shards(files / name) for name in ("base", "adapter", "out"))
    config = LoraConfig.from_dict(json.loads((files / "adapter" / "adapter_config.json").read_text()))
    for key, tensor in out.items():
        path = key.removesuffix(".weight")
        A, B = (factors.get(f"base_model.model.{path}.lora_{which}.weight") for which in "AB")
        if key not in base:
            raise WrongResult(f"{key} is in the output but not in the base")
        if A is None or B is None:
            same = tensor.shape == base[key].shape and torch.equal(
                tensor.nan_to_num(), base[key].to(tensor.dtype).nan_to_num()
            )
            if not same and not any(path.rpartition(".")[0] in name for name in factors):
                raise WrongResult(f"{key} is not the base's")
            continue
        if config.fan_in_fan_out or not tensor.is_floating_point() or A.dim() != 2 or B.dim() != 2:
            raise CannotTell
        if (B.shape[0], A.shape[1]) != tuple(base[key].shape):
            continue  # an embedding's factors, a parameter's
        expected = base[key].double() + config.scaling_for(path) * (B.double() @ A.double())
        if not torch.allclose(tensor.double(), expected, rtol=1e-2, atol=1e-3, equal_nan=True):
            raise WrongResult(f"{key} is not the base's plus the update")
