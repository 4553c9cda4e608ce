"""Saves the adapters of a pipeline of diffusers as the file that ``pipeline.load_lora_weights`` reads."""

from __future__ import annotations

import inspect
import json
import os
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from lora_ext._common.arguments import checked
from lora_ext._common.printable import shown
from lora_ext._common.wrapped import KEY_PREFIX
from lora_ext.files.adapter_content import adapter_content
from lora_ext.files.staged_files import staged_files
from lora_ext.model.adapter_set import adapter_set, find_adapter
from lora_ext.model.bare_model import adapter_layers

_FILE = "pytorch_lora_weights.safetensors"
_FACTORS = (".lora_A.weight", ".lora_B.weight", ".lora_B.bias")


@checked
def save_lora_weights(pipeline: Any, directory: str | os.PathLike[str], adapter_name: str | None = None) -> None:
    """Saves the adapters of a pipeline's injected models to ``directory/pytorch_lora_weights.safetensors``.

    ``pipeline.load_lora_weights(directory)`` loads it, into PEFT's layers. The file has the adapters' configs too:
    without them diffusers would take ``lora_alpha`` for the rank.

    Args:
        pipeline: a pipeline of diffusers with ``save_lora_weights``; its UNet, transformer or text encoders are
            injected, each by a call of ``inject``.
        directory: target directory; created if needed, other files in it stay.
        adapter_name: the adapter to save, in each model that has one of that name; None: the active one of each model.

    Raises:
        TypeError: the pipeline has no ``save_lora_weights``.
        ValueError: no model of the pipeline has such an adapter; diffusers keeps no adapters of the injected model
            (a ControlNet); or the adapter holds more than low-rank factors, which the file has no place for.
            The message says what to do; nothing is written.
        OSError: the directory cannot be written; its content is unchanged.
    """
    save = getattr(type(pipeline), "save_lora_weights", None)
    if save is None:
        raise TypeError(
            f"save_lora_weights: {type(pipeline).__name__} has no save_lora_weights, so diffusers keeps no adapters of "
            "it; call lora_ext.save_adapter on its models"
        )
    known, content = inspect.signature(save).parameters, {}
    for name, model in _injected(pipeline, adapter_name).items():
        if not {f"{name}_lora_layers", f"{name}_lora_adapter_metadata"} <= known.keys():
            raise ValueError(
                f"save_lora_weights: {type(pipeline).__name__} keeps no adapters of its {name!r} with their configs; "
                f"call lora_ext.save_adapter(pipeline.{name}, directory), and load_adapter to load it"
            )
        layers, config = _layers_and_config(name, model, adapter_name)
        content |= {f"{name}_lora_layers": layers, f"{name}_lora_adapter_metadata": config}
    with staged_files(Path(directory), (_FILE,), "save_lora_weights") as staging:
        save(staging, **content)


def _injected(pipeline: Any, adapter_name: str | None) -> dict[str, nn.Module]:
    """The models of the pipeline to save, by their names in it."""
    models = {name: part for name, part in pipeline.components.items() if isinstance(part, nn.Module)}
    sets = {name: adapters for name, model in models.items() if (adapters := adapter_set(model)) is not None}
    for name, model in models.items():
        if name not in sets and (path := next((path for path, _ in adapter_layers(model)), None)) is not None:
            raise ValueError(
                f"save_lora_weights: a part of pipeline.{name} was injected by itself ({path!r} has adapters); inject "
                f"pipeline.{name}, or call lora_ext.save_adapter on that part"
            )
    found = {
        name: models[name]
        for name, adapters in sets.items()
        if (adapters.active.names if adapter_name is None else adapter_name in adapters.configs)
    }
    if not found:
        held = {name: sorted(adapters.configs) for name, adapters in sets.items()}
        wanted = "an active adapter" if adapter_name is None else f"an adapter {adapter_name!r}"
        raise ValueError(
            f"save_lora_weights: no model of {type(pipeline).__name__} has {wanted}; the adapters are {held}; call "
            "inject(pipeline.unet, config), or set_adapter"
        )
    return found


def _layers_and_config(
    component: str, model: nn.Module, adapter_name: str | None
) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """The factors of an adapter by the keys that diffusers wants, and its config."""
    content = adapter_content(model, find_adapter(model, "save_lora_weights", adapter_name))
    layers = {key.removeprefix(KEY_PREFIX): tensor for key, tensor in content.tensors.items()}
    if others := [key for key in layers if not key.endswith(_FACTORS)]:
        raise ValueError(
            f"save_lora_weights: the adapter of pipeline.{component} holds {shown(others[0])}, which is not a factor "
            "of a linear layer or a convolution, and diffusers would not load it; call "
            f"lora_ext.save_adapter(pipeline.{component}, directory)"
        )
    return layers, json.loads(content.config)
