"""Rows of a batch that choose their adapters: which one each row uses, for the layers of the model that is called.

A choice belongs to a call and its thread: a context variable holds it, and the model does not change. So threads may
run one model with different choices at the same time. Activation checkpointing runs a part of the forward again in the
backward, when the call is long over; :func:`_follow_checkpoints` gives that part its choice.
"""

from __future__ import annotations

import copy
import sys
import threading
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from contextvars import ContextVar
from types import FrameType
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from lora_ext.nn.checkpointed_parts import checkpointed, frame_of_hook, graph_hook, is_of_checkpoint
from lora_ext.nn.invocations import ActiveTokens

if TYPE_CHECKING:
    from lora_ext.nn.active import ActiveAdapters
    from lora_ext.nn.adapter_layer import AdapterLayer

BASE = "__base__"
"""The name that stands for no adapter, as in PEFT."""

_current: ContextVar[RowChoice | None] = ContextVar("lora_ext_row_choice", default=None)
_count_lock = threading.Lock()


class RowChoice:
    """The adapters that the rows of a batch use.

    Attributes:
        active: the shared state of the layers that the choice is for; None: the caller gives it to the layers.
        names: the distinct names, without :data:`BASE`.
        rows: for each row the position of its name in ``names``, or -1.
        multiples: how many rows of a layer's input may belong to one name. A batch of ``n`` names has ``n`` rows; the
            beams of a search make them ``n * beams``, and models that flatten their tokens ``n * length``.
        pool: gives the names in ``pool_names`` slots for the time of the call; the others are adapters of the layers.
        slots: by name.
        has_gradients: whether gradients were enabled when the call began; reentrant checkpoints disable them in it.
        outer: the choice of the call around this one, which may be of another model.
        frames: the Python frames of the call, if it has no other end than them.
        starts: in ``generate``, for each row the position in the prompt from which on its adapter acts, or None if it
            does not act: its invocation tokens are not there (aLoRA).
        prompt: in ``generate``, the number of tokens in a row of the prompt.
        tokens: in a model's call, on which tokens the chosen adapters act; None: on all.
        invoked: the names that act on ``tokens`` only.
        is_of_active: whether all rows use the active adapter, because it acts on ``tokens`` only.
        is_plain: whether the layers' usual forward computes the same.
        may_lose: whether adapters may be deleted or renamed meanwhile: the caller drops the rows that used them.
    """

    def __init__(self, active: ActiveAdapters | None, names: Sequence[str]) -> None:
        self.active = active
        numbers = {name: i for i, name in enumerate(dict.fromkeys(name for name in names if name != BASE))}
        self.names = tuple(numbers)
        self.rows = [numbers.get(name, -1) for name in names]
        self.multiples = frozenset((1,))
        self.slots: Mapping[str, int] = {}
        self.pool: Any = None
        self.pool_names: tuple[str, ...] = ()
        self.has_gradients = False
        self.outer: RowChoice | None = None
        self.frames: tuple[FrameType | None, ...] = ()
        self.starts: list[int | None] | None = None
        self.prompt = 0
        self.tokens: ActiveTokens | None = None
        self.invoked: frozenset[str] = frozenset()
        self.is_of_active = self.is_plain = self.may_lose = False
        additions, self._removals = ({}, 0) if active is None else (active.additions, active.removals)
        self._additions = {name: additions.get(name) for name in self.names}
        self._groups: dict[tuple, Tensor] = {}
        self._scalings: dict[tuple, Tensor] = {}

    @property
    def names_of_rows(self) -> list[str]:
        """A name for each row."""
        return [self.names[i] if i >= 0 else BASE for i in self.rows]

    @property
    def lost(self) -> list[str]:
        """The adapters that were deleted or renamed since the call's begin."""
        return [name for name, addition in self._additions.items() if self.active.additions.get(name) != addition]

    def check_present(self) -> None:
        """Checks that the adapters are those of the call's begin. RuntimeError: one was deleted or renamed since.

        Layers cannot tell: an adapter that a layer lacks changes nothing there.
        """
        if self.active.removals == self._removals or self.may_lose:
            return
        for name in self.lost:
            raise RuntimeError(
                f"adapter_names: {name!r} was deleted or renamed during a call whose rows use it; wait for the end "
                "of such calls first"
            )

    def copied(self) -> RowChoice:
        """Returns the same choice for another call, which may come at any time and on another device."""
        choice = copy.copy(self)
        choice.frames, choice._groups = (), {}
        return choice

    def repeated(self, times: int) -> RowChoice:
        """Returns the choice with a name of its own for each of the ``times`` rows that share one."""
        if times == 1:
            return self
        choice = RowChoice(self.active, [name for name in self.names_of_rows for _ in range(times)])
        choice.pool, choice.pool_names, choice.is_of_active = self.pool, self.pool_names, self.is_of_active
        return choice

    def aligned(self, layer: AdapterLayer, x: Tensor) -> tuple[Tensor, int]:
        """Returns ``x`` and how many consecutive rows of it belong to each name.

        A single row, such as the position ids of all rows of the batch, is repeated for each name.

        Raises:
            ValueError: the first dimension of ``x`` does not fit the names.
        """
        n = len(self.rows)
        rows = x.shape[0] if x.dim() else 0
        is_last = x.dim() > 2 and x.shape[1] == n  # may be [length, batch, features]
        if rows == n:
            return x, 1
        if rows == 1 and not is_last:
            return x.expand(n, *x.shape[1:]), 1
        times, rest = divmod(rows, n) if n else (0, rows)
        if rest or times not in self.multiples:
            raise ValueError(
                f"{type(layer).__name__}: adapter_names has {n} names, but the layer's input has the shape "
                f"{list(x.shape)}, whose rows do not belong to one name each; leave this module out of the adapters, "
                "or call the model once for each adapter (set_adapter)"
            )
        return x, times

    def groups(self, present: tuple[str, ...], times: int, device: torch.device) -> Tensor:
        """Returns, for each row of a layer's input, its name's position in ``present``, int64 ``[rows]``; -1: none."""
        key = present, times, device
        groups = self._groups.get(key)
        if groups is None:
            numbers = {name: i for i, name in enumerate(present)}
            groups = self._groups[key] = self._of_rows(numbers, times, device)
        return groups

    def row_groups(self, present: tuple[str, ...], times: int, x: Tensor, layer: AdapterLayer) -> tuple[Tensor, int]:
        """Returns :meth:`groups`, int64 ``[n]``, and how many first dimensions of ``x`` count these ``n``.

        Args:
            x: the layer's input, aligned.
            layer: the layer, for messages.
        """
        return self.groups(present, times, x.device), 1

    def token_groups(self, present: tuple[str, ...], times: int, x: Tensor, layer: AdapterLayer | None) -> Tensor:
        """Returns :meth:`groups`, or int64 ``[rows, tokens]`` if adapters act on a part of the tokens.

        Args:
            x: the layer's input or output.
            layer: the layer, for messages.
        """
        groups = self.groups(present, times, x.device)
        is_whole = self.tokens is None or self.invoked.isdisjoint(present)
        return groups if is_whole else self.tokens.groups(layer, groups, x)

    def slots_of(self, x: Tensor, times: int, layer: AdapterLayer | None) -> Tensor:
        """Returns the slot of each row (or token) of a layer's input, as :meth:`token_groups`; -1: none."""
        slots = self._slot_groups(times, x.device)
        is_whole = self.tokens is None or self.invoked.isdisjoint(self.slots)
        return slots if is_whole else self.tokens.groups(layer, slots, x)

    def _slot_groups(self, times: int, device: torch.device) -> Tensor:
        key = None, times, device
        slots = self._groups.get(key)
        if slots is None:
            slots = self._groups[key] = self._of_rows(self.slots, times, device)
        return slots

    def scalings(self, values: tuple[float, ...], device: torch.device) -> Tensor:
        """``values`` as float64 on ``device``, kept for the next layer: a copy to a GPU waits for it."""
        found = self._scalings.get((values, device))
        if found is None:
            with torch.inference_mode(False):
                found = self._scalings[values, device] = torch.tensor(values, dtype=torch.float64, device=device)
        return found

    def _of_rows(self, numbers: Mapping[str, int], times: int, device: torch.device) -> Tensor:
        of_name = [numbers.get(name, -1) for name in self.names] + [-1]  # index -1: BASE
        of_row = [of_name[i] for i in self.rows for _ in range(times)]
        with torch.inference_mode(False):  # a later call may be recorded by autograd
            return torch.tensor(of_row, dtype=torch.int64, device=device)


def row_choice(active: ActiveAdapters) -> RowChoice | None:
    """Returns the choice that is in force for layers that share ``active``, or None."""
    if torch.compiler.is_compiling():
        # Compiled code holds for all choices: it guards on whether some thread's rows choose, and then asks.
        if active.row_calls > 0:
            from lora_ext.nn.compiled_rows import refuse_if_chosen

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
        from lora_ext.nn.compiled_rows import refuse_invoked

        refuse_invoked()
    if chosen(layer.active) is None:
        raise RuntimeError(
            f"{type(layer).__name__}: the adapter {names[0]!r} acts from its invocation tokens on (aLoRA), which only "
            "a call of the injected model sees; call that, and not a module in it, or use another adapter (set_adapter)"
        )


def chosen(active: ActiveAdapters) -> RowChoice | None:
    """Returns the choice as :func:`row_choice` does, for callers that are not layers."""
    choice = _current.get()
    while choice is not None and choice.active is not active:
        choice = choice.outer
    return choice


# --- the time of a choice ---------------------------------------------------------------------------------------------


def enter(choice: RowChoice) -> None:
    """Begins a call with ``choice``, which :func:`leave` ends. Raises what the pool does that cannot serve it."""
    if choice.pool_names:
        choice.slots = choice.pool.acquire(choice.pool_names)
    with _count_lock:
        choice.active.row_calls += 1
    choice.outer = _current.get()
    choice.has_gradients = torch.is_grad_enabled()
    _current.set(choice)


def leave(choice: RowChoice) -> None:
    """Ends a call, and those within it that Ctrl-C left without running their hooks."""
    ended, inner = [choice], _current.get()
    while inner is not None and inner is not choice:
        ended.append(inner)
        inner = inner.outer
    _current.set(choice.outer)
    for call in ended if inner is choice else ended[:1]:
        call.frames = ()
        with _count_lock:
            call.active.row_calls -= 1
        if call.pool_names:
            call.pool.release(call.pool_names)


@contextmanager
def choosing(choice: RowChoice) -> Iterator[None]:
    """Puts ``choice`` in force within the context. RuntimeError: see :meth:`RowChoice.check_present`."""
    enter(choice)
    try:
        yield
        choice.check_present()
    finally:
        leave(choice)


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

# --- the arguments of a call ------------------------------------------------------------------------------------------


def first_rows(values: Mapping[str, Any], main: str | None) -> tuple[str, Tensor] | None:
    """Returns the name and the value of the argument that says how many rows a batch has, or None."""
    tensors = dict(_tensors(values))
    for name in (main, "input_ids", "decoder_input_ids", "inputs_embeds", *tensors):
        if name in tensors:
            return name, tensors[name]
    return None


def _tensors(values: Mapping[str, Any]) -> Iterator[tuple[str, Tensor]]:
    for name, value in values.items():
        if isinstance(value, Tensor):
            if value.dim():
                yield name, value
        elif isinstance(value, Mapping):
            yield from _tensors(value)


def token_multiples(values: Mapping[str, Any], rows: int, times: int) -> frozenset[int]:
    """Returns how many rows of a layer's input may belong to one name: 1, ``times``, or all their tokens.

    Args:
        values: the arguments of the model's forward.
        rows: of its batch.
        times: the rows of the batch that belong to one name.
    """
    lengths = {tensor.shape[1] for _, tensor in _tensors(values) if tensor.dim() > 1 and tensor.shape[0] == rows}
    return frozenset((1, times, *(times * length for length in lengths)))
