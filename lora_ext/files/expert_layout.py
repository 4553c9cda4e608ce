"""Which of PEFT's two layouts the factors of stacked experts have in a file. Only the present one is read.

It has ``lora_A [r * num_experts, in_features]`` and ``lora_B [out_features, r * num_experts]``. For parameters stored
as ``[num_experts, out_features, in_features]``, PEFT before 0.19.1 took the sizes for the reverse; PEFT 0.19.0 did so
for the others, ``[num_experts, in_features, out_features]``. Then the shapes do not fit, except those of square
matrices, of which ``peft_version`` tells.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Any

from lora_ext._common.printable import shown
from lora_ext._common.wrapped import KEY_PREFIX
from lora_ext.files.adapter_file import CONFIG_FILE, AdapterFile
from lora_ext.model.adapter_set import Adapter, Part
from lora_ext.nn.parameter import LoraParameter

_VERSION, _PRESENT = "peft_version", "0.19.1"


def with_version(adapter: Adapter, values: dict[str, Any]) -> dict[str, Any]:
    """Returns ``values``, the config of a file, with the ``peft_version`` of the layout, if the adapter has experts."""
    if not any(_experts(adapter)) or _parsed(values.get(_VERSION)) >= _parsed(_PRESENT):
        return values
    return values | {_VERSION: _PRESENT}


def check_expert_layout(adapter: Adapter, file: AdapterFile, caller: str) -> None:
    """Checks that no square experts in ``file`` have the layout of an old PEFT. ValueError: some have."""
    version = _parsed(file.config.get(_VERSION))
    for part in _experts(adapter):
        is_present = version >= _parsed(_PRESENT) or (part.layer.stores_transposed and version < (0, 19))
        key = f"{KEY_PREFIX}{part.file_path}.lora_A.weight"
        is_square = part.adapter.lora_A.shape[1] == part.adapter.lora_B.shape[0]
        if is_square and key in file.tensors and not is_present:
            raise ValueError(
                f"{caller}: {file.path}: {key} {list(file.tensors[key].shape)} is of square experts, whose factors "
                f"PEFT before {_PRESENT} exchanged; {_VERSION} in {CONFIG_FILE} is {shown(file.config.get(_VERSION))}: "
                f'merge it with the PEFT that saved it, or set "{_PRESENT}" if a later one did'
            )


def _experts(adapter: Adapter) -> Iterator[Part]:
    return (part for part in adapter.parts if isinstance(part.layer, LoraParameter) and part.layer.weight.dim() == 3)


def _parsed(version: object) -> tuple[int, ...]:
    """Returns three numbers, and 0 for a version before the release, otherwise 1; nothing for anything else."""
    text = version if isinstance(version, str) else ""
    found = re.match(r"(\d{1,9})\.(\d{1,9})\.(\d{1,9})(\.?(?:dev|rc|a|b))?", text)
    return () if found is None else (*map(int, found.groups()[:3]), int(found[4] is None))
