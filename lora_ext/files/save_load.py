"""Saves adapters of a model as PEFT's files, and loads them.

Keys are ``base_model.model.`` and the names of each layer's ``file_tensors``, such as ``<path>.lora_A.weight``.
"""

from __future__ import annotations

import dataclasses
import os
from typing import TypeVar

import torch
from torch import Tensor, nn

from lora_ext._common.arguments import checked
from lora_ext._common.changes import one_at_a_time
from lora_ext._common.sharded import (
    first_rank_writes,
    is_elsewhere,
    is_sharded,
    local,
    part_like,
    prepare_shards,
)
from lora_ext._ops.checks import FLOATING
from lora_ext.files.adapter_content import SaveEmbeddings, adapter_content
from lora_ext.files.adapter_file import ADAPTER_FILES, CONFIG_FILE, AdapterFile
from lora_ext.files.misfits import check_expert_layout, check_fits, check_places, check_same_kind
from lora_ext.files.normalising import normalised
from lora_ext.files.writing import write_files
from lora_ext.injection.build import give_memory
from lora_ext.injection.inject import Injection, apply_injection, check_unmerged
from lora_ext.model.adapter_set import Adapter, adapter_set, find_adapter, find_adapters
from lora_ext.model.adapter_state import warn_of_lost_parameters
from lora_ext.model.bare_model import check_not_managed, check_not_parallel, root_module
from lora_ext.nn.packed_linear import PackedAdapter, gather_blocks

ModelT = TypeVar("ModelT", bound=nn.Module)


@checked
@one_at_a_time
def save_adapter(
    model: nn.Module,
    directory: str | os.PathLike[str],
    adapter_name: str | None = None,
    *,
    save_embedding_layers: SaveEmbeddings = "auto",
    normalise: bool = False,
) -> None:
    """Saves an adapter of an injected ``model`` to ``directory``, where PEFT's ``from_pretrained`` can read it.

    Replaces an adapter in it and keeps other files. Each file appears whole, the config last. All ranks of a sharded
    model (FSDP2, ZeRO-3) must call it: they gather the factors, and the first one writes.

    Args:
        adapter_name: the adapter to save; None: the active one, if no other one trains.
        save_embedding_layers: whether to save the base model's input embedding and output head, too. "auto": if the
            vocabulary was resized, as in PEFT by the config of the model's ``name_or_path``. Unless it is False, base
            layers that were loaded with the adapter are saved again.
        normalise: fold ``lora_alpha``, rsLoRA, and the patterns of ranks and alphas into the factors, for engines that
            read less of a config than PEFT: the file has one rank, and ``lora_alpha`` is that rank. It computes the
            same, up to one rounding of ``lora_B``; it is for inference, as training on would take other steps.

    Warns:
        UserWarning: the vocabulary was resized; or parameters require gradients that the file does not hold.

    Raises:
        ValueError: the model is not injected; or ``adapter_name`` is None and it is not clear which adapter is meant.
        KeyError: there is no such adapter; the message lists the existing ones.
        OSError: the directory cannot be written; its content is unchanged.
        RuntimeError: another rank could not write; or a base layer to save contains a merged adapter.
    """
    prepare_shards("save_adapter", model)
    if adapter_name is None:
        _check_active_trains(model)
    adapter = find_adapter(model, "save_adapter", adapter_name)
    content, base = adapter_content("save_adapter", model, adapter, save_embedding_layers)
    if normalise:
        content = normalised(content, caller="save_adapter")
    warn_of_lost_parameters("save_adapter", root_module(model), saved=base)
    # Ranks agree by the parameters that ZeRO-3 has emptied, or if there are none, by the DTensors.
    elsewhere = [parameter for parameter in adapter.parameters() if is_elsewhere(parameter)]
    sharded = elsewhere or [tensor for tensor in adapter.tensors().values() if is_sharded(tensor)]
    with first_rank_writes(sharded) as writes:
        if writes:
            with write_files(directory, ADAPTER_FILES, "save_adapter") as staging:
                content.write(staging)


def _check_active_trains(model: nn.Module) -> None:
    """Checks that no other adapter than the active one trains. ValueError: one does."""
    adapters = find_adapters(model, "save_adapter")
    training = {name for name in adapters.configs if not adapters.is_frozen(name)}
    if len(adapters.configs) > 1 and training != {*adapters.active.names}:
        raise ValueError(
            f"save_adapter: the adapters {sorted(training)} train and {sorted(adapters.active.names)} are active; name "
            "the one to save: save_adapter(model, directory, adapter_name)"
        )


@checked
def load_adapter(
    model: ModelT,
    directory: str | os.PathLike[str],
    trainable: bool = False,
    adapter_name: str = "default",
    *,
    activate: bool = False,
) -> ModelT:
    """Loads an adapter, saved by :func:`save_adapter` or PEFT, into ``model`` under a name.

    A bare model is injected with the file's config. An injected model gets the adapter in addition, and as in PEFT its
    active adapters stay active and keep training; if it has an adapter of that name, its values are replaced, in place.
    Base layers in the file are loaded too, and saved again with the adapter. Values are cast to the dtype of the
    parameters that they fill. A model in which nothing trains afterwards is put into eval mode.

    Args:
        directory: of the two files. ``save_pretrained`` puts adapters with other names than "default" into subfolders.
        trainable: whether the adapter requires gradients. An adapter whose values are replaced keeps its flags.
        adapter_name: name of the adapter in the model.
        activate: makes it the active adapter, as :func:`lora_ext.set_adapter` does; the first one is in any case.

    Returns:
        ``model``, the same object.

    Raises:
        FileNotFoundError: a file is missing; the message names it.
        OSError: a file cannot be read.
        ValueError: a file is corrupted; its config is not supported or differs from that of the adapter to replace; or
            its tensors do not fit the model: the message lists missing and unexpected keys, wrong shapes and dtypes.
            No memory is allocated for the adapter before this check. Or a further adapter is ``trainable`` without
            ``activate``: an adapter trains while it is active.
        RuntimeError: an adapter is merged.
        Also the errors of :func:`lora_ext.inject`. After an error the model is unchanged.
    """
    load_opened(model, AdapterFile.open(directory, caller="load_adapter"), trainable, adapter_name, activate)
    if not trainable:
        eval_unless_training(model)
    return model


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
    """Loads an opened file, like :func:`load_adapter`."""
    config = file.lora_config("load_adapter", own=True)
    if trainable and str(file.config.get("init_lora_weights")).lower() == "mica":
        raise ValueError(
            f'load_adapter: {file.directory / CONFIG_FILE}: init_lora_weights is "mica", with which PEFT trains lora_A '
            'only; here both factors would be trained: if they may, set "init_lora_weights": true'
        )
    check_not_managed("load_adapter", model, "load before deepspeed.initialize (before Trainer.train)")
    prepare_shards("load_adapter", model)
    check_unmerged("load_adapter", model)
    adapters = adapter_set(model)
    if adapters is not None and adapter_name in adapters.configs:
        if activate:
            check_not_parallel("load_adapter", model)
            adapters.check_enabled("load_adapter")
        adapter = find_adapter(model, "load_adapter", adapter_name)
        check_same_kind(adapter, config, file)
        _fill_checked(model, file, adapter, False, activate)
        return
    activate = activate or adapters is None or not adapters.configs
    if trainable and not activate:
        raise ValueError(
            f"load_adapter: trainable is True, but {list(adapters.active.names)} would stay active, and "
            f"{adapter_name!r} would not train; pass activate=True, or trainable=False and later call "
            f"set_adapter(model, {adapter_name!r}, trainable=True)"
        )
    config = dataclasses.replace(config, inference_mode=not trainable)
    try:
        injection = Injection(model, config, adapter_name)
    except (TypeError, ValueError) as error:
        kind = TypeError if isinstance(error, TypeError) else ValueError
        raise kind(f"load_adapter: {file.directory / CONFIG_FILE}: {error}") from error
    with injection.values_gathered():
        adapter = injection.build(torch.device("meta"))  # memory comes after the file's shapes have been checked
        _fill_checked(model, file, adapter, True, activate)


def _fill_checked(model: nn.Module, file: AdapterFile, adapter: Adapter, is_new: bool, activate: bool) -> None:
    """Fills ``adapter`` if the file fits; a new one first gets memory, and is then attached."""
    file = dataclasses.replace(file, tensors=file.tensors | _blocks(file, adapter))
    check_expert_layout(adapter, file)
    check_fits(_targets(model, adapter, file), file)
    if is_new:
        give_memory(adapter)
    targets = _targets(model, adapter, file)
    check_places(targets, file)

    # Nothing below fails: the adapter is filled before it is attached.
    with torch.no_grad():
        for key, target in targets.items():
            values = file.tensors[key]
            local(target).copy_(part_like(target, values) if is_sharded(target) else values)
        for key, scale in adapter.file_scales().items():
            targets[key].div_(scale)
        if is_new:
            apply_injection(model, adapter, activate)
        elif activate:
            adapter.into.switch((adapter.name,))
        if loaded := targets.keys() & adapter.base_tensors(root_module(model)).keys():
            held = adapter.into.loaded_base
            held[adapter.name] = held.get(adapter.name, frozenset()) | loaded


def _targets(model: nn.Module, adapter: Adapter, file: AdapterFile) -> dict[str, Tensor]:
    """Returns the tensors of the model that the file should fill, by the file's keys."""
    base = adapter.base_tensors(root_module(model))
    return adapter.tensors() | {key: tensor for key, tensor in base.items() if key in file.tensors}


def _blocks(file: AdapterFile, adapter: Adapter) -> dict[str, Tensor]:
    """Returns the model's form of ``lora_B`` of packed projections. ValueError: it has more than the enabled parts."""
    found = {}
    for part in (part for part in adapter.parts if isinstance(part.adapter, PackedAdapter)):
        key, enabled = f"{part.file_path}.lora_B.weight", part.adapter.enable_lora
        tensor = file.tensors.get(key)
        shape = (part.layer.out_features, part.adapter.r * sum(enabled))
        if tensor is not None and tensor.shape == shape and tensor.dtype in FLOATING:  # check_fits refuses others
            try:
                found[key] = gather_blocks(tensor, enabled)
            except ValueError as error:
                raise ValueError(f"load_adapter: {file.path}: {key}: {error} {list(enabled)}") from error
    return found
