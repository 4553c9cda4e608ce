"""Makes a choice of adapters for the rows of a batch, if the model can serve it: checked before the model runs."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from lora_ext._common.arguments import checked
from lora_ext.model.adapter_set import AdapterSet, check_names, find_adapters
from lora_ext.model.bare_model import root_module
from lora_ext.model.rows.adapter_lengths import checked_lengths
from lora_ext.model.rows.arguments import LENGTHS, NAMES
from lora_ext.model.rows.obstacles import obstacles_of
from lora_ext.nn.rows.choice import BASE, RowChoice
from lora_ext.nn.rows.in_force import choosing, holder_of_context
from lora_ext.nn.rows.packed import PackedChoice


@checked
@contextmanager
def choose_adapters(
    model: nn.Module, names: list[str] | tuple[str, ...], lengths: list[int] | tuple[int, ...] | Tensor | None = None
) -> Iterator[None]:
    """Makes each row of the batches that ``model`` computes within the context use an adapter, in this thread only.

    For code that calls the model without a way to pass ``adapter_names``, such as pipelines. Batches may have a
    multiple of the rows: each name is then for as many consecutive ones. A generator that yields within the context
    leaves it in force for its caller.

    Args:
        model: an injected model.
        names: for each row an adapter's name, or ``"__base__"``; which adapters are active has no influence.
        lengths: for rows that hold several sequences: the number of tokens of each name, int ``[names]``. Tokens are
            counted row after row; all batches within the context have as many.

    Raises:
        ValueError: the model is not injected, or rows cannot choose: adapters are merged, or one of them has a part
            that is the same for all rows. The message has the remedy.
        KeyError: there is no such adapter; the message lists them.
        RuntimeError: in a call of the model: a generator yielded within the context, and goes on after another one
            began, or in another thread or task. In the end: an adapter was deleted or renamed meanwhile.
    """
    adapters = find_adapters(model, "choose_adapters")
    with choosing(choice_of(root_module(model), adapters, names, "choose_adapters", lengths), holder_of_context()):
        yield


def check_list(names: object, caller: str, per: str, kinds: Any = object) -> None:
    """Raises TypeError if ``names`` is no list; ``per`` is what has a name each, for the message."""
    if isinstance(names, str) or not isinstance(names, Sequence):
        raise TypeError(f"{caller}: {NAMES} is of type {type(names).__name__}, want a list with a name per {per}")
    if wrong := [name for name in names if not isinstance(name, kinds)]:
        raise TypeError(
            f"{caller}: {NAMES} has the entry {wrong[0]!r} of type {type(wrong[0]).__name__}, want a name per {per}; "
            f"{BASE!r} is none"
        )


def choice_of(
    root: nn.Module, adapters: AdapterSet, names: object, caller: str, lengths: object = None, what: str = NAMES
) -> RowChoice:
    """The choice of ``names``, checked. Errors as in :func:`choose_adapters`, and TypeError for other values.

    Args:
        what: what chooses, for messages.
    """
    check_list(names, caller, "row", str)
    if not names:
        raise ValueError(f"{caller}: adapter_names is empty, want a name for each row")
    used = dict.fromkeys(name for name in names if name != BASE)
    pooled = () if adapters.pool is None else tuple(name for name in used if name not in adapters.configs)
    if pooled:
        adapters.pool.check_known(pooled, caller, adapters.configs)
    else:
        check_names(caller, adapters.configs, used)
    if lengths is not None:
        lengths = checked_lengths(lengths, names, caller)
    obstacles = obstacles_of(root, adapters)
    if obstacles.to_all:
        raise ValueError(f"{caller}: {what}: {obstacles.to_all}")
    for name in used:
        key = None if name in pooled else name
        # An aLoRA has tokens of no adapter, and so has padding of packed rows.
        is_alone = lengths is None and len(set(names)) == 1 and name not in adapters.active.invocations
        if reason := obstacles.to_one.get(key) or (None if is_alone else obstacles.to_several.get(key)):
            raise ValueError(f"{caller}: adapter_names: {name!r} cannot be chosen by a row: {reason}")
        if lengths is not None and (reason := obstacles.to_tokens.get(key)):
            raise ValueError(f"{caller}: {LENGTHS}: {name!r} cannot be chosen by a token: {reason}")
    if lengths is not None and getattr(getattr(root, "config", None), "is_encoder_decoder", False):
        raise ValueError(
            f"{caller}: {LENGTHS}: {type(root).__name__} has an encoder and a decoder, which read different tokens; "
            "pass a sequence for each row"
        )
    if adapters.active.is_disabled:
        names, pooled = [BASE] * len(names), ()
    if pooled and root.training and torch.is_grad_enabled():
        raise ValueError(
            f"{caller}: adapter_names: {pooled[0]!r} is in a pool, whose adapters do not train; call model.eval(), or "
            "load_adapter(model, directory, trainable=True)"
        )
    rest = () if lengths is None else (lengths,)
    choice = (PackedChoice if rest else RowChoice)(adapters.active, names, *rest)
    choice.pool, choice.pool_names = adapters.pool, pooled
    choice.is_uniform = lengths is None and len(set(choice.rows)) == 1
    return choice
