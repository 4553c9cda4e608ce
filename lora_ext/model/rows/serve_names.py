"""Makes a model take ``adapter_names``: hooks of its forward, and methods in place of its own."""

from __future__ import annotations

import inspect

from torch import nn

from lora_ext._common.hooks import has_pre_hook, remove_hooks
from lora_ext.model.adapter_set import AdapterSet
from lora_ext.model.rows.arguments import NAMES
from lora_ext.model.rows.calls import end_choice, take_adapter_names
from lora_ext.model.rows.continuous_batching import GenerateBatch, InitContinuousBatching
from lora_ext.model.rows.generate import GenerateByRows

_METHODS = (GenerateByRows, GenerateBatch, InitContinuousBatching)


def serve_adapter_names(root: nn.Module, adapters: AdapterSet) -> None:
    """Makes ``root`` take ``adapter_names``, unless its forward has a parameter of that name."""
    if has_pre_hook(root, take_adapter_names) or NAMES in inspect.signature(root.forward).parameters:
        return
    root.register_forward_pre_hook(take_adapter_names, with_kwargs=True)
    root.register_forward_hook(end_choice, always_call=True)
    for method in _METHODS:
        method.put(root, adapters)


def forget_adapter_names(module: nn.Module) -> None:
    """Undoes :func:`serve_adapter_names`."""
    remove_hooks(module, take_adapter_names, end_choice)
    for method in _METHODS:
        method.remove(module)
