"""Files of adapted models: ``method.json``, ``method.safetensors``, and PEFT's two files of a low-rank adapter."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Iterable, Mapping
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from lora_ext._common.arguments import checked
from lora_ext._common.changes import one_at_a_time
from lora_ext._common.messages import listed, shown, warn_user
from lora_ext._common.sharded import is_elsewhere, is_sharded
from lora_ext.files.adapter_file import ADAPTER_FILES, METHOD_FILE, AdapterFile, misfits, read_tensors
from lora_ext.files.reading import read_json
from lora_ext.files.save_load import adapter_content, base_name, eval_unless_training, load_opened
from lora_ext.files.writing import write_files, write_json, write_tensors
from lora_ext.methods.adapted import applied_method, carry_out, check_is_bare, method_of, trained_by
from lora_ext.methods.base import Inserted, Insertion, Method, pooling_of
from lora_ext.methods.lora import Lora
from lora_ext.methods.pooling import POOLINGS, with_pooling
from lora_ext.methods.registry import METHODS, combined, new_method
from lora_ext.model.adapter_set import adapter_set, find_adapter
from lora_ext.model.adapter_state import MethodFiles, warn_of_lost_parameters
from lora_ext.model.bare_model import BareModel, root_module

ModelT = TypeVar("ModelT", bound=nn.Module)

_LARGEST_METHOD = 1 << 20  # bytes
TENSORS_FILE = "method.safetensors"


@checked
@one_at_a_time
def save_method(model: nn.Module, directory: str | os.PathLike[str]) -> None:
    """Saves the applied method and the parameters that it trains to ``directory``.

    The low-rank adapter of ``lora`` is saved as PEFT's two files. All files change at once, as in
    :func:`lora_ext.save_adapter`.

    Warns of other parameters that require gradients, and of other adapters: the files do not hold them.

    Raises:
        ValueError: no method was applied, its low-rank adapter was merged for good or removed, or the model is sharded.
        OSError: the directory cannot be written; its content is unchanged.
    """
    method = applied_method(model, "save_method")
    files = _files(model, method)
    if any(is_sharded(tensor) or is_elsewhere(tensor) for tensor in files.find_tensors().values()):
        raise ValueError(
            "save_method: the model is sharded; gather its state_dict (torch.distributed.checkpoint.state_dict, "
            "full_state_dict=True; with DeepSpeed accelerator.get_state_dict(engine)) and pass it to "
            "model.save_pretrained(directory, state_dict=...)"
        )
    content, base = None, []
    if files.has_adapter:
        adapter = find_adapter(model, "save_method", "default")  # others may have been added, and be active
        content, base = adapter_content("save_method", model, adapter)
    warn_of_lost_parameters("save_method", root_module(model), files, saved=base)
    _warn_of_other_adapters(model, files)
    with write_files(directory, files.names, "save_method") as staging:
        if content is not None:
            content.write(staging)
        files.write(staging)


def _warn_of_other_adapters(model: nn.Module, files: MethodFiles) -> None:
    adapters = adapter_set(model)
    if others := [
        name for name in (adapters.configs if adapters else ()) if not files.has_adapter or name != "default"
    ]:
        lost_ones = f"the adapters {others} are not a part of {files.name}, and load_method will not restore them"
        warn_user(f"save_method: {lost_ones}; save them by lora_ext.save_adapter to other directories")


def _files(model: nn.Module, method: Method) -> MethodFiles:
    inserts = any(isinstance(module, Inserted) for module in model.modules())
    has_adapter = method.lora_config(model) is not None
    names, trained = (TENSORS_FILE, *ADAPTER_FILES, METHOD_FILE), partial(_targets, model, method)

    def write(staging: Path) -> None:
        content = {
            "format": "lora_ext.methods/1",
            "methods": [{"name": part.name, "options": part.options()} for part in method.parts],
            "base_model_name_or_path": base_name(model),
        }
        if (pooling := pooling_of(model)) is not None:
            content["pooling"] = pooling
        tensors = {path: tensor.detach().to("cpu").contiguous() for path, tensor in trained().items()}
        if tensors:
            write_tensors(staging / TENSORS_FILE, tensors, {"format": "pt"})
        write_json(staging / METHOD_FILE, content)

    return MethodFiles(method.name, inserts, has_adapter, trained, names, write)


def _needed_files(module: nn.Module) -> MethodFiles | None:
    """Returns the files of the method applied to ``module``; None if a base model's or an adapter's files hold all."""
    if (method := method_of(module)) is None:
        return None
    files = _files(module, method)
    has_both = files.has_adapter and files.find_tensors() and adapter_set(module) is not None
    return files if files.inserts or has_both else None


MethodFiles.of = staticmethod(_needed_files)


@checked
@one_at_a_time
def load_method(model: ModelT, directory: str | os.PathLike[str], trainable: bool = False) -> ModelT:
    """Applies a method saved by :func:`save_method` to a bare ``model`` and loads the trained values.

    A file that notes a pooling gives it to the model, too (:func:`lora_ext.methods.set_pooling`). In a model adapted by
    the same method, only the values are replaced, in place, and flags do not change. Values are cast to the dtype of
    the parameters that they fill. Returns ``model``, the same object.

    Args:
        trainable: whether trained parameters require gradients; otherwise all are frozen, and the model is put into
            eval mode.

    Raises:
        FileNotFoundError: a file is missing; the message names it.
        ValueError: a file is corrupted; the model is adapted by another method; or tensors do not fit the model.

    Also the errors of :func:`apply_method`. After an error the model is unchanged.
    """
    saved = _read(Path(directory))
    with with_pooling(model, saved.pooling, "load_method"):
        _load(model, saved, trainable)
    if not trainable:
        eval_unless_training(model)
    return model


def _load(model: nn.Module, saved: _Saved, trainable: bool) -> None:
    method, insertions = saved.method, []
    is_new = method_of(model) is None
    if is_new:
        check_is_bare(model, "load_method")
        saved.check_size(model)
        insertions = method.insertions(model)
    else:
        saved.check_is_of(applied_method(model, "load_method"))
    targets = _targets(model, method, insertions)
    values = saved.read(targets)
    if saved.adapter is not None:
        load_opened(model, saved.adapter, trainable) if is_new else load_opened(model, saved.adapter)
    with torch.no_grad():
        for key, target in targets.items():
            target.copy_(values[key])
    if is_new:
        carry_out(model, method, insertions)
        for parameter in trained_by(model, method).values():
            parameter.requires_grad_(trainable)


def _targets(model: nn.Module, method: Method, insertions: Iterable[Insertion] = ()) -> dict[str, Tensor]:
    """Returns the tensors in ``method.safetensors``, by path in the bare model; ``insertions`` are still to be made."""
    return trained_by(model, method, insertions) | method.buffers(BareModel(root_module(model)))


@checked
def read_method(directory: str | os.PathLike[str]) -> Method:
    """Reads the method saved by :func:`save_method` in ``directory``.

    FileNotFoundError: there is none. ValueError: the file is corrupted.
    """
    return _read(Path(directory)).method


@dataclasses.dataclass(frozen=True)
class _Saved:
    """A saved method whose tensors are known by name and shape, but not read."""

    directory: Path
    method: Method
    adapter: AdapterFile | None  # the low-rank adapter, if the method has one
    tensors: dict[str, Tensor] | None  # the other tensors; None if there is no such file
    pooling: str | None  # of the model that was trained; None: its class's

    def check_size(self, model: nn.Module) -> None:
        """Raises ValueError if the options need more parameters than the file holds. Call it before allocating them."""
        inserting = [part for part in self.method.parts if type(part).insertions is not Method.insertions]
        needed = sum(part.count(model) for part in inserting)
        available = sum(tensor.numel() for tensor in (self.tensors or {}).values())
        if needed > available:
            wanted = f"{shown(needed)} parameters with {shown([part.options() for part in inserting])}"
            note = self.directory / METHOD_FILE
            raise ValueError(f"load_method: {note} asks for {wanted}, but {TENSORS_FILE} holds {available}")

    def check_is_of(self, applied: Method) -> None:
        """Raises ValueError if the model is adapted by another method than the saved one."""
        in_model, in_file = ([(part.name, part.options()) for part in m.parts] for m in (applied, self.method))
        if in_model != in_file:  # load_adapter compares the configs of low-rank adapters
            said = f"{self.directory} has {shown(in_file)}, but the model is adapted by {in_model}"
            raise ValueError(f"load_method: {said}; call remove_method(model) first")

    def read(self, targets: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Reads the new values of ``targets``. FileNotFoundError, ValueError: the tensors do not fit."""
        if not targets:
            return {}
        path = self.directory / TENSORS_FILE
        if self.tensors is None:
            raise FileNotFoundError(f"load_method: there is no {path}; save_method writes it next to {METHOD_FILE}")
        problems = misfits(targets, self.tensors)
        if any(target.is_meta for target in targets.values()):
            problems.append("the model is on the meta device; give it memory (to_empty) first")
        if problems:
            raise ValueError(f"load_method: {path} does not fit the model:{listed(problems)}")
        return {key: self.tensors[key] for key in targets}


def _read(directory: Path) -> _Saved:
    try:
        parts, pooling = _noted(directory / METHOD_FILE)
        path = directory / TENSORS_FILE
        tensors = read_tensors(path)[0] if path.exists() else None
    except FileNotFoundError as error:
        raise FileNotFoundError(f"load_method: {error}") from error
    except ValueError as error:
        raise ValueError(f"load_method: {error}") from error
    adapter = lora = None
    if any(part["name"] == Lora.name for part in parts):
        adapter = AdapterFile.open(directory, caller="load_method")
        # inference_mode describes how a file is loaded, not the method
        lora = Lora(dataclasses.replace(adapter.lora_config("load_method", own=True), inference_mode=False))
    try:
        methods = [lora if part["name"] == Lora.name else new_method(part["name"], **part["options"]) for part in parts]
        return _Saved(directory, combined(methods), adapter, tensors, pooling)
    except (TypeError, ValueError) as error:
        raise ValueError(f"load_method: {directory / METHOD_FILE} is not a method's file: {error}") from error


def _noted(path: Path) -> tuple[list[dict], str | None]:
    """Returns the names and options of the methods, and the pooling. ValueError: the file lacks them."""
    try:
        content = read_json(path, limit=_LARGEST_METHOD)
    except (FileNotFoundError, NotADirectoryError) as error:
        raise FileNotFoundError(f"there is no {path}; save_method writes it") from error
    methods, pooling, wrong = content.get("methods"), content.get("pooling"), None
    if not isinstance(methods, list) or not 0 < len(methods) <= len(METHODS):
        wrong = f"methods is {shown(methods)}, want a list of at least one"
    elif bad := [part for part in methods if not _is_noted_method(part)]:
        wrong = f"it has the method {shown(bad[0])}, want a name (one of {', '.join(METHODS)}) and options"
    elif pooling not in (None, *POOLINGS):
        wrong = f"pooling is {shown(pooling)}, want one of {', '.join(POOLINGS)}"
    if wrong is not None:
        raise ValueError(f"{path} is not a method's file: {wrong}")
    return methods, pooling


def _is_noted_method(part: Any) -> bool:
    return isinstance(part, dict) and part.get("name") in [*METHODS] and isinstance(part.get("options"), dict)
