"""An adapter of a model in the form of its files, and back.

``enable_lora`` is an option that PEFT does not support. Such an adapter is saved so that PEFT can load it: the stacked
``lora_A`` and the block-diagonal ``lora_B`` of the enabled parts are the factors of one update of the whole layer, of
rank ``r * num_enabled``; ``rank_pattern`` and ``alpha_pattern`` say so. The safetensors metadata hold the original
options, so that the file loads as it was saved. PEFT drops them when it saves the adapter again.
"""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Iterator, Mapping

import torch
from torch import Tensor, nn

from lora_ext._common.printable import shown
from lora_ext._common.sharded import class_of, gathered, whole
from lora_ext._common.wrapped import KEY_PREFIX
from lora_ext._ops.checks import FLOATING
from lora_ext.config import exact_patterns
from lora_ext.files.adapter_file import AdapterFile
from lora_ext.files.misfits import VERSION_KEY, has_present_layout, stacked_experts
from lora_ext.files.reading import parse_json
from lora_ext.model.adapter_set import Adapter, Part
from lora_ext.model.bare_model import root_module
from lora_ext.nn import LoraLayer
from lora_ext.nn.packed_linear import PackedAdapter, gather_blocks, spread_blocks

_METADATA_KEY = "lora_ext"
_RESTORED = ("enable_lora", "rank_pattern", "alpha_pattern")  # config keys that differ in PEFT's form


def adapter_content(model: nn.Module, adapter: Adapter, base: Mapping[str, Tensor]) -> AdapterFile:
    """Returns an adapter's config and copies of its tensors on the CPU, in the form of PEFT's files.

    ``base`` are tensors of base layers, from :func:`~lora_ext.files.base_layers.base_tensors_to_save`. All ranks of a
    sharded model must call it.
    """
    values = adapter.config.to_dict() | {"inference_mode": True}  # as PEFT writes it
    if values["base_model_name_or_path"] is None:
        values["base_model_name_or_path"] = base_name(model)
    if values["task_type"] is None:  # PEFT's AutoPeftModel classes then ask for the base model's class
        kind = class_of(root_module(model))
        values["auto_mapping"] = {"base_model_class": kind.__name__, "parent_library": kind.__module__}
    # Copies, because tied modules share memory and the tensors of a file must not.
    with gathered([*adapter.parameters(), *base.values()]):
        tensors = {
            f"{KEY_PREFIX}{key}": whole(tensor).detach().to("cpu", copy=True, memory_format=torch.contiguous_format)
            for key, tensor in (adapter.tensors() | dict(base)).items()
        }
    for key, scale in adapter.file_scales().items():
        tensors[f"{KEY_PREFIX}{key}"] *= scale
    if any(stacked_experts(adapter)) and not has_present_layout(values.get(VERSION_KEY)):
        values[VERSION_KEY] = "0.19.1"
    return _to_peft_form(adapter, AdapterFile(values, tensors, {"format": "pt"}))


def base_name(model: nn.Module) -> str | None:
    """Returns the name of the base model, if it has one; parts that are not Unicode, as in paths, are escaped."""
    name = getattr(root_module(model), "name_or_path", None)
    return name.encode("utf-8", "backslashreplace").decode() if isinstance(name, str) and name else None


# --- enable_lora ------------------------------------------------------------------------------------------------------


def _to_peft_form(adapter: Adapter, file: AdapterFile) -> AdapterFile:
    if not any(_packed(adapter)):
        return file
    ranks, alphas = {}, {}
    for part in adapter.parts:  # every layer by name: a user's pattern may cover packed ones and others
        if isinstance(part.layer, LoraLayer):
            r = part.adapter.r * sum(getattr(part.adapter, "enable_lora", (True,)))
            ranks[part.target] = r
            alphas[part.target] = part.adapter.scaling * (math.sqrt(r) if file.config["use_rslora"] else r)
    patterns = {
        "rank_pattern": exact_patterns(ranks, file.config["r"]),
        "alpha_pattern": exact_patterns(alphas, file.config["lora_alpha"]),
    }
    blocks = {key: spread_blocks(file.tensors[key], part.adapter.enable_lora) for key, part in _packed(adapter)}
    note = json.dumps({"config": {key: getattr(adapter.config, key) for key in _RESTORED}})
    metadata = file.metadata | {_METADATA_KEY: note}
    return AdapterFile(file.config | patterns, file.tensors | blocks, metadata)


def with_options(file: AdapterFile, caller: str) -> AdapterFile:
    """Gives a file the options that its metadata hold. ValueError: they hold something else."""
    if _METADATA_KEY not in file.metadata:
        return file
    source = f"{caller}: {file.path}: its entry {_METADATA_KEY!r}"
    options = parse_json(file.metadata[_METADATA_KEY], source).get("config")
    if not isinstance(options, dict) or options.keys() != {*_RESTORED}:
        raise ValueError(f"{source} holds the config {shown(options)}, want {', '.join(_RESTORED)}")
    return dataclasses.replace(file, config=file.config | options)


def with_blocks(file: AdapterFile, adapter: Adapter) -> AdapterFile:
    """Gives the tensors of packed projections the model's form. ValueError: they have more than the enabled parts."""
    found = {}
    for key, part in _packed(adapter):
        tensor, enabled = file.tensors.get(key), part.adapter.enable_lora
        shape = (part.layer.out_features, part.adapter.r * sum(enabled))
        if tensor is not None and tensor.shape == shape and tensor.dtype in FLOATING:  # check_fits refuses others
            try:
                found[key] = gather_blocks(tensor, enabled)
            except ValueError as error:
                raise ValueError(f"load_adapter: {file.path}: {key}: {error} {list(enabled)}") from error
    return dataclasses.replace(file, tensors=file.tensors | found)


def _packed(adapter: Adapter) -> Iterator[tuple[str, Part]]:
    """Yields the file's key of ``lora_B`` and the part of each packed projection."""
    for part in adapter.parts:
        if isinstance(part.adapter, PackedAdapter):
            yield f"{KEY_PREFIX}{part.file_path}.lora_B.weight", part
