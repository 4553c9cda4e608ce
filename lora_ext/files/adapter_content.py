"""Writes an adapter as PEFT's two files."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor, nn

from lora_ext._common.sharded import class_of, gathered, whole
from lora_ext._common.wrapped import KEY_PREFIX
from lora_ext.files.adapter_file import CONFIG_FILE, WEIGHTS_FILE
from lora_ext.files.misfits import VERSION_KEY, has_present_layout, stacked_experts
from lora_ext.files.packed_projection import to_peft_form
from lora_ext.files.writing import write_tensors
from lora_ext.model.adapter_set import Adapter
from lora_ext.model.bare_model import root_module


class AdapterContent(NamedTuple):
    """The content of :data:`~lora_ext.files.adapter_file.ADAPTER_FILES`: text of the config, tensors and metadata."""

    config: str
    tensors: dict[str, Tensor]
    metadata: dict[str, str]

    def write(self, directory: Path) -> None:
        """Writes both files into an existing directory."""
        (directory / CONFIG_FILE).write_text(self.config, encoding="utf-8")
        write_tensors(directory / WEIGHTS_FILE, self.tensors, self.metadata)


def adapter_content(model: nn.Module, adapter: Adapter, base: Mapping[str, Tensor]) -> AdapterContent:
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
    values, tensors, metadata = to_peft_form(adapter, values, tensors)
    # Only the outer keys are sorted: the first matching pattern counts.
    text = json.dumps({key: values[key] for key in sorted(values)}, indent=2)
    return AdapterContent(text + "\n", tensors, {"format": "pt", **metadata})


def base_name(model: nn.Module) -> str | None:
    """Returns the name of the base model, if it has one; parts that are not Unicode, as in paths, are escaped."""
    name = getattr(root_module(model), "name_or_path", None)
    return name.encode("utf-8", "backslashreplace").decode() if isinstance(name, str) and name else None
