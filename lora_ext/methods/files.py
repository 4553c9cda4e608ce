"""Files of adapted models: ``method.json`` and ``method.safetensors``, and for low-rank adapters PEFT's pair beside."""

from __future__ import annotations

import dataclasses
import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import TypeVar

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn

from .._arguments import checked
from .._changes import one_at_a_time
from .._interrupts import uninterrupted
from ..adapter_file import AdapterFile
from ..adapter_set import adapter_set, find_adapter
from ..bare_model import BareModel, root_module
from ..checkpoint import ADAPTER_FILES, base_name, config_of, file_content, load_adapter, write_content
from ..config import LoraConfig
from ..merged_projection_file import as_we_have_it
from ..staged_files import staged_files, write_tensors
from .adapted import applied_method, carry_out, check_is_bare, method_of, own_parameters, parameters_of
from .base import Method
from .combined import Combined
from .lora import Lora
from .registry import new_method

ModelT = TypeVar("ModelT", bound=nn.Module)

METHOD_FILE = "method.json"
TENSORS_FILE = "method.safetensors"


@checked
@one_at_a_time
def save_method(model: nn.Module, directory: str | os.PathLike[str]) -> None:
    """Writes what the applied method trains into ``directory``, and how to apply it again.

    Low-rank adapters become ``adapter_config.json`` and ``adapter_model.safetensors``, which PEFT reads. All files
    change at once, as in :func:`lora_ext.save_adapter`.

    Raises:
        ValueError: no method was applied, or its low-rank adapter was merged for good or taken out.
        OSError: the directory cannot be written; what was there is untouched.
    """
    method = applied_method(model, "save_method")
    _check_has_adapter(model, method, "save_method")
    own = own_parameters(model) | method.buffers(BareModel(root_module(model)))
    tensors = {path: each.detach().to("cpu").contiguous() for path, each in own.items()}
    content = {
        "format": "lora_ext.methods/1",
        "methods": [{"name": part.name, "options": part.options()} for part in method.parts],
        "base_model_name_or_path": base_name(model),
    }
    adapter = None
    if adapter_set(model) is not None:
        adapter = file_content(model, find_adapter(model, "save_method", "default"))  # others may have been added since
    names = (TENSORS_FILE, *ADAPTER_FILES, METHOD_FILE)
    with staged_files(Path(directory), names, "save_method") as staging:
        if adapter is not None:
            write_content(staging, adapter)
        if tensors:
            write_tensors(staging / TENSORS_FILE, tensors, {"format": "pt"})
        (staging / METHOD_FILE).write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")


@checked
@one_at_a_time
def load_method(model: ModelT, directory: str | os.PathLike[str], trainable: bool = False) -> ModelT:
    """Applies the method of a directory that :func:`save_method` wrote to a bare ``model``, with what was trained.

    In a model that is adapted by the same method already, the values are replaced in place, and nothing else changes.
    Values are cast to the dtype of the parameters they go to.

    Args:
        model: of the architecture it was saved from.
        directory: holds ``method.json``.
        trainable: what was trained requires gradients again; otherwise all is frozen. Values that are replaced keep
            their flags.

    Returns:
        ``model``, the same object.

    Raises:
        FileNotFoundError: naming the file that is missing.
        ValueError: a file is corrupted, of another method than the model is adapted by, or does not fit the model:
            every missing and unexpected key and wrong shape is listed.
        Also what :func:`apply_method` raises. The model is then unchanged.
    """
    directory = Path(directory)
    method = read_method(directory)
    has_lora = any(isinstance(part, Lora) for part in method.parts)
    if (applied := method_of(model)) is not None:
        _check_same(applied, method, directory)
        _check_has_adapter(model, applied, "load_method")
        targets = own_parameters(model) | method.buffers(BareModel(root_module(model)))
        values = _read_tensors(directory / TENSORS_FILE, targets) if targets else {}
        with uninterrupted():
            if has_lora:
                load_adapter(model, directory)
            _copy(values, targets)
        return model

    check_is_bare(model, "load_method")
    insertions = method.insertions(model)
    inserted = {f"{each.path}.{each.name}".lstrip("."): each.module for each in insertions}
    parameters = parameters_of(model, method, inserted)
    targets = parameters | method.buffers(BareModel(root_module(model)))
    values = _read_tensors(directory / TENSORS_FILE, targets) if targets else {}
    with uninterrupted():
        if has_lora:
            load_adapter(model, directory, trainable)
        _copy(values, targets)
        carry_out(model, method, insertions)
        for parameter in parameters.values():
            parameter.requires_grad_(trainable)
    return model


@checked
def read_method(directory: str | os.PathLike[str]) -> Method:
    """The method of a directory that :func:`save_method` wrote.

    FileNotFoundError: there is none. ValueError: the file is not what its name says.
    """
    directory = Path(directory)
    path = directory / METHOD_FILE
    if not path.is_file():
        raise FileNotFoundError(f"load_method: there is no {path}; save_method writes it")
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        parts = [
            Lora(_adapter_config(directory))
            if part["name"] == Lora.name
            else new_method(part["name"], **part["options"])
            for part in content["methods"]
        ]
        return parts[0] if len(parts) == 1 else Combined(tuple(parts))
    except (KeyError, TypeError, AttributeError, ValueError) as error:
        raise ValueError(f"load_method: {path} is not a method's file: {error}") from error


def _adapter_config(directory: Path) -> LoraConfig:
    file = as_we_have_it(AdapterFile.open(directory, caller="load_method"), "load_method")
    # that files are for inference is how they are loaded, not what the method is
    return dataclasses.replace(config_of(file, "load_method"), inference_mode=False)


def _check_same(applied: Method, method: Method, directory: Path) -> None:
    ours, theirs = ([(p.name, p.options()) for p in each.parts] for each in (applied, method))
    if ours != theirs:  # of low-rank adapters, load_adapter compares the configs
        raise ValueError(
            f"load_method: {directory} has {theirs}, but the model is adapted by {ours}; "
            "call remove_method(model) first"
        )


def _check_has_adapter(model: nn.Module, method: Method, caller: str) -> None:
    if method.lora_config(model) is not None and adapter_set(model) is None:
        raise ValueError(
            f"{caller}: the low-rank adapter of {method.name} is not in the model any more, merged for good or taken "
            "out; call remove_method(model), which leaves the weights as they are"
        )


def _copy(values: Mapping[str, Tensor], targets: Mapping[str, Tensor]) -> None:
    with torch.no_grad():
        for path, target in targets.items():
            target.copy_(values[path])


def _read_tensors(path: Path, targets: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The tensors at ``path``, once they are found to fit ``targets``."""
    if not path.is_file():
        raise FileNotFoundError(f"load_method: there is no {path}; save_method writes it beside {METHOD_FILE}")
    try:
        values = load_file(path)
    except (SafetensorError, OSError) as error:
        raise ValueError(f"load_method: {path} is corrupted: {error}") from error
    problems = [f"missing key: {key}" for key in targets if key not in values]
    problems += [f"unexpected key: {key}" for key in values if key not in targets]
    problems += [
        f"shape of {key}: {list(values[key].shape)} in the file, {list(target.shape)} in the model"
        for key, target in targets.items()
        if key in values and values[key].shape != target.shape
    ]
    if any(target.is_meta for target in targets.values()):
        problems.append("the model is on the meta device; give it memory (to_empty) first")
    if problems:
        raise ValueError(f"load_method: {path} does not fit the model:\n  " + "\n  ".join(problems))
    return values
