"""Refuses the strength of adapters that a call of diffusers asks for, because it would reach PEFT's layers only.

``pipe(..., cross_attention_kwargs={"scale": 0.5})`` multiplies the scaling of each layer whose class is PEFT's.
"""

from __future__ import annotations

import inspect
from typing import Any

from torch import nn

from lora_ext._common.hooks import has_pre_hook, remove_hooks
from lora_ext.model.bare_model import adapter_layers

_ARGUMENTS = {"cross_attention_kwargs", "joint_attention_kwargs", "attention_kwargs"}  # of diffusers' forwards


def guard_against_scale(module: nn.Module) -> None:
    """Makes a model of diffusers check the scale that its calls ask for."""
    if _ARGUMENTS & inspect.signature(module.forward).parameters.keys() and not has_pre_hook(module, check_scale):
        module.register_forward_pre_hook(check_scale, with_kwargs=True)


def remove_scale_guard(module: nn.Module) -> None:
    """Undoes :func:`guard_against_scale`."""
    remove_hooks(module, check_scale)


def check_scale(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    """Refuses a scale for the adapters, which the model would not apply; a hook before the forward.

    Raises:
        ValueError: the call asks for a scale other than 1, and an adapter is in use.
    """
    for argument in kwargs.keys() & _ARGUMENTS:
        scale = (kwargs[argument] or {}).get("scale", 1)
        names = next(([*layer.active.names] for _, layer in adapter_layers(module)), []) if scale != 1 else []
        if names:
            raise ValueError(
                f"{type(module).__name__}: {argument} has scale={scale}, which diffusers passes to PEFT's layers only; "
                "make an adapter of that strength instead: lora_ext.adapters.add_weighted_adapter(model, "
                f'{names}, {[scale] * len(names)}, "scaled", "cat")'
            )
