"""Finds the model inside wrappers (DDP, torch.compile, ...) and its embeddings, and removes hooks from modules."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import nn
from torch.nn.parallel import DataParallel, DistributedDataParallel

DATA_PARALLEL = (DistributedDataParallel, DataParallel)
KEY_PREFIX = "base_model.model."
"""Prefix of all keys in the state of a PeftModel, and in PEFT's files."""

COMPILED, _CHECKPOINTED = "_orig_mod", "_checkpoint_wrapped_module"
"""The names under which torch.compile and checkpoint_wrapper (FSDP's checkpointing) hold the module that they wrap."""


def without_wrapper(module: nn.Module) -> nn.Module | None:
    """The module that a wrapper around a part of a model holds, or None: ``module`` is no such wrapper."""
    parts = module._modules
    return parts.get(COMPILED, parts.get(_CHECKPOINTED))


def root_module(model: nn.Module) -> nn.Module:
    """``model``, or the module inside all wrappers: paths must not depend on them."""
    while True:
        if isinstance(model, DATA_PARALLEL):
            model = model.module
        elif (inner := getattr(model, COMPILED, None)) is not None:
            model = inner
        else:
            return model


def embeddings_of(model: nn.Module, side: str) -> nn.Module | None:
    """The ``"input"`` or ``"output"`` embeddings of a model of Transformers; None: it has none or does not tell."""
    ask = getattr(model, f"get_{side}_embeddings", None)
    try:
        found = ask() if callable(ask) else None
    except NotImplementedError:  # Transformers' answer where it finds none: CANINE, models without tokens
        return None
    return found if isinstance(found, nn.Module) else None  # Perceiver answers with a parameter


def remove_hooks(module: nn.Module, *functions: Callable[..., Any]) -> None:
    """Removes the hooks before and after the module's forward that are one of ``functions``."""
    for hooks, *options in (
        (module._forward_pre_hooks, module._forward_pre_hooks_with_kwargs),
        (module._forward_hooks, module._forward_hooks_with_kwargs, module._forward_hooks_always_called),
    ):
        for key in [key for key, hook in hooks.items() if hook in functions]:
            for entries in (hooks, *options):
                entries.pop(key, None)
