"""Makes a model take ``adapter_names``: hooks of its forward, and methods in place of its own."""

from __future__ import annotations

import inspect
from typing import Any

from torch import nn

from lora_ext._common.hooks import has_pre_hook, remove_hooks
from lora_ext.model.adapter_set import AdapterSet
from lora_ext.model.rows.arguments import LENGTHS, NAMES, OFFSETS
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


def refuse_adapter_names(root: nn.Module, part: nn.Module) -> None:
    """Makes a model inside ``root`` refuse names, which its forward would swallow in its ``**kwargs``."""
    has_own = has_pre_hook(part, take_adapter_names) or has_pre_hook(part, check_unnamed)
    if part is not root and not has_own and has_pre_hook(root, take_adapter_names):
        part.register_forward_pre_hook(check_unnamed, with_kwargs=True)


def check_unnamed(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    """Refuses names of adapters in a call of a part of an injected model; a hook before the forward.

    ValueError: the call has some.
    """
    for name in (NAMES, LENGTHS, OFFSETS):
        if kwargs.get(name) is not None:
            raise ValueError(
                f"{type(module).__name__}: {name} is for calls of the injected model, and this is a part of it, which "
                "would ignore it; call that model, or this part within choose_adapters(model, names)"
            )


def forget_adapter_names(module: nn.Module) -> None:
    """Undoes :func:`serve_adapter_names` and :func:`refuse_adapter_names`."""
    remove_hooks(module, take_adapter_names, end_choice, check_unnamed)
    for method in _METHODS:
        method.remove(module)
