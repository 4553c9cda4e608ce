"""Which adapter each row of a batch uses."""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from types import FrameType
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from lora_ext.nn.rows.active_tokens import ActiveTokens

if TYPE_CHECKING:
    from lora_ext.nn.active import ActiveAdapters
    from lora_ext.nn.adapter_layer import AdapterLayer

BASE = "__base__"
"""The name that stands for no adapter, as in PEFT."""


class RowChoice:
    """The adapters that the rows of a batch use.

    Attributes:
        active: the shared state of the layers that the choice is for; None: the caller gives it to the layers.
        names: the distinct names, without :data:`BASE`.
        rows: for each row the position of its name in ``names``, or -1.
        is_uniform: whether all rows have one name and a layer may get any number of rows, as :meth:`aligned` counts.
        multiples: how many rows of a layer's input may belong to one name. A batch of ``n`` names has ``n`` rows; the
            beams of a search make them ``n * beams``, and models that flatten their tokens ``n * length``.
        pool: gives the names in ``pool_names`` slots for the time of the call; the others are adapters of the layers.
        slots: by name.
        has_gradients: whether gradients were enabled when the call began; reentrant checkpoints disable them in it.
        outer: the choice of the call around this one, which may be of another model.
        frames: the Python frames of the call, if it has no other end than them.
        has_ended: whether the call is over; then the choice is in force nowhere.
        holder: the frame whose ``with`` block the choice is for, if :func:`check_order` looks after it.
        suspended: the choices around this one whose holders did not run when it began: those of generators.
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
        self.has_ended = False
        self.holder: FrameType | None = None
        self.suspended: tuple[RowChoice, ...] = ()
        self.starts: list[int | None] | None = None
        self.prompt = 0
        self.tokens: ActiveTokens | None = None
        self.invoked: frozenset[str] = frozenset()
        self.is_uniform = self.is_of_active = self.is_plain = self.may_lose = False
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
        choice.frames, choice._groups, choice.holder, choice.suspended = (), {}, None, ()
        return choice

    def repeated(self, times: int) -> RowChoice:
        """Returns the choice with a name of its own for each of the ``times`` rows that share one."""
        if times == 1:
            return self
        choice = RowChoice(self.active, [name for name in self.names_of_rows for _ in range(times)])
        choice.pool, choice.pool_names, choice.is_of_active = self.pool, self.pool_names, self.is_of_active
        choice.is_uniform = self.is_uniform
        return choice

    def aligned(self, layer: AdapterLayer, x: Tensor) -> tuple[Tensor, int]:
        """Returns ``x`` and how many consecutive rows of it belong to each name, or to the only one.

        A single row, such as the position ids of all rows of the batch, is repeated for each of several names.

        Raises:
            ValueError: the first dimension of ``x`` does not fit the names.
        """
        n = len(self.rows)
        rows = x.shape[0] if x.dim() else 0
        if self.is_uniform and x.dim() > x.is_floating_point():
            return x, rows
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
                "or call the model once for each adapter (one name for all rows, or set_adapter)"
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
        rows = self.rows[:1] if self.is_uniform else self.rows
        of_row = [of_name[i] for i in rows for _ in range(times)]
        with torch.inference_mode(False):  # a later call may be recorded by autograd
            return torch.tensor(of_row, dtype=torch.int64, device=device)
