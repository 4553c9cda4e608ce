"""``model(..., adapter_names=[...])``: an adapter for each row of the batch.

With ``adapter_lengths``, or in rows that hold several sequences, a name is for some of the tokens
(lora_ext/model/rows/adapter_lengths.py).

Hooks of the model take the argument, as most models would swallow it in their ``**kwargs``. They check everything
before the model runs, and put the choice in force for the layers (lora_ext/nn/rows/in_force.py).
"""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from lora_ext._common.printable import shown
from lora_ext.model.adapter_set import AdapterSet, adapter_set
from lora_ext.model.rows.adapter_lengths import find_invocations, fit, sequence_lengths
from lora_ext.model.rows.arguments import (
    LENGTHS,
    NAMES,
    first_rows,
    media_of,
    token_ids,
    token_multiples,
    values_of,
    without_names,
)
from lora_ext.model.rows.choose_adapters import choice_of
from lora_ext.model.rows.invocations import active_tokens, are_invoked, find_starts, past_tokens
from lora_ext.model.rows.obstacles import media_tokens, obstacles_of
from lora_ext.nn.rows.choice import RowChoice
from lora_ext.nn.rows.in_force import check_order, chosen, drop_interrupted, enter, leave
from lora_ext.nn.rows.packed import PackedChoice

if TYPE_CHECKING:
    from lora_ext.nn.active import ActiveAdapters


def take_adapter_names(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple | None:
    """Takes ``adapter_names`` out of the arguments and puts the choice in force; a hook before the forward."""
    adapters = adapter_set(module)
    active, names = adapters.active, kwargs.get(NAMES)
    rest = without_names(kwargs)
    is_compiled = torch.compiler.is_compiling()
    if is_compiled or torch.jit.is_tracing():
        if names is not None or active.row_calls > 0:
            from lora_ext.nn.rows.compiled import refuse_compiled

            refuse_compiled()
        if not is_compiled and active.invoked:  # in compiled code, layers refuse (check_invoked)
            from lora_ext.nn.rows.compiled import refuse_invoked

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
    names = values.get(NAMES)
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
    if times > 1 and len(set(choice.rows)) > 1 and (remedy := _remedy_of_doubled(root)):
        raise ValueError(
            f"{caller}: adapter_names has {len(choice.rows)} names, but {argument} has {tensor.shape[0]} rows; {remedy}"
        )
    check_media(caller, root, choice, values)
    return times, token_multiples(values, tensor.shape[0], times)


def check_media(caller: str, root: nn.Module, choice: RowChoice, values: Mapping[str, Any]) -> None:
    """Checks that images and sounds, which models compute in one batch, are evenly spread over rows that differ.

    They are if there are as many as rows and each row has some, or if each row has as many tokens of them.
    """
    if len(set(choice.rows)) < 2 or not (media := media_of(values)) or (ids := token_ids(values)) is None:
        return
    to_media = obstacles_of(root, adapter_set(root)).to_media
    held = [name for name in choice.names if (None if name in choice.pool_names else name) in to_media]
    for option, token in media_tokens(root).items() if held else ():
        counts = (ids == token).sum(1).tolist()
        if len(set(counts)) > 1 and (0 in counts or len(media[1]) != len(counts)):
            path = to_media[None if held[0] in choice.pool_names else held[0]]
            raise ValueError(
                f"{caller}: adapter_names: the rows have {shown(counts)} tokens of {media[0]} ({option}), so a layer "
                f"that computes these cannot tell to which name they belong, and {held[0]!r} adapts {path!r}; pass "
                "rows with as many each, leave this module out of the adapters, or call the model once for each "
                "adapter (set_adapter)"
            )


def _remedy_of_doubled(root: nn.Module) -> str | None:
    """Returns what to do about a batch of all prompts and then all again (guidance); None: beams stand side by side."""
    modules = [kind.__module__ for kind in type(root).__mro__]
    if any(module.startswith("diffusers.") for module in modules):
        return (
            "pass a name for each row: with guidance, pipelines of diffusers put all prompts into a batch twice "
            "(names * 2)"
        )
    if any(module.startswith("transformers.models.dia.") for module in modules):
        return (
            "with guidance, Dia puts all prompts into a batch twice; pass guidance_scale=1 and one sequence for each "
            "prompt, or call it once for each adapter (set_adapter)"
        )
    return None


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
        if choice.before is None:
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
