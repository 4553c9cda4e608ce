"""Layers that are called with the same tensor (q/k/v, gate/up) are computed together, each in its own place.

The first layer called computes all outputs in one op (:func:`lora_ext.functional.lora_linear_siblings`). If the base
layers are quantised, it calls each of them, and :func:`lora_ext.functional.lora_delta_siblings` adds the updates. Every
other layer takes its output when it is called with the same tensor object, and only if it would compute exactly that:
the same weights and factors, unchanged since, the same dropout, autograd and autocast. Otherwise it computes its own
output. So a wrong guess costs time, but changes no result.

The groups are guessed from the model's structure (:func:`lora_ext.nn.input_groups.form_input_groups`), and calls
correct them: a layer that comes with another tensor leaves its group at once, a layer that does not come at all leaves
after the second time. A correction changes no number, so a resumed run has the bits of an uninterrupted one: layers
that read one tensor use one dropout seed, whether they are computed together or not.

The parts: :class:`Neighbours`, the layers of one module that may read one tensor, divided into groups; :class:`Group`,
those of them that are computed together; :class:`_Round`, one tensor and the outputs computed from it that no layer has
taken yet. A thread has one round at a time. Its outputs are dropped with the tensor, and when a layer begins the next
round. Layers and tensors are referred to weakly: a group keeps neither alive. Copied and unpickled layers form new
groups among themselves.

Activation checkpointing runs parts of a forward again, each by itself: a round ends where another part begins. The
non-reentrant kind requires that the second forward saves as many tensors as the first. So a group stays as it is while
a graph exists that was made with it.
"""

from __future__ import annotations

import functools
import threading
import weakref
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from lora_ext import functional
from lora_ext._ops.usual_calls import autocast_device, call_state
from lora_ext.nn.checkpointed_parts import graph_hook, is_of_checkpoint, reentrant_part
from lora_ext.nn.operands import Operands

LARGEST = 8  # layers of lora_linear_siblings
TOO_MANY_MISSES = 2  # a call that is interrupted leaves outputs behind once

ANOTHER_TENSOR = "is called with another tensor, or after a call with one"
NOT_CALLED = "is not called after the others"
COMPILED_ALONE = "it is compiled by itself"


class SharesInputs:
    """A mixin of layers, before ``nn.Module``: they can be computed together with others that read the same tensor."""

    def operands(self) -> Operands | str:
        """Returns the operands of the next forward, or why it cannot be computed together with others."""
        raise NotImplementedError

    def __copy__(self) -> SharesInputs:
        twin = object.__new__(type(self))  # with the same adapters, but computed alone: it is no layer of the module
        twin.__dict__.update({name: value for name, value in self.__dict__.items() if name != "_neighbours"})
        return twin

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        if (neighbours := neighbours_of(self)) is not None:
            neighbours.join(self)


def neighbours_of(layer: nn.Module) -> Neighbours | None:
    """Returns the layers that may read the same tensor as ``layer``, itself among them; None: it shares no input."""
    return layer.__dict__.get("_neighbours")


def set_neighbours(layer: nn.Module, neighbours: Neighbours | None) -> None:
    layer.__dict__.pop("_neighbours", None)
    if neighbours is not None:
        layer.__dict__["_neighbours"] = neighbours
        neighbours.join(layer)


class Group:
    """Neighbours that are computed together.

    Attributes:
        layers: weak references by ``id(layer)``.
        is_proven: whether a layer has taken its output.
        why: why the layers left another group, or "".
    """

    def __init__(self, layers: dict[int, weakref.ref] | None = None, why: str = "") -> None:
        self.layers: dict[int, weakref.ref] = layers or {}
        self.is_proven, self.why, self._missing = False, why, (frozenset(), 0)

    def alive(self) -> list[nn.Module]:
        return [layer for ref in self.layers.values() if (layer := ref()) is not None]

    def count_miss(self, missing: frozenset[int]) -> int:
        """Returns how often in a row the same layers (none: nothing was missing) did not take their outputs."""
        before, times = self._missing
        times = times + 1 if missing and missing == before else int(bool(missing))
        self._missing = missing, times
        return times


class Neighbours:
    """The layers of one module that may read one tensor, in groups. The layers refer to it, not the reverse.

    Attributes:
        groups: the group of each layer, by ``id(layer)``.
        now: why the last call shared nothing, for reports, or "".
    """

    def __init__(self) -> None:
        self.groups: dict[int, Group] = {}
        self.now = ""
        self._leaving: tuple[Group, frozenset[int], str] | None = None  # a group, the layers that leave it, why
        self._graphs: list[weakref.ref] = []  # hooks of checkpointed graphs, which die with them

    def __reduce__(self) -> tuple:
        return Neighbours, ()  # the copied layers join the copy

    def join(self, layer: nn.Module) -> None:
        """Adds a layer to the first group. There are at most :data:`LARGEST` layers."""
        group = next(iter(self.groups.values()), None) or Group()
        group.layers[id(layer)] = weakref.ref(layer)
        self.groups[id(layer)] = group

    def output(self, layer: nn.Module, x: Tensor, operands: Operands) -> Tensor:
        """Returns the output of ``layer``, which has ``operands``, for ``x``."""
        state = call_state(x)
        if state is None:
            self.now = "the last call was under a transform, a mode or inference mode, or its input is no plain tensor"
            return _alone(x, operands, None)
        current, key = _thread.round, id(layer)
        if current is not None and current.continues(self, key, x, state, operands.dropout_p > 0.0):
            current.called.add(key)
            y = current.take(key, operands)
            return _alone(x, operands, current.seed(operands.dropout_p, x)) if y is None else y
        is_late = current is not None and current.end(self, key)
        current = _thread.round = _Round(self, x, state)
        current.called.add(key)
        group = self._group_to_compute(layer, is_late)
        if group is not None:
            y = current.compute(group, layer, x, operands)
            if y is not None:
                return y
        return _alone(x, operands, current.seed(operands.dropout_p, x))

    def seeds(self, layer: nn.Module, x: Tensor) -> Callable[[float], Tensor | None] | None:
        """Returns the dropout seeds by probability for a ``layer`` that computes by itself; None: it draws them."""
        state = call_state(x)
        if state is None:
            return None
        current, key = _thread.round, id(layer)
        if current is None or not current.continues(self, key, x, state, True):
            if current is not None:
                current.end(self, key)
            current = _thread.round = _Round(self, x, state)
        current.called.add(key)
        return functools.partial(current.seed, x=x)

    def _group_to_compute(self, layer: nn.Module, is_late: bool) -> Group | None:
        """Returns the group to compute with ``layer``, or None if ``layer`` is to be computed alone.

        ``is_late``: :meth:`_Round.end`. While checkpointed graphs exist, groups do not change: only calls within one
        part of the forward decide, because these are the same when the part runs again.
        """
        self._graphs = [ref for ref in self._graphs if ref() is not None]
        if self._leaving is not None and not self._graphs:
            self._split(*self._leaving)
            self._leaving = None
        elif is_late:
            return None
        group = self.groups.get(id(layer))
        if group is None or len(group.layers) < 2 or group.layers[id(layer)]() is not layer:
            return None
        self._note_graph()
        return group

    def missed(self, group: Group, missing: frozenset[int], why: str) -> None:
        """Notes which layers of ``group`` did not take what was computed for them in a round; none: all did."""
        times = group.count_miss(missing)
        if missing and (why == ANOTHER_TENSOR or times >= TOO_MANY_MISSES) and self._leaving is None:
            self._leaving = group, missing, why

    def _split(self, group: Group, leaving: frozenset[int], why: str) -> None:
        parts = [
            Group({key: ref for key, ref in group.layers.items() if key not in leaving}, group.why),
            Group({key: ref for key, ref in group.layers.items() if key in leaving}, why),
        ]
        parts[0].is_proven = group.is_proven
        self.groups = {**self.groups, **{key: part for part in parts for key in part.layers}}

    def _note_graph(self) -> None:
        hook = graph_hook()
        if is_of_checkpoint(hook):
            self._graphs.append(weakref.ref(hook))


_UNKNOWN = object()


class _Round:
    """The calls of layers of one :class:`Neighbours` with one tensor.

    Attributes:
        called: ``id`` of the layers that were called.

    A part is a piece of the forward that activation checkpointing runs again (:mod:`~lora_ext.nn.checkpointed_parts`).
    """

    __slots__ = ("_computed", "_group", "_hook", "_neighbours", "_outputs", "_part", "_seeds", "_state", "_x", "called")

    def __init__(self, neighbours: Neighbours, x: Tensor, state: tuple) -> None:
        self._neighbours, self._state = neighbours, state
        self._group: Group | None = None
        self._seeds: dict[float, Tensor] = {}
        hook = graph_hook()
        self._hook = (lambda: None) if hook is None else weakref.ref(hook)
        self._part: Any = _UNKNOWN  # the reentrant part that drew the seeds; not asked for before the first seed
        self.called: set[int] = set()
        self._computed: frozenset[int] = frozenset()  # id of the layers whose outputs were computed together
        # By id(layer), for layers that have not been called: the operands, their stamp, the output.
        self._outputs: dict[int, tuple[Operands, tuple, Tensor]] = {}
        outputs = self._outputs
        self._x = weakref.ref(x, lambda _: outputs.clear())

    def continues(self, neighbours: Neighbours, key: int, x: Tensor, state: tuple, has_dropout: bool) -> bool:
        """Returns whether a call of the layer ``key`` belongs to this round."""
        if not (self._neighbours is neighbours and self._x() is x and self._state == state and key not in self.called):
            return False
        if self._hook() is not graph_hook():
            return False
        return not has_dropout or self._part is _UNKNOWN or self._part == reentrant_part()

    def seed(self, dropout_p: float, x: Tensor) -> Tensor | None:
        if dropout_p == 0.0:
            return None
        if self._part is _UNKNOWN:
            self._part = reentrant_part()
        seed = self._seeds.get(dropout_p)
        if seed is None:
            seed = self._seeds[dropout_p] = functional.draw_seed(x.device)
        return seed

    def compute(self, group: Group, layer: nn.Module, x: Tensor, operands: Operands) -> Tensor | None:
        """Computes the group's outputs and returns that of ``layer``; None: there is no other layer to share with."""
        weight = operands.weight
        if operands.quantized is None and x.dtype != weight.dtype and not torch.is_autocast_enabled(autocast_device(x)):
            return None
        if x.shape[-1:] != operands.lora_A.shape[1:] or x.device != weight.device:
            return None
        keys, all_operands, stamps = [id(layer)], [operands], [None]
        for sibling in group.alive():
            if sibling is layer:
                continue
            theirs = sibling.operands()
            if type(theirs) is str or theirs.why_apart(operands):
                continue
            try:
                stamps.append(theirs.stamp())
            except RuntimeError:  # inference tensors
                continue
            keys.append(id(sibling))
            all_operands.append(theirs)
        if len(keys) == 1:
            return None
        y, *ys = _together(x, all_operands, self.seed(operands.dropout_p, x))
        self._group, self._computed = group, frozenset(keys)
        self._neighbours.now = ""
        self._outputs.update(zip(keys[1:], zip(all_operands[1:], stamps[1:], ys, strict=True), strict=True))
        return y

    def take(self, key: int, operands: Operands) -> Tensor | None:
        """Returns the output of the layer ``key``, if it was computed from ``operands`` as they are now."""
        found = self._outputs.pop(key, None)
        if found is None:
            return None
        theirs, stamp, y = found
        if not theirs.are(operands) or theirs.stamp() != stamp:
            return None
        self._group.is_proven = True
        return y

    def end(self, caller: Neighbours, key: int) -> bool:
        """Drops the outputs that are left. The layer ``key`` of ``caller`` begins the next round.

        Returns whether that layer is late: one of these outputs was for it, in the same part of the forward, and it is
        called with another tensor.
        """
        is_late = False
        if self._group is not None:
            missing = self._computed - self.called
            is_late = caller is self._neighbours and key in missing and self._hook() is graph_hook()
            self._neighbours.missed(self._group, missing, ANOTHER_TENSOR if is_late else NOT_CALLED)
        self._outputs.clear()
        return is_late


class _Thread(threading.local):
    round: _Round | None = None


_thread = _Thread()


def _together(x: Tensor, layers: list[Operands], seed: Tensor | None) -> list[Tensor]:
    factors = [their.lora_A for their in layers], [their.lora_B for their in layers]
    numbers = [their.scaling for their in layers], layers[0].dropout_p, seed
    if layers[0].quantized is None:
        weights, biases = [their.weight for their in layers], [their.full_bias() for their in layers]
        return functional.lora_linear_siblings(x, weights, biases, *factors, *numbers)
    bases = [their.base_output(x) for their in layers]
    if any(base.dtype != bases[0].dtype for base in bases):
        return [_plus_update(base, x, their, seed) for base, their in zip(bases, layers, strict=True)]
    return functional.lora_delta_siblings(bases, x.to(bases[0].dtype), *factors, *numbers)


def _alone(x: Tensor, operands: Operands, seed: Tensor | None) -> Tensor:
    if operands.quantized is not None:
        return _plus_update(operands.base_output(x), x, operands, seed)
    weight, _, lora_A, lora_B, _, scaling, dropout_p = operands[:7]
    return functional.lora_linear(x, weight, operands.full_bias(), lora_A, lora_B, scaling, dropout_p, seed)


def _plus_update(base: Tensor, x: Tensor, operands: Operands, seed: Tensor | None) -> Tensor:
    """Adds the update to a copy of what a base layer returned, which may keep it."""
    update = operands.lora_A, operands.lora_B, operands.scaling, operands.dropout_p, seed
    y = base.clone(memory_format=torch.contiguous_format)
    return functional.plus_lora_delta(y, x.to(device=y.device, dtype=y.dtype), *update)
