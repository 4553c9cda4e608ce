"""Files of adapters with ``enable_lora``, which PEFT does not know: to it they are ordinary adapters.

The enabled parts' ``lora_A`` one above the other and their ``lora_B`` in block diagonal form are the factors of one
update of the whole layer, of rank ``r * num_enabled``; ``rank_pattern`` and ``alpha_pattern`` say so. The metadata of
the safetensors file, under the key ``lora_ext``, say what it was made from, so that it loads as it was saved. PEFT
leaves those out when it saves an adapter anew, whose blocks then need not be zero any more.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from lora_ext._common.printable import shown
from lora_ext._ops.checks import FLOATING
from lora_ext.adapters.adapter_set import Adapter
from lora_ext.config import exact_patterns
from lora_ext.files.adapter_file import KEY_PREFIX, LARGEST_CONFIG, AdapterFile, Tensors
from lora_ext.files.untrusted_json import parse_json_object
from lora_ext.nn import LoraLayer
from lora_ext.nn.packed_linear import PackedAdapter, gather_blocks, spread_blocks

_METADATA_KEY = "lora_ext"
_RESTORED = ("enable_lora", "rank_pattern", "alpha_pattern")  # keys of the config that PEFT gets to see otherwise


def as_peft_has_it(
    adapter: Adapter, values: dict[str, Any], tensors: dict[str, Tensor]
) -> tuple[dict[str, Any], dict[str, Tensor], dict[str, str]]:
    """What PEFT reads of an adapter, and the metadata of its file.

    Args:
        values: the content of ``adapter_config.json``.
        tensors: by the keys of the file.

    Returns:
        Both of them as PEFT has them, and the metadata; unchanged and empty without packed projections.
    """
    if not any(isinstance(part.adapter, PackedAdapter) for part in adapter.parts):
        return values, tensors, {}
    tensors, ranks, alphas, blocks = dict(tensors), {}, {}, {}
    for part in adapter.parts:
        if isinstance(part.layer, LoraLayer):  # all by name: a pattern of the user's may cover merged ones and others
            own, path = part.adapter, part.target
            enabled = own.enable_lora if isinstance(own, PackedAdapter) else (True,)
            ranks[path] = own.r * sum(enabled)
            alphas[path] = own.scaling * (math.sqrt(ranks[path]) if values["use_rslora"] else ranks[path])
            for key, tensor in part.layer.file_tensors(part.file_path, own).items():
                if isinstance(own, PackedAdapter) and tensor is own.lora_B:
                    whole = f"{KEY_PREFIX}{key}"
                    blocks[whole] = list(enabled)
                    tensors[whole] = spread_blocks(tensors[whole], enabled)
    note = {"blocks": blocks, "config": {key: _plain(getattr(adapter.config, key)) for key in _RESTORED}}
    patterns = {
        "rank_pattern": exact_patterns(ranks, values["r"]),
        "alpha_pattern": exact_patterns(alphas, values["lora_alpha"]),
    }
    return values | patterns, tensors, {_METADATA_KEY: json.dumps(note)}


def as_we_have_it(file: AdapterFile, caller: str) -> AdapterFile:
    """The file as it would be without the detour to PEFT's form; others as they are.

    Raises:
        ValueError: the metadata do not fit the file.
    """
    if _METADATA_KEY not in file.metadata:
        return file
    told = f"{caller}: {file.path}: its metadata {_METADATA_KEY!r}"
    text = file.metadata[_METADATA_KEY]
    if len(text) > LARGEST_CONFIG:
        raise ValueError(f"{told} have {len(text)} characters, want at most {LARGEST_CONFIG}")
    note = parse_json_object(text, told)
    blocks, config = note.get("blocks"), note.get("config")
    if not isinstance(blocks, dict) or not isinstance(config, dict) or not set(_RESTORED) <= config.keys():
        raise ValueError(f"{told} do not fit it: they have no blocks, or not the config")
    try:
        config = file.config | {key: config[key] for key in _RESTORED}
        return AdapterFile(file.directory, config, _Blocks(file.tensors, blocks))
    except ValueError as error:
        raise ValueError(f"{told} do not fit it: {error}") from error


class _Blocks:
    """Tensors of which the block diagonal ones are seen as their blocks."""

    def __init__(self, file: Tensors, blocks: Mapping[str, Any]) -> None:
        """Checks the blocks. ValueError if they do not fit the tensors."""
        self.path = file.path
        self.metadata = file.metadata
        self._file = file
        self._blocks = blocks
        self._shapes = {}
        for key, enabled in blocks.items():
            if key not in file:
                raise ValueError(f"it names {shown(key)}, which is not there")
            shape = file.shape(key)
            if not isinstance(enabled, list) or not all(isinstance(on, bool) for on in enabled) or not any(enabled):
                raise ValueError(f"the blocks of {key} are {shown(enabled)}, want bools, at least one of them true")
            if file.dtype(key) not in FLOATING:
                raise ValueError(f"{key} is {file.dtype(key)}, want one of {', '.join(map(str, FLOATING))}")
            num_enabled = sum(enabled)
            if len(shape) != 2 or 0 in shape or shape[0] % len(enabled) or shape[1] % num_enabled:
                raise ValueError(f"{key} has shape {list(shape)}, not that of blocks {shown(enabled)}")
            rows, cols = shape
            self._shapes[key] = rows // len(enabled) * num_enabled, cols // num_enabled
            try:
                gather_blocks(file.tensor(key), enabled)
            except ValueError as error:
                raise ValueError(f"{key}: {error} {shown(enabled)}") from error

    def keys(self) -> list[str]:
        return self._file.keys()

    def __contains__(self, key: str) -> bool:
        return key in self._file

    def shape(self, key: str) -> tuple[int, ...]:
        return self._shapes.get(key) or self._file.shape(key)

    def dtype(self, key: str) -> torch.dtype:
        return self._file.dtype(key)

    def tensor(self, key: str) -> Tensor:
        tensor = self._file.tensor(key)
        return gather_blocks(tensor, self._blocks[key]) if key in self._blocks else tensor

    def release(self) -> None:
        self._file.release()


def _plain(value: Any) -> Any:
    return {key: list(v) if isinstance(v, tuple) else v for key, v in value.items()} if value else value
