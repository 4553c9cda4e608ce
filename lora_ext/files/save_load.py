"""Saves adapters of a model as PEFT's files, ``adapter_config.json`` and ``adapter_model.safetensors``, and loads them.

Keys are ``base_model.model.<path>.lora_A.weight`` and ``.lora_B.weight`` for the factors of a linear layer, the names
of ``file_tensors`` for other layers, and ``base_model.model.<path>.<name>`` for the parameters and buffers of a module
trained in full.
"""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

import torch
from torch import Tensor, nn

from lora_ext._common.arguments import checked
from lora_ext._common.changes import one_at_a_time
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
from lora_ext.files.adapter_content import adapter_content
from lora_ext.files.adapter_file import ADAPTER_FILES, CONFIG_FILE, AdapterFile
from lora_ext.files.base_layers import SaveEmbeddings, base_tensors, base_tensors_to_save
from lora_ext.files.expert_layout import check_expert_layout
from lora_ext.files.hub import download_adapter
from lora_ext.files.misfits import check_fits, check_places, check_same_kind
from lora_ext.files.packed_projection import from_peft_form
from lora_ext.files.writing import write_files
from lora_ext.injection.inject import Injection, apply_injection, lora_modules
from lora_ext.model.adapter_set import Adapter, adapter_set, find_adapter, find_adapters
from lora_ext.model.adapter_state import warn_of_lost_parameters
from lora_ext.model.bare_model import check_not_managed, check_not_parallel, root_module

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

    Makes the directory if needed, replaces an adapter in it and keeps other files. Each file appears whole, the config
    last. All ranks of a sharded model (FSDP2, ZeRO-3) must call it: they gather the factors, and the first one writes.

    Args:
        adapter_name: the adapter to save; None: the active one, if no other one trains.
        save_embedding_layers: True also saves the base model's input embedding and output head, which
            :func:`load_adapter` and PEFT load; False saves none. "auto": both if the vocabulary was resized, decided
            like in PEFT by the config of the model's ``name_or_path``; and base layers that were loaded with the
            adapter.

    Warns:
        UserWarning: the vocabulary was resized; or parameters require gradients that the file does not hold.

    Raises:
        ValueError: the model is not injected; or ``adapter_name`` is None and not exactly one adapter is active, or
            the model has others and the active one is not the one that trains.
        KeyError: there is no such adapter; the message lists the existing ones.
        OSError: the directory cannot be written; its content is unchanged.
        RuntimeError: another rank could not write; or a base layer that is saved contains a merged adapter.
    """
    prepare_shards("save_adapter", model)
    if adapter_name is None:
        _check_active_trains(model)
    adapter = find_adapter(model, "save_adapter", adapter_name)
    with gathered(adapter.parameters()):
        base = base_tensors_to_save("save_adapter", model, adapter, save_embedding_layers)
        content = adapter_content(model, adapter, base)
    warn_of_lost_parameters("save_adapter", root_module(model), saved=base.values())
    with first_rank_writes(_sharded_tensors(adapter)) as writes:
        if writes:
            with write_files(directory, ADAPTER_FILES, "save_adapter") as staging:
                content.write(staging)


def _check_active_trains(model: nn.Module) -> None:
    """Checks that no other adapter than the active one trains. ValueError: one does."""
    adapters = find_adapters(model, "save_adapter")
    training = [name for name in adapters.configs if not adapters.is_frozen(name)]
    if len(adapters.configs) > 1 and set(training) != {*adapters.active.names}:
        raise ValueError(
            f"save_adapter: the model has the adapters {sorted(adapters.configs)}, of which {training or 'none'} train "
            f"and {list(adapters.active.names) or 'none'} are active; name the one to save: save_adapter(model, "
            "directory, adapter_name)"
        )


@checked
def load_adapter(
    model: ModelT,
    directory: str | os.PathLike[str],
    trainable: bool = False,
    adapter_name: str = "default",
    *,
    activate: bool = False,
    download: bool = False,
    revision: str | None = None,
    subfolder: str = "",
) -> ModelT:
    """Loads an adapter, saved by :func:`save_adapter` or PEFT, into ``model`` under a name.

    A bare model is injected with the file's config. An injected model gets the adapter in addition, and as in PEFT its
    active adapters stay active and keep training; if it has an adapter of that name, the values of that adapter are
    replaced, in place. Base layers in the file are loaded too, and saved again with the adapter. Values are cast to the
    dtype of the parameters that they fill. A model in which nothing trains after the load of a frozen adapter is put
    into eval mode.

    Args:
        directory: of the files. With ``download``, the name of a repository on the Hugging Face hub.
        trainable: whether the adapter requires gradients. An adapter whose values are replaced keeps its flags.
        adapter_name: name of the adapter in the model.
        activate: makes it the active adapter, as :func:`lora_ext.set_adapter` does. The first adapter of a model is
            active in any case.
        download: fetch the adapter's files into huggingface_hub's cache, or find them there. Without it, nothing is
            ever fetched.
        revision: with ``download``, a branch, tag or commit of the repository.
        subfolder: of ``directory`` or the repository: ``save_pretrained`` writes adapters with other names than
            "default" into subdirectories of these names.

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
        UserWarning: the file has NaN or infinite values, or DeepSpeed (ZeRO-1 or 2) trains the adapter whose values are
            replaced.
    """
    if download:
        directory = download_adapter(str(directory), revision, subfolder, caller="load_adapter")
    elif revision is not None:
        raise ValueError(f"load_adapter: revision is {revision!r}, but nothing is downloaded; set download=True")
    if subfolder:
        directory = Path(directory) / subfolder.strip("/")
        if ".." in Path(subfolder).parts:
            raise ValueError(f"load_adapter: subfolder is {subfolder!r}, want one within the directory")
    load_opened(model, read_adapter(directory, "load_adapter"), trainable, adapter_name, activate)
    if not trainable:
        eval_unless_training(model)
    return model


def read_adapter(directory: str | os.PathLike[str], caller: str) -> AdapterFile:
    """Reads an adapter's files for a model: in the model's form of packed projections, and with positive alphas."""
    return with_positive_alphas(from_peft_form(AdapterFile.open(directory, caller=caller), caller), caller)


def with_positive_alphas(file: AdapterFile, caller: str) -> AdapterFile:
    """Moves the sign of negative alphas, which old files have and the ops do not, into the factors ``lora_B``."""
    alpha, patterns = file.config.get("lora_alpha"), file.config.get("alpha_pattern")
    alphas = [alpha, *(patterns.values() if isinstance(patterns, dict) else ())]
    negative = [isinstance(value, int | float) and value < 0 for value in alphas]
    if not any(negative):
        return file
    if not all(negative):
        raise ValueError(
            f"{caller}: {file.directory / CONFIG_FILE}: lora_alpha is {shown(alpha)}, alpha_pattern {shown(patterns)}: "
            "negative alphas are read if all are negative; make them positive, and change the signs of the lora_B "
            "instead"
        )
    config = file.config | {"lora_alpha": -alpha}
    if isinstance(patterns, dict):
        config["alpha_pattern"] = {key: -value for key, value in patterns.items()}
    tensors = {
        key: -tensor if ".lora_B." in key or key.endswith(".lora_embedding_B") else tensor
        for key, tensor in file.tensors.items()
    }
    return dataclasses.replace(file, config=config, tensors=tensors)


def eval_unless_training(model: nn.Module) -> None:
    """Puts a model without trainable parameters into eval mode."""
    if not any(parameter.requires_grad for parameter in model.parameters()):
        model.eval()


@one_at_a_time
def load_opened(
    model: nn.Module,
    file: AdapterFile,
    trainable: bool = False,
    adapter_name: str = "default",
    activate: bool = False,
) -> None:
    """Loads what :func:`read_adapter` returned, like :func:`load_adapter`."""
    config = file.lora_config("load_adapter")
    if trainable and str(file.config.get("init_lora_weights")).lower() == "mica":
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
        check_same_kind(adapter, config, file)
        warn_of_a_copy("load_adapter", adapter)
        _fill_checked(model, file, adapter, None, activate)
        return
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
        _fill_checked(model, file, adapter, give_memory, activate)


def warn_of_a_copy(caller: str, adapter: Adapter) -> None:
    """Warns if an optimizer of DeepSpeed (ZeRO-1 or 2) will overwrite values that are put into ``adapter``."""
    if any(hasattr(parameter, "_hp_mapping") for parameter in adapter.parameters()):
        warn_user(
            f"{caller}: DeepSpeed's optimizer has a copy of this adapter, with which its next step overwrites the "
            "loaded values; to train on from them, load before deepspeed.initialize"
        )


def _fill_checked(
    model: nn.Module, file: AdapterFile, adapter: Adapter, give_memory: Callable[[], Adapter] | None, activate: bool
) -> None:
    """Fills ``adapter`` if the file fits; a new one first gets memory, and is then attached."""
    check_expert_layout(adapter, file, "load_adapter")
    unsaved = _unsaved_biases(adapter, file)
    check_fits(_targets(model, adapter, file, unsaved), file)
    if give_memory is not None:
        adapter = give_memory()
    targets = _targets(model, adapter, file, unsaved)
    check_places(targets, file)
    file.warn_of_damage(targets)

    # Nothing below fails: the adapter is filled before it is attached.
    with torch.no_grad():
        for key, target in targets.items():
            _fill(target, file.tensors[key])
        for key, scale in adapter.file_scales().items():
            targets[f"{KEY_PREFIX}{key}"].div_(scale)
        if give_memory is not None:
            apply_injection(model, adapter, activate)
        elif activate:
            adapter.into.switch((adapter.name,))
        if loaded := {key for key in base_tensors(model, adapter) if f"{KEY_PREFIX}{key}" in targets}:
            held = adapter.into.loaded_base
            held[adapter.name] = held.get(adapter.name, frozenset()) | loaded


def _fill(target: Tensor, values: Tensor) -> None:
    """Copies ``values`` into ``target``, or this rank's part of them."""
    if is_sharded(target):
        target, values = local(target), part_like(target, values)
    target.copy_(values)


def _sharded_tensors(adapter: Adapter) -> list[Tensor]:
    """Returns the parameters of an adapter that ZeRO-3 has emptied, or if there are none, its DTensors."""
    elsewhere = [parameter for parameter in adapter.parameters() if is_elsewhere(parameter)]
    return elsewhere or [tensor for tensor in adapter.tensors().values() if is_sharded(tensor)]


def _unsaved_biases(adapter: Adapter, file: AdapterFile) -> set[str]:
    """Returns the keys of the trained biases if the file has none of them, otherwise none."""
    if adapter.biases is None or adapter.config.bias != "lora_only":
        return set()
    biases = set(adapter.biases.file_tensors())
    if any(f"{KEY_PREFIX}{key}" in file.tensors for key in biases):
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
    targets |= {key: tensor for key, tensor in base.items() if f"{KEY_PREFIX}{key}" in file.tensors}
    return {f"{KEY_PREFIX}{key}": tensor for key, tensor in targets.items()}
