"""Adapter files in PEFT's format: ``adapter_config.json`` and ``adapter_model.safetensors`` in a directory.

Keys are ``base_model.model.<path>.lora_A.weight`` and ``.lora_B.weight`` for the factors of a linear layer, those of
``file_tensors`` of its class for another layer, and ``base_model.model.<path>.<name>`` for the parameters and buffers
of a module trained in full. lora_ext/files/adapter_file.py reads them.
"""

from __future__ import annotations

import dataclasses
import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import TypeVar

import torch
from torch import Tensor, nn

from lora_ext._common.arguments import checked
from lora_ext._common.changes import changing, one_at_a_time
from lora_ext._common.printable import listed, shown
from lora_ext._common.warnings import warn_user
from lora_ext.adapters.adapter_set import Adapter, adapter_set, find_adapter
from lora_ext.config import LoraConfig
from lora_ext.files.adapter_file import CONFIG_FILE, KEY_PREFIX, WEIGHTS_FILE, AdapterFile, TensorFile
from lora_ext.files.packed_projection import as_peft_has_it, as_we_have_it
from lora_ext.files.staged_files import staged_files, write_tensors
from lora_ext.injection.bare_model import BareModel, root_module
from lora_ext.injection.inject import Injection, apply_injection, lora_modules

ModelT = TypeVar("ModelT", bound=nn.Module)


@checked
@one_at_a_time
def save_adapter(model: nn.Module, directory: str | os.PathLike[str], adapter_name: str | None = None) -> None:
    """Writes an adapter of an injected ``model`` into ``directory``, which PEFT's ``from_pretrained`` reads.

    The directory is made if need be; an adapter in it is replaced, other files stay. At any moment a reader finds the
    old adapter or the new one, whole: :func:`~lora_ext.files.staged_files.staged_files` says how, and on which file systems.
    An error leaves the old one. A process that is killed leaves a directory ``.lora_ext-saving`` behind, which the next
    save removes, and through which ``adapter_config.json`` and ``adapter_model.safetensors`` may lead till then.

    Args:
        model: was injected.
        directory: where to.
        adapter_name: which adapter; None: the active one.

    Raises:
        ValueError: the model is not injected, or without a name, not just one adapter is active.
        KeyError: there is no such adapter; the message lists them.
        OSError: the directory cannot be written; what was there is untouched.
    """
    adapter = find_adapter(model, "save_adapter", adapter_name)
    content = file_content(model, adapter)
    with staged_files(Path(directory), ADAPTER_FILES, "save_adapter") as staging:
        write_content(staging, content)


@checked
@one_at_a_time
def load_adapter(
    model: ModelT,
    directory: str | os.PathLike[str],
    trainable: bool = False,
    adapter_name: str = "default",
    *,
    allow_pickle: bool = False,
) -> ModelT:
    """Loads an adapter that :func:`save_adapter` or PEFT wrote, under a name.

    A bare model is injected by the file's config; to an injected one the adapter is added, and is then the active one.
    If the model has an adapter of that name, its values are replaced in place, and nothing else changes.

    The file is mapped, and each tensor read as it is copied. Values are cast to the dtype of the parameters they go to.
    Base layers are overwritten too where the file has them, as PEFT's have those of adapted or resized embeddings.

    Args:
        model: any module.
        directory: holds ``adapter_config.json`` and ``adapter_model.safetensors``.
        trainable: the adapter requires gradients. An adapter whose values are replaced keeps its flags.
        adapter_name: what to call it in the model.
        allow_pickle: load ``adapter_model.bin`` where there is no safetensors file. Only tensors are unpickled.

    Returns:
        ``model``, the same object.

    Raises:
        FileNotFoundError: naming the file that is missing.
        ValueError: a file is corrupted, its config is not supported or differs from that of the adapter it is to
            replace, or its tensors do not fit the model: missing and unexpected keys, wrong shapes and wrong dtypes are
            listed. No memory is taken before for what the config asks for.
        RuntimeError: an adapter is merged.
        Also what :func:`lora_ext.inject` raises. The model is then unchanged.
    """
    file = AdapterFile.open(directory, allow_pickle=allow_pickle, caller="load_adapter")
    load_opened(model, as_we_have_it(file, "load_adapter"), trainable, adapter_name)
    return model


def load_opened(model: nn.Module, file: AdapterFile, trainable: bool = False, adapter_name: str = "default") -> None:
    """As :func:`load_adapter`, of a file as :func:`~lora_ext.files.packed_projection.as_we_have_it` returns it."""
    config = config_of(file, "load_adapter")
    merged = [path for path, layer in lora_modules(model) if layer.is_merged]
    if merged:
        raise RuntimeError(f"load_adapter: an adapter is merged into {merged[0]!r}; call unmerge(model) first")
    adapters = adapter_set(model)
    replaces = adapters is not None and adapter_name in adapters.configs
    if replaces:
        adapter = find_adapter(model, "load_adapter", adapter_name)
        _check_same_kind(adapter, config, file.directory)
    else:
        injection = Injection(model, dataclasses.replace(config, inference_mode=not trainable), adapter_name)
        # What the config asks for takes memory only once the file's shapes are found to be the same.
        adapter, give_memory = injection.build_without_memory()
    unsaved = _unsaved_biases(adapter, file)
    _check_shapes(_targets(model, adapter, file, unsaved), file)
    if not replaces:
        adapter = give_memory()
    targets = _targets(model, adapter, file, unsaved)
    _check_places(targets, file)

    # Nothing below fails, and Ctrl-C waits: the adapter's tensors are filled before it is attached.
    with torch.no_grad(), changing(adapter.into.active):
        for key, target in targets.items():
            target.copy_(file.tensor(key))
        for key, scale in adapter.file_scales().items():
            targets[f"{KEY_PREFIX}{key}"].div_(scale)
        if not replaces:
            apply_injection(model, adapter)


def config_of(file: AdapterFile, caller: str) -> LoraConfig:
    """The file's config; ValueError: it is not supported, or wrong."""
    try:
        return LoraConfig.from_dict(file.config)
    except (TypeError, ValueError) as error:
        raise ValueError(f"{caller}: {file.directory / CONFIG_FILE}: {error}") from error


def _unsaved_biases(adapter: Adapter, file: AdapterFile) -> set[str]:
    """Keys of trained biases, none of which the file has."""
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
    """The tensors of the model that the file fills, by the file's keys; unless it lacks some."""
    targets = {key: tensor for key, tensor in adapter.tensors().items() if key not in unsaved}
    bare = BareModel(root_module(model))
    base = adapter.base_tensors()
    for path, module in bare.modules.items():
        if module is bare.embedding or module is bare.head:
            base |= {f"{path}.{name}": tensor for name, tensor in module.state_dict().items()}
    targets |= {key: tensor for key, tensor in base.items() if f"{KEY_PREFIX}{key}" in file and key not in targets}
    return {f"{KEY_PREFIX}{key}": tensor for key, tensor in targets.items()}


# --- writing ----------------------------------------------------------------------------------------------------------


ADAPTER_FILES = (WEIGHTS_FILE, CONFIG_FILE)
"""For :func:`~lora_ext.files.staged_files.staged_files`: without the config there is no adapter."""


@dataclasses.dataclass(frozen=True)
class FileContent:
    """What :data:`ADAPTER_FILES` hold: the text of the config, and tensors and metadata."""

    config: str
    tensors: dict[str, Tensor]
    metadata: dict[str, str]


def file_content(model: nn.Module, adapter: Adapter) -> FileContent:
    """Copies of an adapter's tensors on the CPU, and its config, as PEFT's files have them."""
    values = adapter.config.to_dict() | {"inference_mode": True}  # as PEFT: loading is for inference unless asked
    if values["base_model_name_or_path"] is None:
        values["base_model_name_or_path"] = base_name(model)
    scales = adapter.file_scales()
    # A copy each: the tensors of a file do not share memory, as tied modules do.
    tensors = {
        f"{KEY_PREFIX}{key}": tensor.detach().to("cpu", copy=True, memory_format=torch.contiguous_format)
        for key, tensor in adapter.tensors().items()
    }
    for key, scale in scales.items():
        tensors[f"{KEY_PREFIX}{key}"] *= scale
    values, tensors, metadata = as_peft_has_it(adapter, values, tensors)
    # Sorted, but not what is inside: of patterns the first that matches counts.
    text = json.dumps({key: values[key] for key in sorted(values)}, indent=2)
    return FileContent(text + "\n", tensors, {"format": "pt", **metadata})


def base_name(model: nn.Module) -> str | None:
    """The name of the base model, for the record; with escapes for what is not Unicode in it, as paths may have."""
    name = getattr(root_module(model), "name_or_path", None)
    return name.encode("utf-8", "backslashreplace").decode() if isinstance(name, str) else None


def write_content(directory: Path, content: FileContent) -> None:
    (directory / CONFIG_FILE).write_text(content.config, encoding="utf-8")
    write_tensors(directory / WEIGHTS_FILE, content.tensors, content.metadata)


# --- what fits --------------------------------------------------------------------------------------------------------


def _check_same_kind(adapter: Adapter, config: LoraConfig, directory: Path) -> None:
    """Rank and layers show in the tensors; scaling, which parts of a weight and the numbers of tokens do not."""
    for key in (
        "r",
        "lora_alpha",
        "use_rslora",
        "rank_pattern",
        "alpha_pattern",
        "enable_lora",
        "trainable_token_indices",
    ):
        ours, theirs = getattr(adapter.config, key), getattr(config, key)
        if ours != theirs:
            raise ValueError(
                f"load_adapter: {directory} has {key}={shown(theirs)} but the model was injected with "
                f"{key}={shown(ours)}; inject with the same config, or load under another adapter_name"
            )


def _check_shapes(targets: Mapping[str, Tensor], file: AdapterFile) -> None:
    """Compares what ``targets`` are with what the file says of its tensors; none is read."""
    keys = [key for key in file.keys() if not key.endswith(_PEFT_DUPLICATES)]  # noqa: SIM118  it is no dict
    problems = [f"missing key: {key}" for key in targets if key not in file]
    problems += [f"unexpected key: {key}" for key in keys if key not in targets]
    problems += misfits(targets, file)
    _raise_misfit(problems, file)


def misfits(targets: Mapping[str, Tensor], file: TensorFile) -> list[str]:
    """Which tensors of the file have another shape or kind of dtype than that of the model, a line each."""
    problems = []
    for key, target in targets.items():
        if key not in file:
            continue
        shape, dtype = file.shape(key), file.dtype(key)
        if shape != tuple(target.shape):
            problems.append(f"shape of {key}: {shown(list(shape))} in the file, {list(target.shape)} in the model")
        if dtype.is_floating_point != target.is_floating_point() or dtype.is_complex:
            problems.append(f"dtype of {key}: {dtype} in the file, {target.dtype} in the model")
    return problems


def _check_places(targets: Mapping[str, Tensor], file: AdapterFile) -> None:
    """Whether the tensors can be filled: they have memory, and what has the same is to get the same values."""
    problems = []
    filled: dict[tuple[torch.device, int], str] = {}
    for key, target in targets.items():
        if target.is_meta:
            problems.append(f"device of {key}: the model is on the meta device; give it memory (to_empty) first")
            continue
        # Tied modules hold one tensor under two keys.
        if not target.numel():
            continue
        twin = filled.setdefault((target.device, target.data_ptr()), key)
        both = (_in_order_of(targets[each], file.tensor(each)) for each in (twin, key))
        if twin != key and not torch.equal(*both):
            problems.append(f"values of {key}: tied to {twin} in the model, but they differ in the file")
    _raise_misfit(problems, file)


def _raise_misfit(problems: list[str], file: AdapterFile) -> None:
    if problems:
        raise ValueError(f"load_adapter: {file.path} does not fit the model:{listed(problems)}")


def _in_order_of(target: Tensor, values: Tensor) -> Tensor:
    """``values`` in the order that they have in the memory of ``target``: that of a tied head is transposed."""
    return values.permute(sorted(range(values.dim()), key=lambda dim: -target.stride(dim))).flatten()


# With bias="all" PEFT also writes the biases of modules_to_save under the names they have inside its wrappers.
_PEFT_DUPLICATES = (".original_module.bias", ".modules_to_save.bias")
