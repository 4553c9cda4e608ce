"""Modules that a method inserts into a model, and the hooks that call them."""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from lora_ext._common.hooks import remove_hooks


class Inserted(nn.Module):
    """A child of its host, the module whose input or output it changes. The paths of other modules do not change.

    The host's forward hooks are plain functions that look up the child in the host, so copies and pickles of a model
    call the right children.
    """

    def enter(self, host: nn.Module, args: tuple, kwargs: dict[str, Any]) -> tuple[tuple, dict[str, Any]]:
        """Returns the arguments for the host."""
        return args, kwargs

    def leave(self, host: nn.Module, args: tuple, kwargs: dict[str, Any], output: Any) -> Any:
        """Returns the output for the host; ``args`` and ``kwargs`` come from :meth:`enter`."""
        return output


class Insertion(NamedTuple):
    """``module`` becomes the child ``name`` of ``host``, which is at ``path`` in the bare model."""

    path: str
    host: nn.Module
    name: str
    module: Inserted


def parameter_names(host: nn.Module) -> tuple[str, ...]:
    """Returns the parameter names of ``host.forward``. Not for use in hooks: ``torch.compile`` would trace it."""
    return tuple(inspect.signature(host.forward).parameters)


def by_name(names: tuple[str, ...], args: tuple, kwargs: dict[str, Any]) -> dict[str, Any]:
    """Returns all arguments of a call by keyword; ``names`` come from :func:`parameter_names`.

    The cache gets the host's name for it: ``cache`` since Transformers 5.24, ``past_key_values`` before.
    """
    named = dict(zip(names, args, strict=False)) | kwargs
    for given in {"past_key_values", "cache"} & named.keys() - {cache_name(names)}:
        named[cache_name(names)] = named.pop(given)
    return named


def cache_name(names: tuple[str, ...]) -> str:
    """Returns the name of the cache of keys and values among a host's parameters ``names``."""
    return "cache" if "cache" in names else "past_key_values"


def new_parameter_dtype(like: Tensor) -> torch.dtype:
    """Returns the dtype for new parameters: float32 if ``like`` has 16 bits (they are cast at use), else the same."""
    return torch.float32 if like.dtype in (torch.bfloat16, torch.float16) else like.dtype


def insert(insertion: Insertion) -> None:
    """Adds the module to its host."""
    is_first = not any(_inserted(insertion.host))
    insertion.module.train(insertion.host.training)
    insertion.host.add_module(insertion.name, insertion.module)
    if is_first:
        insertion.host.register_forward_pre_hook(_enter, with_kwargs=True)
        insertion.host.register_forward_hook(_leave, with_kwargs=True)


def remove_inserted(model: nn.Module) -> None:
    """Removes everything that :func:`insert` added to ``model``."""
    for host in list(model.modules()):
        for name, child in list(host.named_children()):
            if isinstance(child, Inserted):
                delattr(host, name)
        remove_hooks(host, _enter, _leave)


def _inserted(host: nn.Module) -> Iterator[Inserted]:
    return (child for child in host._modules.values() if isinstance(child, Inserted))


def _enter(host: nn.Module, args: tuple, kwargs: dict[str, Any]) -> tuple[tuple, dict[str, Any]]:
    for child in _inserted(host):
        args, kwargs = child.enter(host, args, kwargs)
    return args, kwargs


def _leave(host: nn.Module, args: tuple, kwargs: dict[str, Any], output: Any) -> Any:
    for child in _inserted(host):
        output = child.leave(host, args, kwargs, output)
    return output
