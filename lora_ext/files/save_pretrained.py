"""``save_pretrained`` of an adapted model: never writes the model's own keys, which ``from_pretrained`` misreads.

- A merged model: what the library writes of the base model, with the merged weights.
- Otherwise the adapters, as PEFT does: :func:`~lora_ext.save_adapter`'s two files, for adapters other than "default" in
  a subdirectory of that name; and ``model.safetensors`` with the state of what is trained alone, from which ``Trainer``
  resumes (lora_ext/model/adapter_state.py).
- A model with the modules of a method (lora_ext.methods): the files of ``save_method``, and such a state.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from torch import nn

from lora_ext._common.changes import one_at_a_time
from lora_ext._common.messages import warn_user
from lora_ext._common.sharded import is_elsewhere, is_fully_sharded, prepare_shards
from lora_ext.files.adapter_file import ADAPTER_FILES, CONFIG_FILE, AdapterFile, holds_adapter
from lora_ext.files.reading import tensor_table
from lora_ext.files.save_load import adapter_content
from lora_ext.files.writing import write_files, write_tensors
from lora_ext.model.adapter_set import adapter_set, find_adapter
from lora_ext.model.adapter_state import (
    MARKER,
    MethodFiles,
    adapter_state,
    trained_ids,
    warn_of_lost_parameters,
    with_values,
)
from lora_ext.model.bare_model import adapter_layers
from lora_ext.model.replaced_methods import SavePretrained
from lora_ext.nn import LoraLayer
from lora_ext.nn.adapter_layer import base_keys

_DEFAULT = "default"  # the adapter that PEFT saves in the directory itself
_STATE_FILE = "model.safetensors"
_MODEL_FILES = (_STATE_FILE, f"{_STATE_FILE}.index.json", "pytorch_model.bin", "pytorch_model.bin.index.json")
_FOR_MODELS = ("push_to_hub", "distributed_checkpoint", "variant")  # options that adapters do not have


@one_at_a_time
def save_adapted(saver: SavePretrained, directory: Path, options: dict[str, Any]) -> Any:
    """Saves ``saver.module`` so that what is written can be loaded. ``options`` are its arguments.

    ValueError: some of the active adapters are merged and others are not; the directory holds something else; the
    module is a part of the adapted model; the model is sharded, and no ``state_dict`` is given; an option does not go
    with adapters.
    """
    module, name = saver.module, f"{type(saver.module).__name__}.save_pretrained"
    method = MethodFiles.of(saver.root)
    if trained_ids(module, method).isdisjoint(map(id, (*module.parameters(), *module.buffers()))):
        with base_keys():  # layers may be left without adapters, for a pool
            return saver.original(directory, **options)
    prepare_shards(name, module)
    given = options.pop("state_dict", None)
    if given == {}:  # Trainer's placeholder under DeepSpeed, which it removes
        return None
    is_sharded = any(map(is_fully_sharded, module.modules())) or any(map(is_elsewhere, module.parameters()))
    if given is None and is_sharded:
        raise ValueError(
            f"{name}: the model is sharded (fully_shard, or DeepSpeed's ZeRO-3); call lora_ext.save_adapter on all "
            "ranks, or gather the state and pass it, as Trainer does: save_pretrained(directory, "
            "state_dict=accelerator.get_state_dict(model))"
        )
    is_merged = _is_merged(name, module)
    if is_merged and method is not None and method.inserts:
        raise ValueError(
            f"{name}: adapters are merged, but {method.name} inserted modules that files of the base model cannot "
            "hold; call unmerge(model), or lora_ext.methods.save_method"
        )
    if is_merged and holds_adapter(directory):
        raise ValueError(
            f"{name}: {directory} holds an adapter ({CONFIG_FILE}), which would be loaded on top of the merged weights;"
            " choose another directory, or delete it"
        )
    with with_values(name, module, given):
        if is_merged:
            with base_keys():
                return saver.original(directory, **options)
        if module is not saver.root:
            raise ValueError(
                f"{name}: it is a part of the adapted {type(saver.root).__name__}; save that by save_adapter or "
                "save_pretrained, merge(model) first, or inject the part alone"
            )
        if given_options := [f"{option}={options[option]!r}" for option in _FOR_MODELS if options.get(option)]:
            raise ValueError(f"{name}: {given_options[0]} is for whole models; merge(model) first")
        _save_adapters(name, directory, module, method, writes=options.get("is_main_process", True))
    return None


SavePretrained.save = staticmethod(save_adapted)


def _is_merged(name: str, module: nn.Module) -> bool:
    """Returns whether the base weights contain all active adapters. ValueError: they contain some of them."""
    layers = [layer for _, layer in adapter_layers(module) if isinstance(layer, LoraLayer)]
    merged = {adapter for layer in layers for adapter in layer.merged_adapters}
    waiting = {adapter for layer in layers for adapter in {*layer.active_adapters} - {*layer.merged_adapters}}
    if merged and waiting:
        raise ValueError(
            f"{name}: the adapters {sorted(merged)} are merged, {sorted(waiting)} are active but not merged "
            "everywhere; merge or unmerge all of them (lora_ext.merge, lora_ext.unmerge)"
        )
    return bool(merged)


def _save_adapters(name: str, directory: Path, module: nn.Module, method: MethodFiles | None, writes: bool) -> None:
    """Writes the files of the method and of all adapters, and the state from which Trainer resumes.

    Processes that do not write gather the parts of split layers (tensor parallelism) along with the one that does.
    """
    for path in (directory / file for file in _MODEL_FILES):
        if path.exists() and not _is_state(path):  # it may be the only copy of the base
            raise ValueError(
                f"{name}: {path} holds weights of a whole model, which adapters must not replace; choose another "
                "directory, or merge(model) first"
            )
    contents: dict[str, AdapterFile] = {}
    base = []
    adapters = adapter_set(module)
    for adapter_name in () if adapters is None else adapters.configs:
        adapter = find_adapter(module, name, adapter_name)
        contents[adapter_name], tensors = adapter_content(name, module, adapter)
        base += tensors
    if method is not None and method.has_adapter and _DEFAULT not in contents:
        raise ValueError(
            f"{name}: the adapter {_DEFAULT!r}, a part of {method.name}, was merged for good, removed or renamed; "
            "call lora_ext.methods.remove_method(model), which keeps the weights"
        )
    state = adapter_state(module, method, base)
    if not writes:
        return
    warn_of_lost_parameters(name, module, method, saved=base)
    if method is not None and contents:
        warn_user(
            f"{name}: PEFT and from_pretrained read the low-rank adapters in {directory} without what {method.name} "
            "trained; load all of it into the base model by lora_ext.methods.load_method(model, directory), then the "
            "other adapters by load_adapter"
        )
    default = [contents.pop(_DEFAULT)] if _DEFAULT in contents else []
    parts = default if method is None else [*default, method]
    names = (ADAPTER_FILES if default else ()) if method is None else method.names
    with write_files(directory, (_STATE_FILE, *names), name) as staging:
        write_tensors(staging / _STATE_FILE, state, {"format": "pt"})
        for part in parts:
            part.write(staging)
    for adapter_name, content in contents.items():
        with write_files(directory / adapter_name, ADAPTER_FILES, name) as staging:
            content.write(staging)


def _is_state(path: Path) -> bool:
    """Returns whether a save of adapters wrote the file."""
    try:
        return MARKER in tensor_table(path)
    except (OSError, ValueError):
        return False
