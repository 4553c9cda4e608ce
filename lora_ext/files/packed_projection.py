"""Files of adapters with ``enable_lora``, an option that PEFT does not support, in a form that PEFT can load.

The stacked ``lora_A`` and the block-diagonal ``lora_B`` of the enabled parts are the factors of one update of the whole
layer, of rank ``r * num_enabled``; ``rank_pattern`` and ``alpha_pattern`` say so. The safetensors metadata, under the
key ``lora_ext``, hold the original options, so that the file loads as it was saved. PEFT drops them when it saves the
adapter again; the off-diagonal blocks may then be nonzero.
"""

from __future__ import annotations

import dataclasses
import json
import math
from typing import Any

from torch import Tensor

from lora_ext._common.printable import shown
from lora_ext._common.wrapped import KEY_PREFIX
from lora_ext._ops.checks import FLOATING
from lora_ext.config import exact_patterns
from lora_ext.files.adapter_file import AdapterFile
from lora_ext.files.reading import LARGEST_CONFIG, parse_json
from lora_ext.model.adapter_set import Adapter
from lora_ext.nn import LoraLayer
from lora_ext.nn.packed_linear import PackedAdapter, gather_blocks, spread_blocks

_METADATA_KEY = "lora_ext"
_RESTORED = ("enable_lora", "rank_pattern", "alpha_pattern")  # config keys that differ in PEFT's form


def to_peft_form(
    adapter: Adapter, values: dict[str, Any], tensors: dict[str, Tensor]
) -> tuple[dict[str, Any], dict[str, Tensor], dict[str, str]]:
    """Converts ``values``, the content of ``adapter_config.json``, and a file's tensors to the form that PEFT reads.

    Returns config, tensors, and the file's metadata; without packed projections the arguments and empty metadata.
    """
    if not any(isinstance(part.adapter, PackedAdapter) for part in adapter.parts):
        return values, tensors, {}
    tensors, ranks, alphas, blocks = dict(tensors), {}, {}, {}
    for part in adapter.parts:
        if isinstance(part.layer, LoraLayer):  # every layer by name: a user's pattern may cover packed ones and others
            layer_adapter, path = part.adapter, part.target
            is_packed = isinstance(layer_adapter, PackedAdapter)
            enabled = layer_adapter.enable_lora if is_packed else (True,)
            ranks[path] = layer_adapter.r * sum(enabled)
            alphas[path] = layer_adapter.scaling * (math.sqrt(ranks[path]) if values["use_rslora"] else ranks[path])
            for key, tensor in part.layer.file_tensors(part.file_path, layer_adapter).items():
                if is_packed and tensor is layer_adapter.lora_B:
                    file_key = f"{KEY_PREFIX}{key}"
                    blocks[file_key] = list(enabled)
                    tensors[file_key] = spread_blocks(tensors[file_key], enabled)
    note = {"blocks": blocks, "config": {key: _plain(getattr(adapter.config, key)) for key in _RESTORED}}
    patterns = {
        "rank_pattern": exact_patterns(ranks, values["r"]),
        "alpha_pattern": exact_patterns(alphas, values["lora_alpha"]),
    }
    return values | patterns, tensors, {_METADATA_KEY: json.dumps(note)}


def from_peft_form(file: AdapterFile, caller: str) -> AdapterFile:
    """Undoes :func:`to_peft_form`; returns other files unchanged. ValueError: the metadata do not match the file."""
    if _METADATA_KEY not in file.metadata:
        return file
    prefix = f"{caller}: {file.path}: its metadata {_METADATA_KEY!r}"
    text = file.metadata[_METADATA_KEY]
    if len(text) > LARGEST_CONFIG:
        raise ValueError(f"{prefix} have {len(text)} characters, want at most {LARGEST_CONFIG}")
    note = parse_json(text, prefix)
    blocks, config = note.get("blocks"), note.get("config")
    if not isinstance(blocks, dict) or not isinstance(config, dict) or not set(_RESTORED) <= config.keys():
        raise ValueError(f"{prefix} do not match it: blocks or config are missing")
    try:
        gathered = {key: _gathered(file, key, enabled) for key, enabled in blocks.items()}
    except ValueError as error:
        raise ValueError(f"{prefix} do not match it: {error}") from error
    config = file.config | {key: config[key] for key in _RESTORED}
    return dataclasses.replace(file, config=config, tensors=file.tensors | gathered)


def _gathered(file: AdapterFile, key: str, enabled: Any) -> Tensor:
    """Returns the blocks of a block-diagonal tensor. ValueError: ``enabled`` does not describe it."""
    if key not in file.tensors:
        raise ValueError(f"the file has no tensor {shown(key)}")
    if not isinstance(enabled, list) or not all(isinstance(on, bool) for on in enabled) or not any(enabled):
        raise ValueError(f"the blocks of {key} are {shown(enabled)}, want bools, at least one of them true")
    tensor, shape = file.tensors[key], file.tensors[key].shape
    fits = len(shape) == 2 and 0 not in shape and shape[0] % len(enabled) == 0 == shape[1] % sum(enabled)
    if not fits or tensor.dtype not in FLOATING:
        raise ValueError(f"{key} ({tensor.dtype}) has shape {list(shape)}, which has no blocks {shown(enabled)}")
    try:
        return gather_blocks(tensor, enabled)
    except ValueError as error:
        raise ValueError(f"{key}: {error} {shown(enabled)}") from error


def _plain(value: Any) -> Any:
    return {key: list(v) if isinstance(v, tuple) else v for key, v in value.items()} if value else value
