"""The choice that layers find while the model runs.

A choice belongs to a call and its thread: a context variable holds it, and the model does not change. So threads may
run one model with different choices at the same time. Activation checkpointing runs a part of the forward again in the
backward, when the call is long over; :func:`_follow_checkpoints` gives that part its choice.
"""

from __future__ import annotations

import sys
import threading
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from contextvars import ContextVar
from types import FrameType
from typing import TYPE_CHECKING, Any

import torch

from lora_ext.nn.checkpointed_parts import checkpointed, frame_of_hook, graph_hook, is_of_checkpoint
from lora_ext.nn.rows.choice import RowChoice

if TYPE_CHECKING:
    from lora_ext.nn.active import ActiveAdapters
    from lora_ext.nn.adapter_layer import AdapterLayer

_current: ContextVar[RowChoice | None] = ContextVar("lora_ext_row_choice", default=None)
_count_lock = threading.Lock()


def row_choice(active: ActiveAdapters) -> RowChoice | None:
    """Returns the choice that is in force for layers that share ``active``, or None."""
    if torch.compiler.is_compiling():
        # Compiled code holds for all choices: it guards on whether some thread's rows choose, and then asks.
        if active.row_calls > 0:
            from lora_ext.nn.rows.compiled import refuse_if_chosen

            refuse_if_chosen(active)
        return None
    choice = chosen(active)
    if choice is None:
        return None
    choice.check_present()
    if choice.has_gradients:
        _follow_checkpoints(choice)
    return None if choice.is_plain else choice


def check_invoked(layer: AdapterLayer) -> None:
    """Checks that a layer may use its active adapters on all tokens.

    Raises:
        RuntimeError: one acts from its invocation tokens on (aLoRA), and a module was called alone, so that no one has
            looked for them.
        ValueError: the same in compiled code.
    """
    names = [name for name in layer.active.invoked if name in layer.adapters]
    if not names:
        return
    if torch.compiler.is_compiling():
        from lora_ext.nn.rows.compiled import refuse_invoked

        refuse_invoked()
    if chosen(layer.active) is None:
        raise RuntimeError(
            f"{type(layer).__name__}: the adapter {names[0]!r} acts from its invocation tokens on (aLoRA), which only "
            "a call of the injected model sees; call that, and not a module in it, or use another adapter (set_adapter)"
        )


def chosen(active: ActiveAdapters) -> RowChoice | None:
    """Returns the choice as :func:`row_choice` does, for callers that are not layers."""
    choice = _current.get()
    while choice is not None and (choice.active is not active or choice.has_ended):  # ended: of a task that goes on
        choice = choice.outer
    return choice


# --- the time of a choice ---------------------------------------------------------------------------------------------


def enter(choice: RowChoice, holder: FrameType | None = None) -> None:
    """Begins a call with ``choice``, which :func:`leave` ends. Raises what the pool does that cannot serve it."""
    if choice.pool_names:
        choice.slots = choice.pool.acquire(choice.pool_names)
    choice.outer, choice.has_ended, choice.holder = _current.get(), False, holder
    if holder is not None:
        around = _chain(choice.outer)
        choice.suspended = tuple(one for one in around if one.holder is not None and not _is_running((one.holder,)))
    with _count_lock:
        choice.active.row_calls += 1
        choice.active.held = (*choice.active.held, *([choice] if holder is not None else []))
    choice.has_gradients = torch.is_grad_enabled()
    _current.set(choice)


def leave(choice: RowChoice) -> None:
    """Ends a call, and those within it that Ctrl-C left without running their hooks.

    Choices of generators that take turns may begin before this one ends, and end later; they stay. A choice that began
    in another thread or task is not in this one's chain.
    """
    around, within = choice.outer, list(_chain(_current.get()))
    if choice in within:
        within = within[: within.index(choice)]
        for inner in reversed(within):
            if inner.frames:
                _end(inner)
            else:
                inner.outer, around = around, inner
        _current.set(around)
    _end(choice)


def _end(choice: RowChoice) -> None:
    choice.frames, choice.holder, choice.suspended = (), None, ()
    with _count_lock:
        if choice.has_ended:
            return
        choice.has_ended = True
        choice.active.row_calls -= 1
        choice.active.held = tuple(one for one in choice.active.held if one is not choice)
    if choice.pool_names:
        choice.pool.release(choice.pool_names)


def _chain(choice: RowChoice | None) -> Iterator[RowChoice]:
    """Yields a choice and those around it."""
    while choice is not None:
        yield choice
        choice = choice.outer


@contextmanager
def choosing(choice: RowChoice, holder: FrameType | None = None) -> Iterator[None]:
    """Puts ``choice`` in force within the context. RuntimeError: see :meth:`RowChoice.check_present`.

    Args:
        holder: the frame that has the context.
    """
    enter(choice, holder)
    try:
        yield
        choice.check_present()
    finally:
        leave(choice)


def check_order(active: ActiveAdapters) -> None:
    """Checks that a call within a context that chose adapters uses these, and not those of another context.

    RuntimeError: a generator has the context, and went on after another context began, or in another thread or task.
    """
    held = {choice.holder: choice for choice in active.held}
    if not held:
        return
    frame: FrameType | None = sys._getframe(1)
    while frame is not None and frame not in held:
        frame = frame.f_back
    mine = held.get(frame)
    for choice in _chain(_current.get()) if mine is not None else ():
        if choice is mine:
            return
        if mine in choice.suspended:
            break
    if mine is not None:
        raise RuntimeError(
            f"choose_adapters: a generator yielded within the context that chose {mine.names_of_rows}, and goes on "
            "after another context began, or in another thread or task, where this call would use other adapters; let "
            "no generator yield within the context, or pass adapter_names to the model"
        )


def holder_of_context() -> FrameType | None:
    """Returns the frame whose ``with`` block the caller is for: a generator function under ``contextmanager``."""
    frame: FrameType | None = sys._getframe(2)
    while frame is not None and frame.f_globals.get("__name__") == "contextlib":
        frame = frame.f_back
    return frame


def drop_interrupted() -> None:
    """Ends calls that Ctrl-C left without running their hooks: their frames are not on the stack."""
    choice = _current.get()
    while choice is not None and choice.frames and not _is_running(choice.frames):
        leave(choice)
        choice = choice.outer


def _is_running(frames: tuple[FrameType | None, ...]) -> bool:
    frame: FrameType | None = sys._getframe(1)
    while frame is not None:
        if frame in frames:
            return True
        frame = frame.f_back
    return False


# --- activation checkpointing -----------------------------------------------------------------------------------------


class _Recompute:
    """Runs a checkpointed function again with the choices of its first run, one for each model that is called in it."""

    def __init__(self, function: Any) -> None:
        self.function = function
        self.choices: dict[ActiveAdapters, RowChoice] = {}

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        with ExitStack() as stack:
            for choice in self.choices.values():
                stack.enter_context(choosing(choice.copied()))  # in the backward, other calls may be around it
            return self.function(*args, **kwargs)


def _follow_checkpoints(choice: RowChoice) -> None:
    """Makes the checkpointed functions that are running now run again with ``choice``.

    They are found on the stack, and the innermost one by its hook, too: other code may run the checkpoint's generator.

    Raises:
        RuntimeError: PyTorch runs a checkpoint that is not found: its parts would run again with other adapters.
    """
    hook, found = graph_hook(), False
    frame: FrameType | None = sys._getframe(2)
    while frame is not None and frame.f_code is not _RECOMPUTE:
        if (held := checkpointed(frame)) is not None:
            found = True
            _follow(*held, choice)
        frame = frame.f_back
    if frame is not None or not is_of_checkpoint(hook):
        return
    if (held := frame_of_hook(hook)) is not None:
        _follow(held, "recompute_fn", choice)
    elif not found:
        raise RuntimeError(
            f"adapter_names: this activation checkpointing of PyTorch {torch.__version__} is not known, and would run "
            "layers again with other adapters; checkpoint with use_reentrant=True, or train without checkpointing"
        )


def _follow(owner: Any, attribute: str, choice: RowChoice) -> None:
    function = getattr(owner, attribute)
    if not isinstance(function, _Recompute):
        function = _Recompute(function)
        setattr(owner, attribute, function)
    function.choices[choice.active] = choice


_RECOMPUTE = _Recompute.__call__.__code__
