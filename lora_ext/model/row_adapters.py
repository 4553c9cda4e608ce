"""``model(..., adapter_names=[...])`` and ``model.generate(..., adapter_names=[...])``: an adapter for each row.

Hooks of the model take the argument, as most models would swallow it in their ``**kwargs``. They check everything
before the model runs, and put the choice in force for the layers (lora_ext/nn/rows.py).
"""

from __future__ import annotations

import inspect
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import nn

from lora_ext._common.arguments import checked
from lora_ext.model.adapter_set import AdapterSet, adapter_set, check_names, find_adapters
from lora_ext.model.bare_model import adapter_layers, root_module
from lora_ext.nn import LoraLayer
from lora_ext.nn.rows import (
    BASE,
    RowChoice,
    choosing,
    chosen,
    drop_interrupted,
    enter,
    first_rows,
    leave,
    token_multiples,
)

_ARGUMENT, _METHOD = "adapter_names", "generate"


@checked
@contextmanager
def choose_adapters(model: nn.Module, names: list[str] | tuple[str, ...]) -> Iterator[None]:
    """Makes each row of the batches that ``model`` computes within the context use an adapter, in this thread only.

    For code that calls the model without a way to pass ``adapter_names``, such as pipelines. Batches may have a
    multiple of the rows: each name is then for as many consecutive ones.

    Args:
        model: an injected model.
        names: for each row an adapter's name, or ``"__base__"``; which adapters are active has no influence.

    Raises:
        ValueError: the model is not injected, or rows cannot choose: adapters are merged, or one of them has a part
            that is the same for all rows. The message has the remedy.
        KeyError: there is no such adapter; the message lists them.
    """
    adapters = find_adapters(model, "choose_adapters")
    with choosing(_choice(root_module(model), adapters, names, "choose_adapters")):
        yield


def _choice(root: nn.Module, adapters: AdapterSet, names: object, caller: str) -> RowChoice:
    """The choice of ``names``, checked. Errors as in :func:`choose_adapters`, and TypeError for other values."""
    if isinstance(names, str) or not isinstance(names, Sequence) or not all(isinstance(name, str) for name in names):
        raise TypeError(f"{caller}: adapter_names is of type {type(names).__name__}, want a list with a name per row")
    if not names:
        raise ValueError(f"{caller}: adapter_names is empty, want a name for each row")
    used = dict.fromkeys(name for name in names if name != BASE)
    pooled = () if adapters.pool is None else tuple(name for name in used if name not in adapters.configs)
    if pooled:
        adapters.pool.check_known(pooled, caller, adapters.configs)
    else:
        check_names(caller, adapters.configs, used)
    obstacles = _obstacles(root, adapters)
    if obstacles.to_all:
        raise ValueError(f"{caller}: adapter_names: {obstacles.to_all}")
    for name in used:
        if name in obstacles.to_one:
            raise ValueError(f"{caller}: adapter_names: {name!r} cannot be chosen by a row: {obstacles.to_one[name]}")
    if adapters.active.is_disabled:
        return RowChoice(adapters.active, [BASE] * len(names))
    if pooled and root.training and torch.is_grad_enabled():
        raise ValueError(
            f"{caller}: adapter_names: {pooled[0]!r} is in a pool, whose adapters do not train; call model.eval(), or "
            "load_adapter(model, directory, trainable=True)"
        )
    choice = RowChoice(adapters.active, names)
    choice.pool, choice.pool_names = adapters.pool, pooled
    return choice


class _Obstacles(NamedTuple):
    """Why rows cannot choose: any adapter (or ""), and by name those that cannot be chosen."""

    to_all: str
    to_one: dict[str, str]


def _obstacles(root: nn.Module, adapters: AdapterSet) -> _Obstacles:
    """Walks the model once after every change of its adapters."""
    active = adapters.active
    changes, known = active.changes, active.row_obstacles
    if known is not None and known[0] == changes:
        return known[1]
    to_all, to_one = "", {}
    for path, layer in adapter_layers(root):
        if isinstance(layer, LoraLayer) and layer.is_merged and not to_all:
            names = ", ".join(map(repr, layer.merged_adapters))
            to_all = f"{names} is merged into {path!r}, so every row gets it; call unmerge(model) first"
        if not layer.rows_choose:
            reason = f"{path!r} is a {type(layer).__name__}, which computes all rows with one adapter"
            to_one = dict.fromkeys(layer.adapters, f"{reason}; call set_adapter and the model once for it") | to_one
    for name, biases in adapters.biases.items():
        to_one[name] = "it trains the model's biases, which all rows share; train it with lora_bias=True instead"
        if biases.used:
            to_all = to_all or (
                f"the active adapter {name!r} has changed the model's biases for all rows; activate another one "
                "(set_adapter), or none"
            )
    obstacles = _Obstacles(to_all, to_one)
    active.row_obstacles = changes, obstacles
    return obstacles


# --- the model's call -------------------------------------------------------------------------------------------------


def take_adapter_names(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple | None:
    """A hook before the forward: takes ``adapter_names`` out of its arguments, and puts the choice in force."""
    adapters = adapter_set(module)
    if torch.compiler.is_compiling():
        if kwargs.get(_ARGUMENT) is not None or adapters.active.row_calls > 0:
            from lora_ext.nn.compiled_rows import refuse_compiled

            refuse_compiled()
        return (args, _without_names(kwargs)) if _ARGUMENT in kwargs else None
    drop_interrupted()
    names = kwargs.get(_ARGUMENT)
    if names is None:
        if adapters.active.row_calls and (choice := chosen(adapters.active)) is not None:
            _note_rows(module, choice, args, kwargs)
        return (args, _without_names(kwargs)) if _ARGUMENT in kwargs else None
    kwargs = _without_names(kwargs)
    caller = type(module).__name__
    choice = _choice(module, adapters, names, caller)
    values = _values(args, kwargs)
    first = first_rows(values, getattr(module, "main_input_name", None))
    if first is not None:
        argument, tensor = first
        if tensor.shape[0] != len(choice.rows):
            raise ValueError(
                f"{caller}: adapter_names has {len(choice.rows)} names, but {argument} has {tensor.shape[0]} rows; "
                "pass a name for each row"
            )
        choice.multiples = token_multiples(values, tensor.shape[0], 1)
    enter(choice)
    frame = sys._getframe(1)
    choice.frames = frame, frame.f_back  # a hook after an error is called from the outer one
    return args, kwargs


def end_choice(module: nn.Module, *_: Any) -> None:
    """A hook after the forward, which also runs after an error: ends the choice that the call began."""
    if torch.compiler.is_compiling():
        return
    adapters = adapter_set(module)
    choice = chosen(adapters.active) if adapters.active.row_calls else None
    if choice is not None and sys._getframe(1) in choice.frames:
        leave(choice)


def _note_rows(module: nn.Module, choice: RowChoice, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    """Notes how many rows of a batch belong to each name of a choice that was made outside of the call."""
    values = _values(args, kwargs)
    first = first_rows(values, getattr(module, "main_input_name", None))
    if first is None:
        return
    argument, tensor = first
    times, rest = divmod(tensor.shape[0], len(choice.rows))
    if rest:
        raise ValueError(
            f"{type(module).__name__}: adapter_names has {len(choice.rows)} names, but {argument} has "
            f"{tensor.shape[0]} rows, which is no multiple of them"
        )
    choice.multiples = token_multiples(values, tensor.shape[0], times)


def _without_names(kwargs: dict[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in kwargs.items() if name != _ARGUMENT}


def _values(args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> dict[str, Any]:
    return {f"argument {i}": value for i, value in enumerate(args, start=1)} | dict(kwargs)


def serve_adapter_names(root: nn.Module, adapters: AdapterSet) -> None:
    """Makes ``root`` take ``adapter_names``, unless its forward has a parameter of that name."""
    if _hooks(root._forward_pre_hooks) or _ARGUMENT in inspect.signature(root.forward).parameters:
        return
    root.register_forward_pre_hook(take_adapter_names, with_kwargs=True)
    root.register_forward_hook(end_choice, always_call=True)
    if callable(getattr(type(root), _METHOD, None)):
        setattr(root, _METHOD, GenerateByRows(root, adapters, vars(root).get(_METHOD)))


def forget_adapter_names(module: nn.Module) -> None:
    """Undoes :func:`serve_adapter_names`."""
    for key in _hooks(module._forward_pre_hooks):
        del module._forward_pre_hooks[key]
        module._forward_pre_hooks_with_kwargs.pop(key, None)
    for key in _hooks(module._forward_hooks):
        del module._forward_hooks[key]
        module._forward_hooks_always_called.pop(key, None)
    generate = vars(module).get(_METHOD)
    if isinstance(generate, GenerateByRows):
        delattr(module, _METHOD)
        if generate.replaced is not None:
            setattr(module, _METHOD, generate.replaced)


def _hooks(hooks: Mapping[int, Callable]) -> list[int]:
    return [key for key, hook in hooks.items() if hook in (take_adapter_names, end_choice)]


class GenerateByRows:
    """The ``generate`` of an injected model. It is copied and pickled with the model.

    Attributes:
        model, adapters: what generates.
        replaced: what the instance had as its ``generate``, or None.
    """

    def __init__(self, model: nn.Module, adapters: AdapterSet, replaced: Any) -> None:
        self.model, self.adapters, self.replaced = model, adapters, replaced

    @property
    def original(self) -> Callable[..., Any]:
        """The method that the model has without adapters."""
        return self.replaced or getattr(type(self.model), _METHOD).__get__(self.model)

    @property
    def __signature__(self) -> inspect.Signature:
        return inspect.signature(self.original)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        names = kwargs.pop(_ARGUMENT, None)
        if names is None:
            return self.original(*args, **kwargs)
        caller = f"{type(self.model).__name__}.{_METHOD}"
        choice = _choice(self.model, self.adapters, names, caller)
        values = _values(args, kwargs)
        first = first_rows(values, getattr(self.model, "main_input_name", None))
        if first is not None and first[1].shape[0] != len(choice.rows):
            raise ValueError(
                f"{caller}: adapter_names has {len(choice.rows)} names, but {first[0]} has {first[1].shape[0]} rows; "
                "pass a name for each row"
            )
        with choosing(choice):
            return self.original(*args, **kwargs)
