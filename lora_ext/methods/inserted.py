"""Modules that a method hangs onto modules of a model, and how they get to see what passes through."""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from lora_ext._common.interrupts import uninterrupted


class Inserted(nn.Module):
    """A child of its host, the module whose input or output it changes. The paths of other modules stay as they are.

    The host calls it through forward hooks, which are plain functions that find the child by the host they are given:
    so copies, pickles and replicas of a model call their own children.
    """

    def enter(self, host: nn.Module, args: tuple, kwargs: dict[str, Any]) -> tuple[tuple, dict[str, Any]]:
        """What the host is to be called with."""
        return args, kwargs

    def leave(self, host: nn.Module, args: tuple, kwargs: dict[str, Any], output: Any) -> Any:
        """What the host is to return; ``args`` and ``kwargs`` as :meth:`enter` left them."""
        return output


class Insertion(NamedTuple):
    """``module`` becomes the child ``name`` of ``host``, which is at ``path`` in the bare model."""

    path: str
    host: nn.Module
    name: str
    module: Inserted


def parameter_names(host: nn.Module) -> tuple[str, ...]:
    """Of its ``forward``. To be asked once, and not in a hook, where ``torch.compile`` would have to trace it."""
    return tuple(inspect.signature(host.forward).parameters)


def by_name(names: tuple[str, ...], args: tuple, kwargs: dict[str, Any]) -> dict[str, Any]:
    """All arguments of a call by keyword; ``names`` as :func:`parameter_names` gave them. The cache is ``cache``
    where the host calls it so, as Transformers does from 5.24 on, and ``past_key_values`` elsewhere."""
    named = dict(zip(names, args, strict=False)) | kwargs
    for other, own in (("past_key_values", "cache"), ("cache", "past_key_values")):
        if other in named and other not in names and own in names:
            named[own] = named.pop(other)
    return named


def cache_name(names: tuple[str, ...]) -> str:
    """What a host whose parameters are ``names`` calls its cache of keys and values."""
    return "cache" if "cache" in names else "past_key_values"


def own_dtype(like: Tensor) -> torch.dtype:
    """Of new parameters beside ``like``: its own, but float32 where that is a 16-bit one; they are cast at use."""
    return torch.float32 if like.dtype in (torch.bfloat16, torch.float16) else like.dtype


def insert(insertion: Insertion) -> None:
    """Carries it out. Ctrl-C waits."""
    with uninterrupted():
        is_first = not any(_inserted(insertion.host))
        insertion.module.train(insertion.host.training)
        insertion.host.add_module(insertion.name, insertion.module)
        if is_first:
            insertion.host.register_forward_pre_hook(_enter, with_kwargs=True)
            insertion.host.register_forward_hook(_leave, with_kwargs=True)


def remove_inserted(model: nn.Module) -> None:
    """Takes out everything that :func:`insert` put into ``model``."""
    for host in list(model.modules()):
        for name, child in list(host.named_children()):
            if isinstance(child, Inserted):
                delattr(host, name)
        for hooks, flags in (
            (host._forward_pre_hooks, host._forward_pre_hooks_with_kwargs),
            (host._forward_hooks, host._forward_hooks_with_kwargs),
        ):
            for key in [key for key, hook in hooks.items() if hook in (_enter, _leave)]:
                del hooks[key]
                flags.pop(key, None)


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
