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
from lora_ext.model.invocations import (
    OFFSETS,
    active_tokens,
    are_invoked,
    find_starts,
    past_tokens,
    position,
    tokens_in_row,
)
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


def _choice(root: nn.Module, adapters: AdapterSet, names: object, caller: str, what: str = _ARGUMENT) -> RowChoice:
    """The choice of ``names``, checked. Errors as in :func:`choose_adapters`, and TypeError for other values.

    Args:
        what: what chooses, for messages.
    """
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
        raise ValueError(f"{caller}: {what}: {obstacles.to_all}")
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
    active, names = adapters.active, kwargs.get(_ARGUMENT)
    rest = _without_names(kwargs)
    if torch.compiler.is_compiling():
        if names is not None or active.row_calls > 0:
            from lora_ext.nn.compiled_rows import refuse_compiled

            refuse_compiled()
        return (args, rest) if len(rest) < len(kwargs) else None
    drop_interrupted()
    outer = chosen(active) if active.row_calls else None
    if names is None and not (active.invoked if outer is None else _are_invoked(outer)):
        if outer is not None:
            outer.multiples = _multiples(type(module).__name__, module, outer, _values(args, rest))[1]
        return (args, rest) if len(rest) < len(kwargs) else None
    values = _values(args, kwargs)
    choice = _choice_of_call(module, adapters, values, outer, type(module).__name__)
    if outer is not None and names is None:
        choice.starts, choice.prompt = outer.starts, outer.prompt
    times, choice.multiples = _multiples(type(module).__name__, module, choice, values)
    enter(choice)
    try:
        choose_tokens(choice, times, values, type(module).__name__)
    except BaseException:
        leave(choice)
        raise
    frame = sys._getframe(1)
    choice.frames = frame, frame.f_back  # a hook after an error is called from the outer one
    return args, rest


def end_choice(module: nn.Module, *_: Any) -> None:
    """A hook after the forward, which also runs after an error: ends the choice that the call began."""
    if torch.compiler.is_compiling():
        return
    adapters = adapter_set(module)
    choice = chosen(adapters.active) if adapters.active.row_calls else None
    if choice is not None and sys._getframe(1) in choice.frames:
        leave(choice)


def _choice_of_call(
    root: nn.Module, adapters: AdapterSet, values: Mapping[str, Any], outer: RowChoice | None, caller: str
) -> RowChoice:
    """The choice of a call: of its ``adapter_names``, of the call around it, or of the active adapter (aLoRA)."""
    names = values.get(_ARGUMENT)
    first = first_rows(values, getattr(root, "main_input_name", None))
    if names is None and outer is not None:
        choice = RowChoice(adapters.active, outer.names_of_rows)
        choice.pool, choice.pool_names, choice.is_of_active = outer.pool, outer.pool_names, outer.is_of_active
        return choice
    if names is None:
        active = adapters.active.names
        if len(active) > 1:
            raise ValueError(
                f"{caller}: the active adapters are {list(active)}, of which {adapters.active.invoked[0]!r} acts from "
                "its invocation tokens on (aLoRA), which works alone; activate it alone (set_adapter), or combine "
                "adapters with the same tokens (add_weighted_adapter)"
            )
        if first is None:
            raise ValueError(
                f"{caller}: the active adapter {active[0]!r} acts from its invocation tokens on (aLoRA), but the call "
                "has no input_ids"
            )
        choice = _choice(root, adapters, [active[0]] * first[1].shape[0], caller, f"the active adapter {active[0]!r}")
        choice.is_of_active = True
        return choice
    choice = _choice(root, adapters, names, caller)
    if first is not None and first[1].shape[0] != len(choice.rows):
        raise ValueError(
            f"{caller}: adapter_names has {len(choice.rows)} names, but {first[0]} has {first[1].shape[0]} rows; "
            "pass a name for each row"
        )
    return choice


def _multiples(
    caller: str, root: nn.Module, choice: RowChoice, values: Mapping[str, Any]
) -> tuple[int, frozenset[int]]:
    """How many rows of the batch belong to each name, and how many of a layer's input may."""
    first = first_rows(values, getattr(root, "main_input_name", None))
    if first is None:
        return 1, choice.multiples
    argument, tensor = first
    times, rest = divmod(tensor.shape[0], len(choice.rows))
    if rest:
        raise ValueError(
            f"{caller}: adapter_names has {len(choice.rows)} names, but {argument} has {tensor.shape[0]} rows, "
            "which is no multiple of them"
        )
    return times, token_multiples(values, tensor.shape[0], times)


def _invocations(choice: RowChoice) -> Mapping[str, tuple[int, ...]]:
    """The invocation tokens of the chosen adapters that act from them on; a choice of a pool must be in force."""
    known = choice.active.invocations
    return known | choice.pool.invocations(choice.pool_names) if choice.pool_names else known


def _are_invoked(choice: RowChoice) -> bool:
    return are_invoked(choice.names, _invocations(choice))


def choose_tokens(choice: RowChoice, times: int, values: Mapping[str, Any], caller: str) -> None:
    """Notes on which tokens of a call the adapters of ``choice`` act, which is in force."""
    if not _are_invoked(choice):
        return
    first = 0
    if choice.starts is None:
        names = [name for name in choice.names_of_rows for _ in range(times)]
        starts, times = find_starts(values, names, _invocations(choice), caller), 1
    else:  # a step of generate
        starts, first = choice.starts, past_tokens(values, choice.prompt, caller)
    choice.tokens = active_tokens(starts, times, values, first, caller)
    choice.invoked = frozenset(_invocations(choice)).intersection(choice.names)
    choice.is_plain = choice.is_of_active and choice.tokens.are_all


def _without_names(kwargs: dict[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in kwargs.items() if name not in (_ARGUMENT, OFFSETS)}


def _values(args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> dict[str, Any]:
    return {position(i): value for i, value in enumerate(args, start=1)} | dict(kwargs)


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
        drop_interrupted()
        active, names = self.adapters.active, kwargs.get(_ARGUMENT)
        rest, outer = _without_names(kwargs), chosen(active) if active.row_calls else None
        if names is None and not (active.invoked if outer is None else _are_invoked(outer)):
            return self.original(*args, **rest)
        caller = f"{type(self.model).__name__}.{_METHOD}"
        values = _values(args, kwargs)
        choice = _choice_of_call(self.model, self.adapters, values, outer, caller)
        if outer is not None and names is None:  # a name may be for several prompts, with other places
            choice = choice.repeated(_multiples(caller, self.model, choice, values)[0])
        with choosing(choice):
            if _are_invoked(choice):
                choice.starts = find_starts(values, choice.names_of_rows, _invocations(choice), caller)
                choice.prompt = tokens_in_row(values, caller)
            return self.original(*args, **rest)
