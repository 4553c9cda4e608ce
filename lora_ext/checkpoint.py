"""Adapter files in PEFT's format: ``adapter_config.json`` and ``adapter_model.safetensors`` in a directory.

Keys are ``base_model.model.<path>.lora_A.weight`` and ``.lora_B.weight`` for the factors, and
``base_model.model.<path>.<name>`` for the parameters and buffers of a module trained in full.
"""

from __future__ import annotations

import dataclasses
import json
import os
import shutil
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import TypeVar

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from .config import LoraConfig
from .inject import (
    Injection,
    apply_injection,
    find_injection,
    is_injected,
    lora_modules,
    plan_injection,
    root_module,
)

ModelT = TypeVar("ModelT", bound=nn.Module)

CONFIG_FILE = "adapter_config.json"
WEIGHTS_FILE = "adapter_model.safetensors"
_PREFIX = "base_model.model."


def save_adapter(model: nn.Module, directory: str | os.PathLike[str]) -> None:
    """Writes the adapter of an injected ``model`` into ``directory``, which PEFT's ``from_pretrained`` reads.

    The directory is made if need be; an adapter in it is replaced, other files stay. Both files are written in full
    before the first is moved into place, and an error puts the old ones back. A process killed between the moves leaves
    a directory without ``adapter_config.json``, never an old file beside a new one; its ``.saving-*`` subdirectory then
    has the missing files.

    Raises:
        ValueError: the model is not injected.
        OSError: the directory cannot be written; what was there is untouched.
    """
    injection = find_injection(model)
    values = injection.config.to_dict() | {"inference_mode": True}  # as PEFT: loading is for inference unless asked
    if values["base_model_name_or_path"] is None:
        values["base_model_name_or_path"] = getattr(root_module(model), "name_or_path", None)
    # A copy each: safetensors refuses tensors that share memory, as tied modules do.
    tensors = {
        key: tensor.detach().to("cpu", copy=True, memory_format=torch.contiguous_format)
        for key, tensor in _adapter_tensors(injection).items()
    }

    _write_pair(Path(directory), json.dumps(values, indent=2, sort_keys=True) + "\n", tensors)


def load_adapter(model: ModelT, directory: str | os.PathLike[str], trainable: bool = False) -> ModelT:
    """Loads an adapter that :func:`save_adapter` or PEFT wrote; injects into ``model`` by the file's config if need be.

    Values are cast to the dtype of the parameters they go to. Modules trained in full are overwritten in place, as are
    base layers where the file has them.

    Args:
        model: a bare model, or one injected with the same layers, rank and scaling.
        directory: holds ``adapter_config.json`` and ``adapter_model.safetensors``.
        trainable: inject the adapter, and its modules trained in full, with ``requires_grad``. A model that is injected
            already keeps its ``requires_grad`` flags.

    Returns:
        ``model``, the same object.

    Raises:
        FileNotFoundError: naming the file that is missing.
        ValueError: a file is corrupted, its config is not supported or differs from the model's, or its tensors do not
            fit the model: every missing and unexpected key, wrong shape and wrong dtype is listed.
        RuntimeError: the model's adapter is merged.
        Also what :func:`lora_ext.inject` raises. The model is then unchanged.
    """
    directory = Path(directory)
    config = _read_config(directory / CONFIG_FILE)
    tensors = _read_tensors(directory / WEIGHTS_FILE)

    inject_first = not is_injected(model)
    if inject_first:
        injection = plan_injection(model, dataclasses.replace(config, inference_mode=not trainable))
    else:
        injection = find_injection(model)
        _check_same_kind(model, injection, config, directory)
    base = _base_tensors(model, injection)
    targets = _adapter_tensors(injection) | {key: tensor for key, tensor in base.items() if key in tensors}
    _check_fit(targets, tensors, directory / WEIGHTS_FILE)

    # Nothing below fails: the adapter's tensors are filled before it is attached.
    with torch.no_grad():
        for key, target in targets.items():
            target.copy_(tensors[key])
    if inject_first:
        apply_injection(model, injection)
    return model


def _adapter_tensors(injection: Injection) -> dict[str, Tensor]:
    """The live tensors of an adapter by their key in the file."""
    tensors = {}
    for path, adapter in injection.adapters.items():
        tensors[f"{_PREFIX}{path}.lora_A.weight"] = adapter.lora_A
        tensors[f"{_PREFIX}{path}.lora_B.weight"] = adapter.lora_B
    for path, module in injection.trained.items():
        tensors |= {f"{_PREFIX}{path}.{name}": tensor for name, tensor in module.state_dict().items()}
    return tensors


def _base_tensors(model: nn.Module, injection: Injection) -> dict[str, Tensor]:
    """The frozen tensors under the adapters, by the key that PEFT gives the weight of an adapted output head."""
    layers = {path: root_module(model).get_submodule(path) for path in injection.adapters}
    return {
        f"{_PREFIX}{path}.base_layer.{name}": tensor
        for path, layer in layers.items()
        for name, tensor in getattr(layer, "base_layer", layer).state_dict().items()
    }


# --- writing ----------------------------------------------------------------------------------------------------------


def _write_pair(directory: Path, config: str, tensors: dict[str, Tensor]) -> None:
    try:
        directory.mkdir(parents=True, exist_ok=True)
        # Inside the directory: moves must not cross file systems, nor need rights on its parent.
        staging = Path(tempfile.mkdtemp(prefix=".saving-", dir=directory))
    except OSError as error:
        raise OSError(
            error.errno,
            f"save_adapter: cannot write there ({error.strerror}); choose another directory",
            str(directory),
        ) from error

    old = [(directory / name, staging / f"old_{name}") for name in (CONFIG_FILE, WEIGHTS_FILE)]
    new = [(staging / name, directory / name) for name in (WEIGHTS_FILE, CONFIG_FILE)]
    done: list[tuple[Path, Path]] = []
    try:
        (staging / CONFIG_FILE).write_text(config, encoding="utf-8")
        save_file(tensors, staging / WEIGHTS_FILE, metadata={"format": "pt"})
        # safetensors lets only the owner read what it writes; both files get what the user's umask gives.
        (staging / WEIGHTS_FILE).chmod((staging / CONFIG_FILE).stat().st_mode)
        for source, _ in new:
            with open(source, "rb") as file:
                os.fsync(file.fileno())
        for source, target in [move for move in old if move[0].exists()] + new:
            os.replace(source, target)
            done.append((source, target))
    except BaseException:
        for source, target in reversed(done):
            os.replace(target, source)
        shutil.rmtree(staging, ignore_errors=True)
        raise
    shutil.rmtree(staging, ignore_errors=True)


# --- reading ----------------------------------------------------------------------------------------------------------


def _read_config(path: Path) -> LoraConfig:
    if not path.is_file():
        raise FileNotFoundError(f"load_adapter: {path} is missing; want a directory that save_adapter or PEFT wrote")
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"load_adapter: {path} is not JSON: {error}") from error
    if not isinstance(values, dict):
        raise ValueError(f"load_adapter: {path} holds a {type(values).__name__}, want an object with PEFT's keys")
    try:
        return LoraConfig.from_dict(values)
    except (TypeError, ValueError) as error:
        raise ValueError(f"load_adapter: {path}: {error}") from error


def _read_tensors(path: Path) -> dict[str, Tensor]:
    if not path.is_file():
        pickled = path.with_name("adapter_model.bin")
        advice = f"; {pickled.name} is there: save it again as safetensors" if pickled.is_file() else ""
        raise FileNotFoundError(f"load_adapter: {path} is missing{advice}")
    try:
        return load_file(path)
    except SafetensorError as error:
        raise ValueError(f"load_adapter: {path} is corrupted or not a safetensors file: {error}") from error


def _check_same_kind(model: nn.Module, injection: Injection, config: LoraConfig, directory: Path) -> None:
    """Rank and layers show in the tensors; scaling does not, nor does an update that the base weights now contain."""
    merged = [path for path, layer in lora_modules(root_module(model)) if layer.is_merged]
    if merged:
        raise RuntimeError(f"load_adapter: the adapter of {merged[0]!r} is merged; call unmerge(model) first")
    for key in ("r", "lora_alpha", "use_rslora"):
        ours, theirs = getattr(injection.config, key), getattr(config, key)
        if ours != theirs:
            raise ValueError(
                f"load_adapter: {directory} has {key}={theirs} but the model was injected with {key}={ours}; inject "
                "with the same config, or load into a bare model"
            )


def _check_fit(targets: Mapping[str, Tensor], tensors: Mapping[str, Tensor], path: Path) -> None:
    problems = [f"missing key: {key}" for key in targets if key not in tensors]
    problems += [f"unexpected key: {key}" for key in tensors if key not in targets]
    filled: dict[tuple[torch.device, int], str] = {}
    for key, target in targets.items():
        if key not in tensors:
            continue
        tensor = tensors[key]
        if tensor.shape != target.shape:
            problems.append(f"shape of {key}: {list(tensor.shape)} in the file, {list(target.shape)} in the model")
        if tensor.is_floating_point() != target.is_floating_point() or tensor.is_complex():
            problems.append(f"dtype of {key}: {tensor.dtype} in the file, {target.dtype} in the model")
        if target.is_meta:
            problems.append(f"device of {key}: the model is on the meta device; give it memory (to_empty) first")
        # Tied modules hold one tensor under two keys.
        twin = filled.setdefault((target.device, target.data_ptr()), key) if target.numel() else key
        if twin != key and not target.is_meta and not torch.equal(tensors[twin], tensor):
            problems.append(f"values of {key}: tied to {twin} in the model, but they differ in the file")
    if problems:
        raise ValueError(f"load_adapter: {path} does not fit the model:\n  " + "\n  ".join(problems))
