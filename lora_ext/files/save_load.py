"""Adapter files in PEFT's format: ``adapter_config.json`` and ``adapter_model.safetensors`` in a directory.

Keys are ``base_model.model.<path>.lora_A.weight`` and ``.lora_B.weight`` for the factors of a linear layer, the names
of ``file_tensors`` for other layers, and ``base_model.model.<path>.<name>`` for the parameters and buffers of a module
trained in full. lora_ext/files/adapter_file.py reads them.
"""

from __future__ import annotations

import dataclasses
import math
import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from lora_ext._common.arguments import checked
from lora_ext._common.changes import changing, one_at_a_time
from lora_ext._common.printable import shown
from lora_ext._common.sharded import (
    first_rank_writes,
    gathered,
    is_elsewhere,
    is_sharded,
    local,
    part_like,
    prepare_shards,
)
from lora_ext._common.warnings import warn_user
from lora_ext._common.wrapped import KEY_PREFIX
from lora_ext.config import LoraConfig
from lora_ext.files.adapter_content import ADAPTER_FILES, file_content, write_content
from lora_ext.files.adapter_file import CONFIG_FILE, AdapterFile
from lora_ext.files.base_layers import SaveEmbeddings, base_tensors, base_tensors_to_save
from lora_ext.files.expert_layout import in_present_layout
from lora_ext.files.hub import download_adapter
from lora_ext.files.misfits import check_places, check_same_kind, check_shapes
from lora_ext.files.packed_projection import from_peft_form
from lora_ext.files.staged_files import staged_files
from lora_ext.injection.inject import Injection, apply_injection, lora_modules
from lora_ext.model.adapter_set import Adapter, Part, adapter_set, find_adapter, find_adapters
from lora_ext.model.adapter_state import lost_parameters
from lora_ext.model.bare_model import check_not_managed, check_not_parallel, root_module
from lora_ext.nn import LoraLayer
from lora_ext.nn.tied import TiedAdapter

ModelT = TypeVar("ModelT", bound=nn.Module)


@checked
@one_at_a_time
def save_adapter(
    model: nn.Module,
    directory: str | os.PathLike[str],
    adapter_name: str | None = None,
    *,
    save_embedding_layers: SaveEmbeddings = "auto",
) -> None:
    """Saves an adapter of an injected ``model`` to ``directory``, where PEFT's ``from_pretrained`` can read it.

    Creates the directory if needed; replaces an adapter in it and keeps other files. A reader always finds the whole
    old adapter or the whole new one: see :func:`~lora_ext.files.staged_files.staged_files`, also about file systems.
    After an error the old one is intact. A killed process leaves a directory ``.lora_ext-saving``, which the files may
    be symbolic links into; the next save removes it.

    All ranks of a sharded model (FSDP2, ZeRO-3) must call it: they gather the factors, and the first one writes. Of a
    model that is not sharded, any ranks may save, also at once.

    Args:
        model: an injected model.
        directory: target directory.
        adapter_name: the adapter to save; None: the active one, which is the only one of the model or the only one
            that trains.
        save_embedding_layers: True also saves the input embedding and the output head of the base model, which
            :func:`load_adapter` and PEFT load; False saves none. "auto": both if the vocabulary was resized, decided
            like in PEFT by the config of the model's ``name_or_path``; and base layers that :func:`load_adapter` loaded
            with the adapter.

    Warns:
        UserWarning: the vocabulary was resized, so the file holds the embedding and the head; or parameters require
            gradients that no adapter trains, and the file does not hold them.

    Raises:
        ValueError: the model is not injected; or ``adapter_name`` is None and not exactly one adapter is active, or
            the model has others and the active one is not the one that trains.
        KeyError: there is no such adapter; the message lists the existing ones.
        OSError: the directory cannot be written; its content is unchanged.
        RuntimeError: another rank could not write a sharded model; or a base layer that is saved contains a merged
            adapter.
    """
    prepare_shards("save_adapter", model)
    if adapter_name is None:
        _check_active_trains(model)
    adapter = find_adapter(model, "save_adapter", adapter_name)
    with gathered(adapter.parameters()):
        base = base_tensors_to_save("save_adapter", model, adapter, save_embedding_layers)
        content = file_content(model, adapter, base)
    _warn_of_lost_parameters(model, adapter, base)
    with first_rank_writes(sharded_tensors(adapter)) as writes:
        if writes:
            with staged_files(Path(directory), ADAPTER_FILES, "save_adapter") as staging:
                write_content(staging, content)


def _check_active_trains(model: nn.Module) -> None:
    """Raises ValueError if a model of several adapters has another one active than the one that trains."""
    adapters = find_adapters(model, "save_adapter")
    training = [name for name in adapters.configs if not adapters.is_frozen(name)]
    if len(adapters.configs) > 1 and set(training) != {*adapters.active.names}:
        raise ValueError(
            f"save_adapter: the model has the adapters {sorted(adapters.configs)}, of which {training or 'none'} train "
            f"and {list(adapters.active.names) or 'none'} are active; name the one to save: save_adapter(model, "
            "directory, adapter_name)"
        )


def _warn_of_lost_parameters(model: nn.Module, adapter: Adapter, base: Mapping[str, Tensor]) -> None:
    if lost := lost_parameters(root_module(model), adapter.into, saved=base.values()):
        warn_user(
            f"save_adapter: {shown(lost[0])} requires a gradient but belongs to no adapter (one of {len(lost)} "
            "parameters), and the file does not hold it; name its module in modules_to_save, pass "
            "save_embedding_layers=True for an embedding or head, or call lora_ext.methods.save_method if a method "
            "trains it"
        )


@checked
def load_adapter(
    model: ModelT,
    directory: str | os.PathLike[str],
    trainable: bool = False,
    adapter_name: str = "default",
    *,
    activate: bool = False,
    allow_pickle: bool = False,
    download: bool = False,
    revision: str | None = None,
    subfolder: str = "",
) -> ModelT:
    """Loads an adapter, saved by :func:`save_adapter` or PEFT, into ``model`` under a name.

    A bare model is injected with the file's config. An injected model gets the adapter in addition, and as in PEFT its
    active adapters stay active and keep training; if it has an adapter of that name, only the values of that adapter
    are replaced, in place.

    A model in which nothing trains after the load of a frozen adapter is put into eval mode, which turns dropout off.
    PEFT does so at every frozen load; here a model with another adapter in training stays in its mode, so that this
    training keeps its dropout.

    All tensors are read before the model changes. Values are cast to the dtype of the parameters that they fill. Base
    layers in the file are loaded too, and saved again with the adapter: PEFT saves those of adapted or resized
    embeddings.

    Args:
        model: any module.
        directory: contains ``adapter_config.json`` and ``adapter_model.safetensors``, or several such files with an
            index. With ``download``, the name of a repository on the Hugging Face hub.
        trainable: whether the adapter requires gradients. An adapter whose values are replaced keeps its flags.
        adapter_name: name of the adapter in the model.
        activate: makes it the active adapter, as :func:`lora_ext.set_adapter` does. The first adapter of a model is
            active in any case.
        allow_pickle: load ``adapter_model.bin`` if there is no safetensors file. Only tensors are unpickled.
        download: fetch the adapter's files into huggingface_hub's cache, or find them there: see
            :func:`~lora_ext.files.hub.download_adapter`. Without it, nothing is ever fetched.
        revision: with ``download``, a branch, tag or commit of the repository.
        subfolder: of ``directory`` or the repository, which has the files: ``save_pretrained`` writes adapters with
            other names than "default" into subdirectories of these names.

    Returns:
        ``model``, the same object.

    Raises:
        FileNotFoundError: a file is missing; the message names it.
        OSError: a file cannot be read, or the download failed.
        ValueError: a file is corrupted; its config is not supported or differs from that of the adapter to replace; or
            its tensors do not fit the model: the message lists missing and unexpected keys, wrong shapes and dtypes.
            No memory is allocated for the adapter before this check. Or a further adapter is ``trainable`` without
            ``activate``: an adapter trains while it is active.
        RuntimeError: an adapter is merged.
        Also the errors of :func:`lora_ext.inject`. After an error the model is unchanged.

    Warns:
        UserWarning: the values of an adapter that DeepSpeed trains (ZeRO-1 or 2) are replaced.
    """
    if download:
        directory = download_adapter(
            str(directory), revision, subfolder=subfolder, allow_pickle=allow_pickle, caller="load_adapter"
        )
    elif revision is not None:
        raise ValueError(f"load_adapter: revision is {revision!r}, but nothing is downloaded; set download=True")
    if subfolder:
        directory = Path(directory) / subfolder.strip("/")
        if ".." in Path(subfolder).parts:
            raise ValueError(f"load_adapter: subfolder is {subfolder!r}, want one within the directory")
    _load(model, directory, trainable, adapter_name, activate, allow_pickle)
    return model


@one_at_a_time
def _load(
    model: nn.Module,
    directory: str | os.PathLike[str],
    trainable: bool,
    adapter_name: str,
    activate: bool,
    allow_pickle: bool,
) -> None:
    file = AdapterFile.open(directory, allow_pickle=allow_pickle, caller="load_adapter")
    load_opened(model, from_peft_form(file, "load_adapter"), trainable, adapter_name, activate)
    if not trainable:
        eval_unless_training(model)


def eval_unless_training(model: nn.Module) -> None:
    """Puts a model without trainable parameters into eval mode."""
    if not any(parameter.requires_grad for parameter in model.parameters()):
        model.eval()


def load_opened(
    model: nn.Module,
    file: AdapterFile,
    trainable: bool = False,
    adapter_name: str = "default",
    activate: bool = False,
) -> None:
    """Loads a file from :func:`~lora_ext.files.packed_projection.from_peft_form` like :func:`load_adapter`."""
    file_alphas, file = file.config, with_positive_alphas(file)
    config = config_of(file, "load_adapter")
    if trainable and str(file_alphas.get("init_lora_weights")).lower() == "mica":
        raise ValueError(
            f'load_adapter: {file.directory / CONFIG_FILE}: init_lora_weights is "mica", with which PEFT trains lora_A '
            'only; here both factors would be trained: if they may, set "init_lora_weights": true'
        )
    check_not_managed("load_adapter", model, "load before deepspeed.initialize (before Trainer.train)")
    prepare_shards("load_adapter", model)
    merged = [path for path, layer in lora_modules(model) if layer.is_merged]
    if merged:
        raise RuntimeError(f"load_adapter: an adapter is merged into {merged[0]!r}; call unmerge(model) first")
    adapters = adapter_set(model)
    if adapters is not None and adapter_name in adapters.configs:
        if activate:
            check_not_parallel("load_adapter", model)
            adapters.check_enabled("load_adapter")
        adapter = find_adapter(model, "load_adapter", adapter_name)
        check_same_kind(adapter, config, file.directory)
        warn_of_a_copy("load_adapter", adapter)
        _fill_checked(model, file, file_alphas, config, adapter, None, activate)
    else:
        activate = activate or adapters is None or not adapters.configs
        if trainable and not activate:
            raise ValueError(
                f"load_adapter: trainable is True, but {list(adapters.active.names)} would stay active, and "
                f"{adapter_name!r} would not train; pass activate=True, or trainable=False and later call "
                f"set_adapter(model, {adapter_name!r}, trainable=True)"
            )
        injection = Injection(model, dataclasses.replace(config, inference_mode=not trainable), adapter_name)
        with injection.values_gathered():
            # Memory is allocated only after the file's shapes have been checked against the config's.
            adapter, give_memory = injection.build_without_memory()
            _fill_checked(model, file, file_alphas, config, adapter, give_memory, activate)


def warn_of_a_copy(caller: str, adapter: Adapter) -> None:
    """Warns if an optimizer of DeepSpeed (ZeRO-1 or 2) will overwrite values that are put into ``adapter``."""
    if any(hasattr(parameter, "_hp_mapping") for parameter in adapter.parameters()):
        warn_user(
            f"{caller}: DeepSpeed's optimizer has a copy of this adapter, with which its next step overwrites the "
            "loaded values; to train on from them, load before deepspeed.initialize"
        )


def _fill_checked(
    model: nn.Module,
    file: AdapterFile,
    file_alphas: Mapping[str, Any],
    config: LoraConfig,
    adapter: Adapter,
    give_memory: Callable[[], Adapter] | None,
    activate: bool,
) -> None:
    """Fills ``adapter`` if the file fits; a new one first gets memory, and is then attached."""
    file = in_present_layout(adapter, file, "load_adapter")
    unsaved = _unsaved_biases(adapter, file)
    check_shapes(model, _targets(model, adapter, file, unsaved), file)
    if give_memory is not None:
        adapter = give_memory()
    targets = _targets(model, adapter, file, unsaved)
    check_places(targets, file)
    values = file.read(targets)

    # Nothing below fails: the adapter is filled before it is attached.
    with torch.no_grad(), changing(adapter.into.active):
        for key, target in targets.items():
            fill(target, values.pop(key))
        for key, scale in _signed(adapter, config, file_alphas).file_scales().items():
            targets[f"{KEY_PREFIX}{key}"].div_(scale)
        if give_memory is not None:
            apply_injection(model, adapter, activate)
        elif activate:
            adapter.into.switch((adapter.name,))
        if loaded := {key for key in base_tensors(model, adapter) if f"{KEY_PREFIX}{key}" in targets}:
            held = adapter.into.loaded_base
            held[adapter.name] = held.get(adapter.name, frozenset()) | loaded


def fill(target: Tensor, values: Tensor) -> None:
    """Copies ``values`` into ``target``, or this rank's part of them."""
    if is_sharded(target):
        target, values = local(target), part_like(target, values)
    target.copy_(values)


def sharded_tensors(adapter: Adapter) -> list[Tensor]:
    """Returns the parameters of an adapter that ZeRO-3 has emptied, or if there are none, its DTensors."""
    elsewhere = [parameter for parameter in adapter.parameters() if is_elsewhere(parameter)]
    return elsewhere or [tensor for tensor in adapter.tensors().values() if is_sharded(tensor)]


def with_positive_alphas(file: AdapterFile) -> AdapterFile:
    """Returns the file with the absolute values of negative alphas: old files have them, the ops do not."""
    config, patterns = file.config, file.config.get("alpha_pattern")
    return AdapterFile(
        file.directory,
        {
            **config,
            **({"lora_alpha": _absolute(config["lora_alpha"])} if "lora_alpha" in config else {}),
            **({"alpha_pattern": {k: _absolute(v) for k, v in patterns.items()}} if isinstance(patterns, dict) else {}),
        },
        file.tensors,
    )


def _absolute(alpha: object) -> object:
    return -alpha if isinstance(alpha, (int, float)) and alpha < 0 else alpha


def _signed(adapter: Adapter, config: LoraConfig, values: Mapping[str, Any]) -> Adapter:
    """Returns the adapter with the signs of the alphas in ``values``, a file's config, in its parts' scales."""

    def sign(part: Part) -> float:
        if not isinstance(part.layer, LoraLayer) or isinstance(part.adapter, TiedAdapter):  # its source has the sign
            return 1.0
        pattern = config.alpha_pattern_for(part.target)
        alpha = values.get("lora_alpha", 1) if pattern is None else values["alpha_pattern"][pattern]
        return math.copysign(1.0, alpha)

    parts = tuple(dataclasses.replace(part, file_scale=sign(part) * part.file_scale) for part in adapter.parts)
    return dataclasses.replace(adapter, parts=parts)


def config_of(file: AdapterFile, caller: str) -> LoraConfig:
    """Returns the file's config. ValueError: it is wrong or not supported."""
    try:
        return LoraConfig.from_dict(file.config)
    except (TypeError, ValueError) as error:
        raise ValueError(f"{caller}: {file.directory / CONFIG_FILE}: {error}") from error


def _unsaved_biases(adapter: Adapter, file: AdapterFile) -> set[str]:
    """Returns the keys of the trained biases if the file has none of them, otherwise none."""
    if adapter.biases is None or adapter.config.bias != "lora_only":
        return set()
    biases = set(adapter.biases.file_tensors())
    if any(f"{KEY_PREFIX}{key}" in file for key in biases):
        return set()
    warn_user(
        f'load_adapter: {file.path} has no bias, though its config says bias="lora_only": PEFT before 0.18 did not '
        "save them. They keep the model's values"
    )
    return biases


def _targets(model: nn.Module, adapter: Adapter, file: AdapterFile, unsaved: set[str]) -> dict[str, Tensor]:
    """Returns the tensors of the model that the file should fill, by the file's keys."""
    targets = {key: tensor for key, tensor in adapter.tensors().items() if key not in unsaved}
    base = base_tensors(model, adapter)
    targets |= {key: tensor for key, tensor in base.items() if f"{KEY_PREFIX}{key}" in file}
    return {f"{KEY_PREFIX}{key}": tensor for key, tensor in targets.items()}
