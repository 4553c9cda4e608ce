"""Compares the results of our readers with those of independent readers."""

from __future__ import annotations

import json
import tempfile
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file

from . import file_bases
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


def check_inspected(files: Path, result: Any, space: dict[str, Any]) -> None:
    _shards(files / space["which"])


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


def check_unmerged(files: Path, report: Any, space: dict[str, Any]) -> None:
    """Checks that a result reported as exact has the bits of the base."""
    if not report.exact:
        return
    original, out = file_bases.original("record") / "base", files / "out"
    theirs, ours = _shards(original), _shards(out)
    if theirs.keys() != ours.keys():
        raise WrongResult(f"reported as exact, but {sorted(theirs.keys() ^ ours.keys())} differ")
    for key, tensor in theirs.items():
        if tensor.shape != ours[key].shape or not same_bits(tensor, ours[key]):
            raise WrongResult(f"reported as exact, but {key} does not have the bits of the base")


def check_rows(files: Path, found: Any, space: dict[str, Any]) -> None:
    """Checks that every row has a text and a label, and that a file without changes has its labels."""
    rows, name = found["train"], space["which"]
    texts, labels = rows["text"][:], rows["label"][:]
    if not texts or not all(map(str, [*texts, *labels])):
        raise WrongResult("a row has no text or no label")
    "".join(map(str, texts)).encode()  # a lone surrogate cannot be tokenised
    if (files / name).read_bytes() == (file_bases.original("data") / name).read_bytes() and labels != [*"10101"]:
        raise WrongResult(f"the labels are {labels}")
