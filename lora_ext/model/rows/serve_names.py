"""Makes a model take ``adapter_names``: hooks of its forward, and methods in place of its own."""

from __future__ import annotations

import inspect
from typing import Any

from torch import nn

from lora_ext._common.hooks import has_pre_hook, remove_hooks
from lora_ext._common.printable import shown
from lora_ext.model.adapter_set import AdapterSet, adapter_set
from lora_ext.model.rows.arguments import LENGTHS, NAMES, OFFSETS
from lora_ext.model.rows.calls import end_choice, take_adapter_names
from lora_ext.model.rows.continuous_batching import GenerateBatch, InitContinuousBatching
from lora_ext.model.rows.generate import GenerateByRows

_METHODS = (GenerateByRows, GenerateBatch, InitContinuousBatching)


def serve_adapter_names(root: nn.Module, adapters: AdapterSet) -> None:
    """Makes ``root`` take ``adapter_names``, unless its forward has a parameter of that name."""
    if has_pre_hook(root, take_adapter_names) or NAMES in inspect.signature(root.forward).parameters:
        return
    remove_hooks(root, refuse_without_adapters)
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


def refuse_without_adapters(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    """Refuses names of adapters in a call of a model that has lost its adapters; a hook before the forward.

    ValueError: the call has some, and no part of the model was injected since.
    """
    for name in (NAMES, LENGTHS, OFFSETS):
        if kwargs.get(name) is not None and all(adapter_set(part) is None for part in module.modules()):
            raise ValueError(
                f"{type(module).__name__}: {name} is {shown(kwargs[name])}, but the model has no adapters any more "
                "(closed pool, unload or merge_and_unload) and would ignore it; load the adapters again, or leave out "
                f"{name}"
            )


def forget_adapter_names(module: nn.Module) -> None:
    """Undoes :func:`serve_adapter_names` and :func:`refuse_adapter_names`, but a model goes on refusing names.

    Only one whose forward would swallow them in its ``**kwargs``; Python refuses them for the others.
    """
    took_names = has_pre_hook(module, take_adapter_names)
    remove_hooks(module, take_adapter_names, end_choice, check_unnamed)
    for method in _METHODS:
        method.remove(module)
    parameters = inspect.signature(module.forward).parameters.values() if took_names else ()
    if any(parameter.kind is parameter.VAR_KEYWORD for parameter in parameters):
        module.register_forward_pre_hook(refuse_without_adapters, with_kwargs=True)
