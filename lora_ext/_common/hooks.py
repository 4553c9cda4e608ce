"""Removes the forward hooks that a module has of given functions."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import nn


def remove_hooks(module: nn.Module, *functions: Callable[..., Any]) -> None:
    """Removes the hooks before and after the module's forward that are one of ``functions``."""
    for hooks, *options in (
        (module._forward_pre_hooks, module._forward_pre_hooks_with_kwargs),
        (module._forward_hooks, module._forward_hooks_with_kwargs, module._forward_hooks_always_called),
    ):
        for key in [key for key, hook in hooks.items() if hook in functions]:
            for entries in (hooks, *options):
                entries.pop(key, None)
