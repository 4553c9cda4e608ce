"""Saves adapters of a model as PEFT's files, and loads them.

Keys are ``base_model.model.`` and the names of each layer's ``file_tensors``, such as ``<path>.lora_A.weight``.

``enable_lora`` is an option that PEFT does not support. Such an adapter is saved so that PEFT can load it: the stacked
``lora_A`` and the block-diagonal ``lora_B`` of the enabled parts are the factors of one update of the whole layer, of
rank ``r * num_enabled``; ``rank_pattern`` and ``alpha_pattern`` say so. The safetensors metadata hold the original
options, so that the file loads as it was saved. PEFT drops them when it saves the adapter again.
"""

from __future__ import annotations

import dataclasses
import json
import math
import os
import re
from collections.abc import Iterator, Mapping
from typing import Any, Literal, TypeVar

import torch
from torch import Tensor, nn

from lora_ext._common.arguments import checked
from lora_ext._common.changes import one_at_a_time
from lora_ext._common.messages import listed, shown, warn_user
from lora_ext._common.modules import KEY_PREFIX
from lora_ext._common.sharded import (
    class_of,
    first_rank_writes,
    gathered,
    is_elsewhere,
    is_sharded,
    local,
    part_like,
    prepare_shards,
    whole,
)
from lora_ext._ops.checks import FLOATING
from lora_ext.config import LoraConfig, exact_patterns
from lora_ext.files.adapter_file import (
    ADAPTER_FILES,
    CONFIG_FILE,
    OWN_KEY,
    OWN_OPTIONS,
    AdapterFile,
    is_duplicate,
    misfits,
)
from lora_ext.files.normalising import normalised
from lora_ext.files.writing import write_files
from lora_ext.injection.build import Injection, give_memory
from lora_ext.injection.inject import apply_injection
from lora_ext.model.adapter_set import Adapter, Part, adapter_set, check_unmerged, find_adapter, find_adapters
from lora_ext.model.adapter_state import warn_of_lost_parameters
from lora_ext.model.bare_model import BareModel, check_not_managed, check_not_parallel, root_module
from lora_ext.nn import LoraLayer
from lora_ext.nn.packed_linear import PackedAdapter, gather_blocks, spread_blocks
from lora_ext.nn.parameter import LoraParameter

ModelT = TypeVar("ModelT", bound=nn.Module)
SaveEmbeddings = bool | Literal["auto"]

_VERSION_KEY = "peft_version"
_NOT_IN_SHAPES = (
    *("r", "lora_alpha", "use_rslora", "use_dora", "rank_pattern", "alpha_pattern", "enable_lora"),
    "trainable_token_indices",
)


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
        ValueError: a file is corrupted, its config is not supported, or they do not fit the model or the adapter to
            replace (the message lists what), before memory is allocated for the adapter; or a further adapter is
            ``trainable`` without ``activate``: an adapter trains while it is active.
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
        _check_same_kind(adapter, config, file)
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
    _refuse([*_exchanged_experts(adapter, file), *_misfits(_targets(model, adapter, file), file)], file)
    if is_new:
        give_memory(adapter)
    targets = _targets(model, adapter, file)
    _refuse(_wrong_places(targets, file), file)

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
        if tensor is not None and tensor.shape == shape and tensor.dtype in FLOATING:  # _misfits refuses others
            try:
                found[key] = gather_blocks(tensor, enabled)
            except ValueError as error:
                raise ValueError(f"load_adapter: {file.path}: {key}: {error} {list(enabled)}") from error
    return found


# --- what does not fit ------------------------------------------------------------------------------------------------


def _check_same_kind(adapter: Adapter, config: LoraConfig, file: AdapterFile) -> None:
    """Compares the options that tensor shapes do not show. ValueError: one differs."""
    for key in _NOT_IN_SHAPES:
        in_model, in_file = getattr(adapter.config, key), getattr(config, key)
        if in_model != in_file:
            raise ValueError(
                f"load_adapter: {file.directory} has {key}={shown(in_file)} but the model was injected with "
                f"{key}={shown(in_model)}; inject with the same config, or load under another adapter_name"
            )


def _refuse(problems: list[str], file: AdapterFile) -> None:
    if problems:
        raise ValueError(f"load_adapter: {file.path} does not fit the model:{listed(problems)}")


def _misfits(targets: Mapping[str, Tensor], file: AdapterFile) -> list[str]:
    """Compares keys, shapes and dtypes of ``targets`` with the file's."""
    tensors = {key: tensor for key, tensor in file.tensors.items() if key in targets or not is_duplicate(key)}
    problems = misfits(targets, tensors)
    if targets.keys().isdisjoint(tensors):
        problems.insert(
            0,
            "all layers have other names: the file is of another model, of a part of it (load it into that), or of "
            "another Transformers, as with one adapter for each expert. PEFT converts some of these: "
            "PeftModel.from_pretrained(model, directory).save_pretrained(another)",
        )
    return problems


def _wrong_places(targets: Mapping[str, Tensor], file: AdapterFile) -> list[str]:
    """Describes targets without memory, and those that share memory and would get different values."""
    problems = []
    filled: dict[tuple[torch.device, int], str] = {}
    for key, target in targets.items():
        if target.is_meta:
            problems.append(f"device of {key}: the model is on the meta device; give it memory (to_empty) first")
        elif target.numel() and not is_sharded(target):  # a tied DTensor gets the same values twice
            twin = filled.setdefault((target.device, target.data_ptr()), key)
            if twin != key and not torch.equal(file.tensors[twin], file.tensors[key]):
                problems.append(f"values of {key}: tied to {twin} in the model, but they differ in the file")
    return problems


def _exchanged_experts(adapter: Adapter, file: AdapterFile) -> Iterator[str]:
    """Describes square experts in ``file`` that may have the layout of an old PEFT.

    Stacked experts have ``lora_A [r * num_experts, in_features]`` and ``lora_B [out_features, r * num_experts]``. PEFT
    before 0.19.1 exchanged the two sizes for some parameters. Then the shapes do not fit, except those of squares.
    """
    version = file.config.get(_VERSION_KEY)
    for part in () if _has_present_layout(version) else _stacked_experts(adapter):
        key = f"{part.file_path}.lora_A.weight"
        if key in file.tensors and part.adapter.lora_A.shape[1] == part.adapter.lora_B.shape[0]:
            yield (
                f"{key} is of square experts, whose factors PEFT exchanged before 0.19.1; {_VERSION_KEY} in "
                f'{CONFIG_FILE} is {shown(version)}: merge it with that PEFT, or set "0.19.1" if a later one saved it'
            )


def _stacked_experts(adapter: Adapter) -> Iterator[Part]:
    """Yields the parts of an adapter that adapt a parameter ``[num_experts, ...]``."""
    return (part for part in adapter.parts if isinstance(part.layer, LoraParameter) and part.layer.weight.dim() == 3)


def _has_present_layout(version: object) -> bool:
    """Returns whether ``version`` is a release of PEFT, from 0.19.1 on."""
    found = re.match(r"(\d{1,9})\.(\d{1,9})\.(\d{1,9})(?!\.?(dev|rc|a|b))", str(version))
    return found is not None and tuple(map(int, found.groups()[:3])) >= (0, 19, 1)


# --- the content of the files -----------------------------------------------------------------------------------------


def adapter_content(
    caller: str, model: nn.Module, adapter: Adapter, save_embedding_layers: SaveEmbeddings = "auto"
) -> tuple[AdapterFile, list[Tensor]]:
    """Returns what the files of an adapter hold, and the live tensors of base layers among it.

    All ranks of a sharded model must call it.

    RuntimeError: an adapter is merged into a base layer that belongs into the file, or that is offloaded.
    """
    values = adapter.config.to_dict() | {"inference_mode": True}  # as PEFT writes it
    if values["base_model_name_or_path"] is None:
        values["base_model_name_or_path"] = base_name(model)
    if values["task_type"] is None:  # PEFT's AutoPeftModel classes then ask for the base model's class
        kind = class_of(root_module(model))
        values["auto_mapping"] = {"base_model_class": kind.__name__, "parent_library": kind.__module__}
    if any(_stacked_experts(adapter)) and not _has_present_layout(values.get(_VERSION_KEY)):
        values[_VERSION_KEY] = "0.19.1"
    with gathered(adapter.parameters()):
        base = _base_tensors(caller, root_module(model), adapter, save_embedding_layers)
        # Copies, because tied modules share memory and the tensors of a file must not.
        with gathered(base.values()):
            tensors = {
                key: whole(tensor).detach().to("cpu", copy=True, memory_format=torch.contiguous_format)
                for key, tensor in (adapter.tensors() | base).items()
            }
    for key, scale in adapter.file_scales().items():
        tensors[key] *= scale
    metadata = _to_peft_form(adapter, values, tensors)
    return AdapterFile(values, tensors, metadata), [*base.values()]


def base_name(model: nn.Module) -> str | None:
    """Returns the name of the base model, if it has one; parts that are not Unicode, as in paths, are escaped."""
    name = getattr(root_module(model), "name_or_path", None)
    return name.encode("utf-8", "backslashreplace").decode() if isinstance(name, str) and name else None


# --- enable_lora ------------------------------------------------------------------------------------------------------


def _to_peft_form(adapter: Adapter, config: dict[str, Any], tensors: dict[str, Tensor]) -> dict[str, str]:
    """Changes the config and the tensors of an adapter with packed projections; returns the file's metadata."""
    metadata = {"format": "pt"}
    packed = [part for part in adapter.parts if isinstance(part.adapter, PackedAdapter)]
    if not packed:
        return metadata
    ranks, alphas = {}, {}
    for part in adapter.parts:  # every layer by name: a user's pattern may cover packed ones and others
        if isinstance(part.layer, LoraLayer):
            r = part.adapter.r * sum(getattr(part.adapter, "enable_lora", (True,)))
            ranks[part.target] = r
            alphas[part.target] = part.adapter.scaling * (math.sqrt(r) if config["use_rslora"] else r)
    config["rank_pattern"] = exact_patterns(ranks, config["r"])
    config["alpha_pattern"] = exact_patterns(alphas, config["lora_alpha"])
    for key, part in ((f"{part.file_path}.lora_B.weight", part) for part in packed):
        tensors[key] = spread_blocks(tensors[key], part.adapter.enable_lora)
    metadata[OWN_KEY] = json.dumps({"config": {key: getattr(adapter.config, key) for key in OWN_OPTIONS}})
    return metadata


# --- base layers ------------------------------------------------------------------------------------------------------


def _base_tensors(
    caller: str, root: nn.Module, adapter: Adapter, save_embedding_layers: SaveEmbeddings
) -> dict[str, Tensor]:
    """Returns the tensors of base layers that belong into a file of ``adapter``, by their keys."""
    if save_embedding_layers is False:
        return {}
    tensors, bare = adapter.base_tensors(root), BareModel(root)
    wanted = tensors.keys() & adapter.into.loaded_base.get(adapter.name, ())
    resized = _resizing(bare.root) if save_embedding_layers == "auto" else ""
    if resized or save_embedding_layers is True:
        modules = [module for module in (bare.embedding, bare.head) if module is not None]
        vocabulary = {id(tensor) for module in modules for tensor in module.state_dict(keep_vars=True).values()}
        wanted |= {key for key, tensor in tensors.items() if id(tensor) in vocabulary}
    if resized and wanted:
        warn_user(
            f"{caller}: {resized}, so the file holds the embedding and the output head, too; "
            "save_adapter(..., save_embedding_layers=False) leaves them out"
        )
    merged = [path for path, around in bare.layers.items() for layer in around if getattr(layer, "is_merged", False)]
    for key in sorted(wanted):
        if any(key.startswith(f"{KEY_PREFIX}{path}.") for path in merged) or tensors[key].is_meta:
            raise RuntimeError(
                f"{caller}: the file holds {key!r} of the base, which contains a merged adapter or is offloaded; call "
                "unmerge(model), or keep the layer on a device"
            )
    return {key: tensors[key] for key in sorted(wanted)}


def _resizing(root: nn.Module) -> str:
    """Compares the vocabulary's size with that in the base model's config; "" if it is the same or unknown."""
    config, name = getattr(root, "config", None), getattr(root, "name_or_path", None)
    kind, now = type(config), _vocabulary(config)
    if not name or now is None:
        return ""
    try:
        values, _ = kind.get_config_dict(name, local_files_only=True)  # never asks the network
        # A directory without a config (of a GGUF file) has no values, which would become the defaults.
        before = _vocabulary(kind.from_pretrained(name, local_files_only=True)) if values else None
    except Exception:  # not of Transformers, no such directory, or a config that this class refuses in a way of its own
        return ""
    if before is None or before == now:
        return ""
    return f"the vocabulary of {shown(name)} was resized ({before:,} -> {now:,})"


def _vocabulary(config: Any) -> int | None:
    text = config.get_text_config() if hasattr(config, "get_text_config") else config
    size = getattr(text, "vocab_size", None)
    return size if isinstance(size, int) else None
