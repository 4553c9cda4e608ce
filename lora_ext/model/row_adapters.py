"""Refuses ``model(..., adapter_names=[...])``, which the ``**kwargs`` of a model would swallow."""

from __future__ import annotations

import inspect
from typing import Any

from torch import nn


def refuse_adapter_names(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    """A hook before the forward. ValueError: ``adapter_names`` asks for one adapter for each row."""
    if kwargs.get("adapter_names") is not None:
        raise ValueError(
            f"{type(module).__name__}: adapter_names asks for one adapter for each row, which is not supported: every "
            "row gets the active adapters; call set_adapter(model, name), and the model once for each adapter"
        )


def guard_forward(root: nn.Module) -> None:
    """Makes ``root`` refuse ``adapter_names``, unless its forward has a parameter of that name."""
    if _hooks(root) or "adapter_names" in inspect.signature(root.forward).parameters:
        return
    root.register_forward_pre_hook(refuse_adapter_names, with_kwargs=True)


def forget_forward_guard(module: nn.Module) -> None:
    """Undoes :func:`guard_forward`."""
    for key in _hooks(module):
        del module._forward_pre_hooks[key]
        module._forward_pre_hooks_with_kwargs.pop(key, None)


def _hooks(module: nn.Module) -> list[int]:
    return [key for key, hook in module._forward_pre_hooks.items() if hook is refuse_adapter_names]
