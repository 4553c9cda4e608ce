"""Which of PEFT's two layouts the factors of stacked experts have in a file. Only the present one is read.

It has ``lora_A [r * num_experts, in_features]`` and ``lora_B [out_features, r * num_experts]``. For parameters stored
as ``[num_experts, out_features, in_features]``, PEFT before 0.19.1 took the sizes for the reverse; PEFT 0.19.0 did so
for the others, ``[num_experts, in_features, out_features]``. Then the shapes do not fit, except those of square
matrices: these are refused unless ``peft_version`` says that a later PEFT saved them.
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

_VERSION, _PRESENT = "peft_version", (0, 19, 1)


def with_version(adapter: Adapter, values: dict[str, Any]) -> dict[str, Any]:
    """Returns ``values``, the config of a file, with the ``peft_version`` of the layout, if the adapter has experts."""
    if not any(_experts(adapter)) or _parsed(values.get(_VERSION)) >= _PRESENT:
        return values
    return values | {_VERSION: ".".join(map(str, _PRESENT))}


def check_expert_layout(adapter: Adapter, file: AdapterFile, caller: str) -> None:
    """Checks that no square experts in ``file`` may have the layout of an old PEFT. ValueError: some may."""
    version = file.config.get(_VERSION)
    for part in _experts(adapter):
        key = f"{KEY_PREFIX}{part.file_path}.lora_A.weight"
        is_square = part.adapter.lora_A.shape[1] == part.adapter.lora_B.shape[0]
        if is_square and key in file.tensors and _parsed(version) < _PRESENT:
            raise ValueError(
                f"{caller}: {file.path}: {key} is of square experts, whose factors PEFT exchanged before 0.19.1; "
                f'{_VERSION} in {CONFIG_FILE} is {shown(version)}: merge it with that PEFT, or set "0.19.1" if a later '
                "one saved it"
            )


def _experts(adapter: Adapter) -> Iterator[Part]:
    return (part for part in adapter.parts if isinstance(part.layer, LoraParameter) and part.layer.weight.dim() == 3)


def _parsed(version: object) -> tuple[int, ...]:
    """Returns the numbers of a released version; nothing for anything else, such as a development version."""
    found = re.match(r"(\d{1,9})\.(\d{1,9})\.(\d{1,9})(?!\.?(dev|rc|a|b))", version if isinstance(version, str) else "")
    return () if found is None else (*map(int, found.groups()[:3]),)
