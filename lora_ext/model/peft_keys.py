"""Translates the ``state_dict`` of a model with PEFT's layers to the keys of an injected model.

sentence-transformers' trainer resumes by loading a checkpoint as a new model, with PEFT's layers, and takes its state.
"""

from __future__ import annotations

import re
from typing import Any

from torch import Tensor, nn

from lora_ext.model.adapter_set import AdapterSet, Part, adapter_in
from lora_ext.nn.trainable_tokens import TrainableTokens
from lora_ext.nn.trained import TrainedModule

_PEFT = re.compile(r"\.(lora_[AB]|lora_embedding_[AB]|modules_to_save|trainable_tokens_delta)\.[^.]+(\.|$)")
_FACTOR = re.compile(r"\.(lora_[AB])\.(weight|bias)$")


def has_peft_keys(state_dict: dict[str, Any], prefix: str) -> bool:
    """Returns whether some keys below ``prefix`` are those of PEFT's layers."""
    return any(_PEFT.search(key) for key in state_dict if key.startswith(prefix))


def translate_peft_keys(
    module: nn.Module, adapters: AdapterSet, state: dict[str, Tensor], state_dict: dict[str, Any], prefix: str
) -> None:
    """Renames PEFT's keys in ``state_dict`` to those of ``module``, in place; ``state`` is the state of ``module``."""
    keys: dict[int, list[str]] = {}  # of tied parameters all
    for key, tensor in state.items():
        keys.setdefault(id(tensor), []).append(prefix + key)
    for name in adapters.configs:
        adapter = adapter_in(module, adapters, name)
        scaled = adapter.file_scales()  # in files only, where it makes up for a flaw in PEFT's forward
        for part in adapter.parts:
            for theirs, tensor in _peft_tensors(part, name).items():
                is_transposed = _is_transpose(tensor)
                ours = keys.get(id(tensor._base if is_transposed else tensor))
                if ours is not None and prefix + theirs in state_dict and not scaled:
                    value = state_dict.pop(prefix + theirs)
                    state_dict.update(dict.fromkeys(ours, value.mT if is_transposed else value))


def _is_transpose(tensor: Tensor) -> bool:
    """Returns whether ``tensor`` is the transpose of a whole parameter, as an embedding's ``lora_A`` is in files."""
    base = tensor._base
    if base is None or base.dim() != 2:
        return False
    return (tensor.shape, tensor.stride()) == (base.mT.shape, base.mT.stride())


def _peft_tensors(part: Part, name: str) -> dict[str, Tensor]:
    """The live tensors of one layer, by the keys that they have in a model with PEFT's layers."""
    path, layer = part.file_path, part.layer
    if isinstance(layer, TrainedModule):
        copies = _live(part.adapter, f"{path}.modules_to_save.{name}.")
        return copies | _live(layer.base_layer, f"{path}.original_module.")
    tensors = {}
    for key, tensor in layer.file_tensors(path, part.adapter).items():
        named = _FACTOR.sub(rf".\1.{name}.\2", key)
        tensors[f"{key}.{name}" if named == key else named] = tensor
    if isinstance(layer, TrainableTokens):
        tensors |= _live(layer.inner_layer, f"{path}.token_adapter.base_layer.")
    return tensors


def _live(module: nn.Module, prefix: str) -> dict[str, Tensor]:
    return module.state_dict(prefix=prefix, keep_vars=True)
