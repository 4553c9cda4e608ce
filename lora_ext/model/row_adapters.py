"""``model(..., adapter_names=[...])`` and ``model.generate(..., adapter_names=[...])``: an adapter for each row.

With ``adapter_lengths``, or in rows that hold several sequences, a name is for some of the tokens
(lora_ext/model/packed_rows.py).

Hooks of the model take the argument, as most models would swallow it in their ``**kwargs``. They check everything
before the model runs, and put the choice in force for the layers (lora_ext/nn/rows.py).
"""

from __future__ import annotations

import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor, nn

from lora_ext._common.arguments import checked
from lora_ext._common.changes import one_at_a_time
from lora_ext.model.adapter_set import AdapterSet, adapter_set, check_names, find_adapters
from lora_ext.model.bare_model import adapter_layers, root_module
from lora_ext.model.invocations import (
    OFFSETS,
    active_tokens,
    are_invoked,
    find_starts,
    past_tokens,
    position,
)
from lora_ext.model.packed_rows import LENGTHS, checked_lengths, find_invocations, fit, sequence_lengths
from lora_ext.nn import LoraLayer
from lora_ext.nn.adapter_layer import innermost
from lora_ext.nn.choice import BASE, RowChoice
from lora_ext.nn.packed_rows import PackedChoice
from lora_ext.nn.row_arguments import first_rows, token_multiples
from lora_ext.nn.rows import check_order, choosing, chosen, drop_interrupted, enter, holder_of_context, leave

if TYPE_CHECKING:
    from lora_ext.nn.active import ActiveAdapters

ARGUMENT = "adapter_names"


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
    if isinstance(names, str) or not isinstance(names, Sequence) or not all(isinstance(name, kinds) for name in names):
        raise TypeError(f"{caller}: {ARGUMENT} is of type {type(names).__name__}, want a list with a name per {per}")


def choice_of(
    root: nn.Module, adapters: AdapterSet, names: object, caller: str, lengths: object = None, what: str = ARGUMENT
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
    obstacles = _obstacles(root, adapters)
    if obstacles.to_all:
        raise ValueError(f"{caller}: {what}: {obstacles.to_all}")
    for name in used:
        if name in obstacles.to_one:
            raise ValueError(f"{caller}: adapter_names: {name!r} cannot be chosen by a row: {obstacles.to_one[name]}")
        if lengths is not None and (reason := obstacles.to_tokens.get(None if name in pooled else name)):
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
    return choice


class _Obstacles(NamedTuple):
    """Reasons why rows cannot choose: any adapter (or ""), and by name those that rows, or only tokens, cannot choose.

    The name None stands for the adapters of a pool.
    """

    to_all: str
    to_one: dict[str, str]
    to_tokens: dict[str | None, str]


def _obstacles(root: nn.Module, adapters: AdapterSet) -> _Obstacles:
    """Walks the model once after every change of its adapters."""
    known = adapters.active.row_obstacles
    return known[1] if known is not None and known[0] == adapters.active.changes else _found_obstacles(root, adapters)


@one_at_a_time  # another thread may be adding layers
def _found_obstacles(root: nn.Module, adapters: AdapterSet) -> _Obstacles:
    active, changes = adapters.active, adapters.active.changes
    to_all, to_one, to_tokens = "", {}, {}
    for path, layer in adapter_layers(root):
        if isinstance(layer, LoraLayer) and layer.is_merged and not to_all:
            names = ", ".join(map(repr, layer.merged_adapters))
            to_all = f"{names} is merged into {path!r}, so every row gets it; call unmerge(model) first"
        if not layer.rows_choose:
            reason = f"{path!r} is a {type(layer).__name__}, which computes all rows with one adapter"
            to_one = dict.fromkeys(layer.adapters, f"{reason}; call set_adapter and the model once for it") | to_one
        if layer.rows_choose and not layer.tokens_choose:
            base = type(innermost(layer)).__name__
            reason = f"{path!r} is a {base}, which may mix the tokens of a row; pass a sequence for each row"
            holders = [*layer.adapters, *([None] if getattr(layer, "slots", None) is not None else [])]
            to_tokens = dict.fromkeys(holders, reason) | to_tokens
    for name, biases in adapters.biases.items():
        to_one[name] = "it trains the model's biases, which all rows share; train it with lora_bias=True instead"
        if biases.used:
            to_all = to_all or (
                f"the active adapter {name!r} has changed the model's biases for all rows; activate another one "
                "(set_adapter), or none"
            )
    obstacles = _Obstacles(to_all, to_one, to_tokens)
    active.row_obstacles = changes, obstacles
    return obstacles


# --- the model's call -------------------------------------------------------------------------------------------------


def take_adapter_names(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple | None:
    """Takes ``adapter_names`` out of the arguments and puts the choice in force; a hook before the forward."""
    adapters = adapter_set(module)
    active, names = adapters.active, kwargs.get(ARGUMENT)
    rest = without_names(kwargs)
    is_compiled = torch.compiler.is_compiling()
    if is_compiled or torch.jit.is_tracing():
        if names is not None or active.row_calls > 0:
            from lora_ext.nn.compiled_rows import refuse_compiled

            refuse_compiled()
        if not is_compiled and active.invoked:  # in compiled code, layers refuse (check_invoked)
            from lora_ext.nn.compiled_rows import refuse_invoked

            refuse_invoked()
        return (args, rest) if len(rest) < len(kwargs) else None
    drop_interrupted()
    if names is None:
        check_order(active)
    outer = chosen(active) if active.row_calls else None
    if names is None and LENGTHS not in kwargs and not _chooses_by_call(active, outer):
        if outer is not None:
            outer.multiples = multiples(type(module).__name__, module, outer, values_of(args, rest))[1]
        return (args, rest) if len(rest) < len(kwargs) else None
    values, caller = values_of(args, kwargs), type(module).__name__
    lengths, times = values.pop(LENGTHS, None), 1
    choice = choice_of_call(module, adapters, values, lengths, outer, caller)
    if isinstance(choice, PackedChoice):
        fit(choice, module, values, caller)
    else:
        times, choice.multiples = multiples(caller, module, choice, values)
    enter(choice)
    try:
        choose_tokens(choice, times, values, caller)
    except BaseException:
        leave(choice)
        raise
    frame = sys._getframe(1)
    choice.frames = frame, frame.f_back  # a hook after an error is called from the outer one
    return args, rest


def end_choice(module: nn.Module, *_: Any) -> None:
    """Ends the choice that the call began; a hook after the forward, which also runs after an error."""
    if torch.compiler.is_compiling():
        return
    adapters = adapter_set(module)
    choice = chosen(adapters.active) if adapters.active.row_calls else None
    if choice is not None and sys._getframe(1) in choice.frames:
        leave(choice)
        choice.check_present()


def _chooses_by_call(active: ActiveAdapters, outer: RowChoice | None) -> bool:
    """Returns whether a call that names no adapters needs a choice of its own: another one has other tokens."""
    return bool(active.invoked) if outer is None else isinstance(outer, PackedChoice) or is_invoked(outer)


def choice_of_call(
    root: nn.Module,
    adapters: AdapterSet,
    values: Mapping[str, Any],
    lengths: object,
    outer: RowChoice | None,
    caller: str,
) -> RowChoice:
    """The choice of a call: of its ``adapter_names``, of the call around it, or of the active adapter (aLoRA)."""
    names = values.get(ARGUMENT)
    first = first_rows(values, getattr(root, "main_input_name", None))
    if names is None and lengths is not None:
        raise ValueError(f"{caller}: {LENGTHS} needs adapter_names, a name for each entry")
    if names is None and outer is not None:
        return outer.copied()
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
        names, what = [active[0]] * first[1].shape[0], f"the active adapter {active[0]!r}"
        choice = choice_of(root, adapters, names, caller, what=what)
        choice.is_of_active = True
        return choice
    rows = None if first is None else first[1].shape[0]
    if lengths is None and rows is not None and isinstance(names, Sequence) and len(names) != rows:
        lengths = sequence_lengths(values, len(names))
    choice = choice_of(root, adapters, names, caller, lengths)
    if lengths is None and rows is not None and rows != len(choice.rows):
        raise ValueError(
            f"{caller}: adapter_names has {len(choice.rows)} names, but {first[0]} has {rows} rows; "
            f"pass a name for each row, or to the model's forward {LENGTHS}, the number of tokens of each name, if "
            "rows hold several sequences"
        )
    return choice


def multiples(caller: str, root: nn.Module, choice: RowChoice, values: Mapping[str, Any]) -> tuple[int, frozenset[int]]:
    """Counts the rows of the batch that belong to each name, and those of a layer's input that may."""
    first = first_rows(values, getattr(root, "main_input_name", None))
    if first is None:
        return 1, choice.multiples
    argument, tensor = first
    times, rest = divmod(tensor.shape[0], len(choice.rows))
    if rest:
        raise ValueError(
            f"{caller}: adapter_names has {len(choice.rows)} names, but {argument} has {tensor.shape[0]} rows, "
            "which is not a multiple of them"
        )
    if times > 1 and len(set(choice.rows)) > 1 and _is_of_diffusers(root):
        raise ValueError(
            f"{caller}: adapter_names has {len(choice.rows)} names, but {argument} has {tensor.shape[0]} rows; pass a "
            "name for each row: with guidance, pipelines of diffusers put all prompts into a batch twice (names * 2)"
        )
    return times, token_multiples(values, tensor.shape[0], times)


def _is_of_diffusers(root: nn.Module) -> bool:
    return any(kind.__module__.startswith("diffusers.") for kind in type(root).__mro__)


def invocations_of(choice: RowChoice) -> Mapping[str, tuple[int, ...]]:
    """The invocation tokens of the chosen adapters that act from them on; a choice of a pool must be in force."""
    known = choice.active.invocations
    return known | choice.pool.invocations(choice.pool_names) if choice.pool_names else known


def is_invoked(choice: RowChoice) -> bool:
    return are_invoked(choice.names, invocations_of(choice))


def choose_tokens(choice: RowChoice, times: int, values: Mapping[str, Any], caller: str) -> None:
    """Notes on which tokens of a call the adapters of ``choice`` act, which is in force."""
    if not is_invoked(choice):
        return
    if isinstance(choice, PackedChoice):
        if choice.silent is None:
            find_invocations(choice, choice.names_of_rows, invocations_of(choice), values, caller)
        return
    first = 0
    if choice.starts is None:
        names = [name for name in choice.names_of_rows for _ in range(times)]
        starts, times = find_starts(values, names, invocations_of(choice), caller), 1
    else:  # a step of generate
        starts, first = choice.starts, past_tokens(values, choice.prompt, caller)
    choice.tokens = active_tokens(starts, times, values, first, caller)
    choice.invoked = frozenset(invocations_of(choice)).intersection(choice.names)
    choice.is_plain = choice.is_of_active and choice.tokens.are_all


def without_names(kwargs: dict[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in kwargs.items() if name not in (ARGUMENT, LENGTHS, OFFSETS)}


def values_of(args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> dict[str, Any]:
    return {position(i): value for i, value in enumerate(args, start=1)} | dict(kwargs)
