"""``save_pretrained`` of an adapted model: never writes the model's own keys, which ``from_pretrained`` misreads.

- A merged model: what the library writes of the base model, with the merged weights.
- Otherwise the adapters, as PEFT does: :func:`~lora_ext.save_adapter`'s two files, for adapters other than "default" in
  a subdirectory of that name. The library's own weights file holds the state of the adapters alone
  (lora_ext/model/adapter_state.py), from which ``Trainer`` resumes; loading it as a model fails.
- A model with the modules of a method (lora_ext.methods): the files of ``save_method``, and such a weights file.
"""

from __future__ import annotations

import dataclasses
import inspect
import json
import os
import re
import threading
from collections.abc import Callable, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from lora_ext._common.changes import one_at_a_time
from lora_ext._common.printable import shown
from lora_ext._common.sharded import is_elsewhere, is_fully_sharded
from lora_ext._common.warnings import warn_user
from lora_ext.files.adapter_content import ADAPTER_FILES, FileContent, file_content, write_content
from lora_ext.files.adapter_file import CONFIG_FILE, holds_adapter
from lora_ext.files.base_layers import base_tensors_to_save
from lora_ext.files.part_config import config_within
from lora_ext.files.safetensors_format import header_bytes, is_cut_off
from lora_ext.files.staged_files import staged_files
from lora_ext.model.adapter_set import AdapterSet, adapter_in, adapter_set, check_at_hand
from lora_ext.model.adapter_state import MARKERS, adapter_state, lost_parameters, own_state
from lora_ext.model.bare_model import adapter_layers
from lora_ext.model.given_state import with_values
from lora_ext.model.method_files import MethodFiles
from lora_ext.model.saver import SavePretrained
from lora_ext.nn import LoraLayer
from lora_ext.nn.state_form import base_keys, no_state, own_keys

_DEFAULT = "default"  # the adapter that PEFT saves in the directory itself


@one_at_a_time
def save_adapted(saver: SavePretrained, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Any:
    """Calls the library's ``save_pretrained`` of ``saver.module``, so that what it writes can be loaded.

    Raises:
        ValueError: some of the active adapters are merged and others are not; the directory holds a whole model, or for
            a merged model an adapter; Transformers' ``add_adapter`` added PEFT's adapters; ``distributed_checkpoint``
            is set; FSDP1 wraps a part (nothing is written then). Or no config describes the adapters in a part of the
            model; or the library would write a part with adapters by itself; or the model has a method's modules, and
            adapters are merged, or it is a part of the model.
        RuntimeError: the library did not ask for the state of the module.
    """
    module, adapters = saver.module, saver.adapters
    call = _Call(f"{type(module).__name__}.save_pretrained", saver.original, args, kwargs)
    method = MethodFiles.of(module)
    if saver.has_method and method is None:
        raise ValueError(
            f"{call.name}: the method that was applied to the whole model inserted modules into this part, which "
            f"{type(module).__name__} lacks; call lora_ext.methods.save_method, or save_pretrained, on the whole model"
        )
    has_adapters = any(len(layer.adapters) for _, layer in adapter_layers(module))
    if has_adapters and adapters is None:
        raise ValueError(
            f"{call.name}: a part of {type(module).__name__} was injected by itself, and its adapters would be lost; "
            "call lora_ext.save_adapter on that part, or inject the whole model"
        )
    if not has_adapters and method is None:  # all adapters were deleted, or are in a pool
        with base_keys():
            return call.run()
    _check_library_can_save(call, module)
    if call.get("state_dict") == {}:  # Trainer's placeholder under DeepSpeed, which it removes
        return call.run()
    given = call.take("state_dict")
    if given is None:
        _check_values_at_hand(call, module)
    with with_values(call.name, module, given):
        if not _is_merged(call.name, module):
            return _save_adapters(call, module, adapters, method)
        _check_can_save_merged(call, method)
        with base_keys():
            return call.run()


def _check_library_can_save(call: _Call, module: nn.Module) -> None:
    """Refuses what makes the library write other files than those of our adapters."""
    if getattr(module, "_hf_peft_config_loaded", False) and hasattr(module, "get_adapter_state_dict"):
        # Transformers then saves PEFT's adapter only.
        raise ValueError(
            f"{call.name}: PEFT's adapters were added to {type(module).__name__} (add_adapter, load_adapter), and "
            "their files would replace those of the adapters of inject; call lora_ext.save_adapter for these, and let "
            "peft.get_peft_model add PEFT's, which saves its own"
        )
    if call.get("distributed_checkpoint"):
        raise ValueError(
            f"{call.name}: distributed_checkpoint=True would write keys that from_pretrained cannot read; merge(model) "
            "and save without it, or use torch.distributed.checkpoint, which the model's keys suit"
        )
    if any(type(part).__name__ == "FullyShardedDataParallel" for part in module.modules()):
        # Asking one process for a state would wait for the others, and the wrappers are in the paths.
        raise ValueError(
            f"{call.name}: parts of the model are wrapped by FullyShardedDataParallel; use fully_shard (FSDP2, "
            "fsdp_version=2 in accelerate), or load the gathered state_dict into an unwrapped model and save that one"
        )


def _check_values_at_hand(call: _Call, module: nn.Module) -> None:
    """Refuses models whose values are spread over processes: the caller must gather them and pass a state_dict."""
    if any(is_fully_sharded(part) for part in module.modules()):
        raise ValueError(
            f"{call.name}: {type(module).__name__} is sharded (fully_shard); call lora_ext.save_adapter on all ranks, "
            "or gather its state_dict (torch.distributed.checkpoint.state_dict, full_state_dict=True) and pass it to "
            "save_pretrained(directory, state_dict=...)"
        )
    if any(is_elsewhere(parameter) for parameter in module.parameters()):
        raise ValueError(
            f"{call.name}: DeepSpeed's ZeRO-3 has partitioned {type(module).__name__}; call lora_ext.save_adapter on "
            "all ranks, or save_pretrained(directory, state_dict=accelerator.get_state_dict(engine)), as Trainer does"
        )


def _check_can_save_merged(call: _Call, method: MethodFiles | None) -> None:
    if method is not None and method.inserts:
        raise ValueError(
            f"{call.name}: adapters are merged, but {method.name} inserted modules that the base model lacks, so that "
            "no files of the base model can hold the result; call unmerge(model), or lora_ext.methods.save_method"
        )
    if holds_adapter(call.directory):
        raise ValueError(
            f"{call.name}: {call.directory} holds an adapter ({CONFIG_FILE}), which would be loaded on top of the "
            "merged weights; choose another directory, or delete it"
        )


SavePretrained.save = staticmethod(save_adapted)


class _Call:
    """A call of a library's ``save_pretrained``."""

    def __init__(
        self, name: str, original: Callable[..., Any], args: tuple[Any, ...], kwargs: Mapping[str, Any]
    ) -> None:
        self.name, self._original = name, original
        self._bound = inspect.signature(original).bind(*args, **kwargs)
        parameters = self._bound.signature.parameters.values()
        self._extra = next((p.name for p in parameters if p.kind is p.VAR_KEYWORD), None)
        self.directory = Path(next(iter(self._bound.arguments.values())))
        if self.directory.is_file():
            raise NotADirectoryError(f"{name}: {self.directory} is a file, want a directory")

    def get(self, argument: str, default: Any = None) -> Any:
        held = self._bound.arguments
        return held.get(argument, held.get(self._extra, {}).get(argument, default))

    def take(self, argument: str) -> Any:
        """Returns an argument and removes it from the call; None if it was not given."""
        value, held = self.get(argument), self._bound.arguments
        held.pop(argument, None)
        if self._extra in held:
            held[self._extra] = {key: value for key, value in held[self._extra].items() if key != argument}
        return value

    def set_if_known(self, argument: str, value: Any) -> None:
        if argument in self._bound.signature.parameters:
            self._bound.arguments[argument] = value

    def run(self) -> Any:
        # By name, because arguments may have been removed before others.
        positional = {inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.VAR_POSITIONAL}
        if any(self._bound.signature.parameters[name].kind in positional for name in self._bound.arguments):
            return self._original(*self._bound.args, **self._bound.kwargs)
        named = {name: value for name, value in self._bound.arguments.items() if name != self._extra}
        return self._original(**named, **self._bound.arguments.get(self._extra, {}))


# --- adapters ---------------------------------------------------------------------------------------------------------


class _Saves(threading.local):
    """Counts the states that this thread has written, to find savers that write something else."""

    count = 0


_saves = _Saves()


def _save_adapters(call: _Call, module: nn.Module, adapters: AdapterSet | None, method: MethodFiles | None) -> Any:
    _check_no_model(call)
    call.take("max_shard_size")  # an adapter is one file
    call.set_if_known("save_original_format", False)  # the names in it are those of the injected model
    config = call.directory / "config.json"
    had_config = os.path.lexists(config)
    thread, before = threading.get_ident(), _saves.count

    def state_dict(*args: Any, **kwargs: Any) -> dict[str, Tensor]:
        if threading.get_ident() != thread or args or kwargs.get("destination") is not None:
            return type(module).state_dict(module, *args, **kwargs)
        with own_keys():
            # Here, not before: push_to_hub uploads what was written after the call began.
            base = _base_layers(call.name, module, adapters)
            if call.get("is_main_process", True):
                _write_adapters(call, module, adapters, base, method)
                if holds_adapter(call.directory):
                    # With it, Transformers takes the directory for a whole model, and PEFT's config for an addition.
                    config.unlink(missing_ok=True)
            _saves.count += 1
            return adapter_state(module, adapters, method) | _state_of(module, base)

    reason = (
        f"{call.name}: it saves a part of {type(module).__name__} by itself, and would lose the adapters there; "
        "merge(model) first, or call lora_ext.save_adapter"
    )
    replaced = vars(module).get("state_dict")
    module.state_dict = state_dict
    try:
        with no_state(reason):
            result = call.run()
    except BaseException:
        if not had_config:  # the library has written it, and the adapter of an earlier save would not load with it
            with suppress(OSError):
                config.unlink(missing_ok=True)
        raise
    finally:
        if replaced is None:
            del module.state_dict
        else:
            module.state_dict = replaced
    if _saves.count == before:
        raise RuntimeError(
            f"{call.name} did not save the adapters: it did not ask for the state of the model; merge(model) first, or "
            "call lora_ext.save_adapter"
        )
    return result


def _base_layers(caller: str, module: nn.Module, adapters: AdapterSet | None) -> dict[str, dict[str, Tensor]]:
    """The tensors of base layers that the adapters' files hold, by adapter and key."""
    if adapters is None:
        return {}
    held = {name for _, layer in adapter_layers(module) for name in layer.adapters}
    names = (name for name in adapters.configs if name in held)
    return {name: base_tensors_to_save(caller, module, adapter_in(module, adapters, name)) for name in names}


def _state_of(module: nn.Module, base: Mapping[str, Mapping[str, Tensor]]) -> dict[str, Tensor]:
    """The same tensors by the keys of :func:`own_state`."""
    wanted = {id(tensor) for tensors in base.values() for tensor in tensors.values()}
    state = {}
    for key, tensor in own_state(module).items() if wanted else ():
        if id(tensor) in wanted:
            wanted.remove(id(tensor))  # a tied tensor once
            state[key] = tensor.detach().to("cpu", copy=True)
    return state


def _write_adapters(
    call: _Call,
    module: nn.Module,
    adapters: AdapterSet | None,
    base: Mapping[str, Mapping[str, Tensor]],
    method: MethodFiles | None,
) -> None:
    contents = {}
    for name in base:
        adapter = adapter_in(module, adapters, name)
        check_at_hand(call.name, adapter)
        if adapter_set(module) is not adapters:
            adapter = dataclasses.replace(adapter, config=config_within(call.name, module, adapter))
        contents[name] = file_content(module, adapter, base[name])
    if method is not None and method.has_adapter and _DEFAULT not in contents:
        raise ValueError(
            f"{call.name}: the adapter {_DEFAULT!r}, a part of {method.name}, was merged for good, removed or renamed; "
            "call lora_ext.methods.remove_method(model), which keeps the weights"
        )
    saved = [tensor for tensors in base.values() for tensor in tensors.values()]
    if lost := lost_parameters(module, adapters, method, saved=saved):
        if method is None:
            owner, loader, remedy = "belongs to no adapter", "load_adapter", "name its module in modules_to_save"
        else:
            owner, loader, remedy = f"does not belong to {method.name}", "load_method", "freeze it, or save it yourself"
        warn_user(
            f"{call.name}: {shown(lost[0])} requires a gradient but {owner} (one of {len(lost)} parameters): Trainer "
            f"resumes with it, but {loader} will not restore it; {remedy}"
        )
    if method is not None:
        _write_method(call, method, contents)
    for name, content in contents.items():
        directory = call.directory if name == _DEFAULT else call.directory / name
        with staged_files(directory, ADAPTER_FILES, call.name) as staging:
            write_content(staging, content)


def _write_method(call: _Call, method: MethodFiles, contents: dict[str, FileContent]) -> None:
    """Writes what ``save_method`` does; takes the adapter "default" out of ``contents``, as it is written too."""
    if contents:
        part_of_it = {_DEFAULT} if method.has_adapter else set()
        added = ", then the other adapters by load_adapter" if contents.keys() - part_of_it else ""
        warn_user(
            f"{call.name}: PEFT and from_pretrained read the low-rank adapter in {call.directory} without what "
            f"{method.name} trained; load all of it into the base model by lora_ext.methods.load_method(model, "
            f"directory){added}"
        )
    default = contents.pop(_DEFAULT, None)
    with staged_files(call.directory, method.names, call.name) as staging:
        if default is not None:
            write_content(staging, default)
        method.write(staging)


_MODEL_FILE = re.compile(
    r"(diffusion_pytorch_)?model\b.*\.safetensors(\.index\.json)?|(diffusion_)?pytorch_model(?!_fsdp).*\.bin(\.index\.json)?"
)


def _check_no_model(call: _Call) -> None:
    """Checks that no weights of a whole model would be replaced: they may be the only copy of the base."""
    for path in sorted(call.directory.glob("*model*")):
        if _MODEL_FILE.fullmatch(path.name) and not _holds_adapters_only(path):
            raise ValueError(
                f"{call.name}: {path} holds weights of a whole model, which adapters must not replace; choose another "
                "directory, or merge(model) first"
            )


def _holds_adapters_only(path: Path) -> bool:
    """Returns whether a save of adapters wrote the file, or began to: safetensors before 0.8 writes in place."""
    if path.suffix != ".safetensors":
        return False
    try:
        header = header_bytes(path)
    except (OSError, ValueError):
        return False
    return is_cut_off(header) or any(json.dumps(marker).encode() in header for marker in MARKERS)


# --- the state of the model -------------------------------------------------------------------------------------------


def _is_merged(caller: str, module: nn.Module) -> bool:
    """Returns whether the base weights contain all active adapters. ValueError: they contain some of them."""
    layers = {path: layer for path, layer in adapter_layers(module) if isinstance(layer, LoraLayer)}
    merged = {name for layer in layers.values() for name in layer.merged_adapters}
    waiting = {name for layer in layers.values() for name in {*layer.active_adapters} - {*layer.merged_adapters}}
    if merged and waiting:
        raise ValueError(
            f"{caller}: the adapters {sorted(merged)} are merged, {sorted(waiting)} are in use but not merged "
            "everywhere; merge or unmerge all of them (lora_ext.merge, lora_ext.unmerge)"
        )
    return bool(merged)
