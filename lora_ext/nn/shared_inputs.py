"""Layers that are called with the same tensor (q/k/v, gate/up) are computed together, each in its own place.

The first of them that is called computes all outputs in one op (:func:`lora_ext.functional.lora_linear_siblings`; with
quantised weights it calls the base layers, and :func:`lora_ext.functional.lora_delta_siblings` adds the updates). Every
other layer takes its output when it is called, if it would compute exactly that: for the same tensor object, from the
same weights and factors, unchanged since, with the same dropout, autograd, autocast and stream. Otherwise it computes
its own. So a wrong guess costs time, but changes no result.

Groups are guessed from the model's structure (:func:`lora_ext.nn.input_groups.form_input_groups`), and divided where
calls show that layers read other tensors; they never grow. Layers that read one tensor use one dropout seed, computed
together or not; one that calls its base layer (hooks, several adapters) draws its own.

A thread has one :class:`_Round` at a time: a tensor, and the outputs computed from it that no layer has taken yet. They
are dropped with the tensor, and when a layer begins the next round. Activation checkpointing runs parts of a forward
again, each by itself: a round ends where another part begins, and groups stay as they are while a checkpointed graph
exists that was made with them, because the second run must save as many tensors as the first.
"""

from __future__ import annotations

import functools
import operator
import threading
import weakref
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from lora_ext import functional
from lora_ext._ops.fast_path import autocast_device, call_state
from lora_ext.nn.base_layer import plain_linear, runs_quantized_product

LARGEST = 8  # layers of lora_linear_siblings


class Operands(NamedTuple):
    """The tensors and numbers of a layer with one adapter, as the layer holds them.

    Attributes:
        quantized: the base layer, if its weight is quantised: it computes its product itself.
        is_training: whether that is in training mode; bitsandbytes' 8-bit layers compute something else then.
    """

    weight: Tensor
    bias: Tensor | None
    lora_A: Tensor
    lora_B: Tensor
    lora_bias: Tensor | None
    scaling: float
    dropout_p: float
    quantized: nn.Module | None = None
    is_training: bool = False

    def full_bias(self) -> Tensor | None:
        if self.lora_bias is None:
            return self.bias
        scaled = self.scaling * self.lora_bias
        return (scaled if self.bias is None else self.bias + scaled).to(self.weight.dtype)

    def base_output(self, x: Tensor) -> Tensor:
        """Returns the quantised base layer's output plus the adapter's bias."""
        y = self.quantized(x)
        return y if self.lora_bias is None else y + (self.scaling * self.lora_bias).to(y.dtype)

    def are(self, others: Operands) -> bool:
        """Returns whether these are the same tensors and numbers."""
        return all(map(operator.is_, self[:5], others[:5])) and self[5:] == others[5:]

    def stamp(self) -> tuple[int | bool, ...]:
        """Returns a value that every in-place change of a tensor changes. RuntimeError: a tensor counts no changes."""
        weight, bias, A, B, lora_bias = self[:5]
        stamp = weight._version, A._version, B._version, weight.requires_grad, A.requires_grad, B.requires_grad
        for tensor in (bias, lora_bias):
            if tensor is not None:
                stamp += tensor._version, tensor.requires_grad
        return stamp

    def fit(self, others: Operands) -> bool:
        """Returns whether one op can compute this layer along with a layer with ``others``."""
        is_plain = self.quantized is None
        return (
            self.dropout_p == others.dropout_p
            and is_plain == (others.quantized is None)
            and (self.weight.dtype is others.weight.dtype or not is_plain)
            and self.weight.device == others.weight.device
            and self.lora_A.dtype is others.lora_A.dtype
            and self.lora_A.device == others.lora_A.device
            and self.lora_A.shape[1] == others.lora_A.shape[1]
        )


def frozen_product(base: nn.Module) -> tuple[Tensor, Tensor | None, nn.Module | None, bool] | None:
    """Returns the base layer's share of :class:`Operands`: weight, bias, ``quantized`` and ``is_training``.

    None: the base layer may do something else than multiply by its weight and add its bias.
    """
    plain = plain_linear(base)
    if plain is not None:
        return (*plain, None, False) if type(plain[0]) is nn.Parameter else None  # Conv1D's is transposed for the call
    if runs_quantized_product(base):
        parameters = base._parameters
        return parameters["weight"], parameters["bias"], base, base.training
    return None


def compute_alone(x: Tensor, operands: Operands, seed: Tensor | None = None) -> Tensor:
    """Returns the output of one layer; ``seed``: of its dropout, drawn if None."""
    weight, bias, lora_A, lora_B, lora_bias, scaling, dropout_p, quantized, _ = operands
    if quantized is not None:
        return _plus_update(operands.base_output(x), x, operands, seed)
    if lora_bias is not None:
        bias = operands.full_bias()
    return functional.lora_linear(x, weight, bias, lora_A, lora_B, scaling, dropout_p, seed)


class SharesInputs:
    """A mixin of layers, before ``nn.Module``: they can be computed together with others that read the same tensor."""

    def operands(self) -> Operands | None:
        """Returns the operands of the next forward, or None if it takes another way."""
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


class Neighbours:
    """The layers of one module that may read one tensor.

    Attributes:
        layers: weak references by ``id(layer)``, at most :data:`LARGEST`.
        groups: for each ``id(layer)`` those that are computed together with it, itself among them.
        shared: the ``id`` of the layers that were computed together with others and took their outputs.
    """

    def __init__(self) -> None:
        self.layers: dict[int, weakref.ref] = {}
        self.groups: dict[int, frozenset[int]] = {}
        self.shared: set[int] = set()
        self._next: dict[int, frozenset[int]] | None = None  # groups as the last round has divided them
        self._graphs: list[weakref.ref] = []  # hooks of checkpointed graphs, which die with them

    def __reduce__(self) -> tuple:
        return Neighbours, ()  # the copied layers join the copy

    def join(self, layer: nn.Module) -> None:
        """Adds a layer to the first guess, which is that all read one tensor."""
        self.layers[id(layer)] = weakref.ref(layer)
        self.groups = dict.fromkeys(self.layers, frozenset(self.layers))

    def output(self, layer: nn.Module, x: Tensor, operands: Operands) -> Tensor:
        """Returns the output of ``layer``, which has ``operands``, for ``x``."""
        has_dropout = operands.dropout_p > 0.0
        current = self._round(layer, x, has_dropout)
        if current is None:
            return compute_alone(x, operands)
        y = current.take(id(layer), operands)
        if y is None:
            y = current.compute(id(layer), x, operands)
        if y is None:
            y = compute_alone(x, operands, current.seed(operands.dropout_p, x) if has_dropout else None)
        return y

    def seeds(self, layer: nn.Module, x: Tensor) -> Callable[[float], Tensor] | None:
        """Returns the dropout seeds by probability for a ``layer`` that computes by itself; None: it draws them."""
        current = self._round(layer, x, True)
        return None if current is None else functools.partial(current.seed, x=x)

    def _round(self, layer: nn.Module, x: Tensor, has_dropout: bool) -> _Round | None:
        """Returns the round that a call of ``layer`` belongs to; None: the call is unusual, and shares nothing."""
        state = call_state(x)
        if state is None or (has_dropout and _begins_reentrant_part(x)):
            return None
        current, key = _thread.round, id(layer)
        if current is None or not current.continues(self, key, x, state):
            if current is not None:
                current.end()
            current = _thread.round = _Round(self, x, state)
        current.called.append(key)
        return current

    def group_of(self, key: int) -> frozenset[int]:
        """Returns the layers to compute with the layer ``key``, and keeps them for the graph that is being made."""
        self._graphs = [graph for graph in self._graphs if graph() is not None]
        if self._next is not None and not self._graphs:
            self.groups, self._next = self._next, None
        hook = _graph_hook()
        if getattr(hook, "__module__", None) == "torch.utils.checkpoint":
            self._graphs.append(weakref.ref(hook))
        return self.groups.get(key, frozenset())

    def computed_together(self, keys: list[int]) -> list[int]:
        """Returns those of the layers ``keys``, of one group, that a forward computes together now, or none."""
        found: dict[int, Operands] = {}
        for key in keys:
            layer = self.layers[key]()
            operands = None if layer is None else layer.operands()
            if operands is not None and all(operands.fit(others) for others in found.values()):
                found[key] = operands
        return list(found) if len(found) > 1 and self.shared.issuperset(found) else []

    def divide(self, called: frozenset[int], missed: frozenset[int]) -> None:
        """Parts the layers that a round has ``called`` from those that it computed along, but were not called."""
        groups = dict(self._next or self.groups)
        for key in called & groups.keys():
            groups[key] -= missed
        for key in missed & groups.keys():
            groups[key] -= called
        self.shared -= missed
        self._next = groups


class _Round:
    """The calls of layers of one :class:`Neighbours` with one tensor, in one part of the forward."""

    __slots__ = ("_computed", "_hook", "_is_first", "_neighbours", "_outputs", "_seeds", "_state", "_x", "called")

    def __init__(self, neighbours: Neighbours, x: Tensor, state: tuple) -> None:
        self._neighbours, self._state = neighbours, state
        self._is_first = torch._C._current_graph_task_id() < 0  # a checkpoint may not run again to its end
        self._computed: set[int] = set()
        self._seeds: dict[float, Tensor] = {}
        self._outputs: dict[int, tuple[int, Operands, tuple, Tensor]] = {}  # the first is the layer that computed them
        self.called: list[int] = []  # the ids of layers
        outputs = self._outputs
        self._x = weakref.ref(x, lambda _: outputs.clear())
        hook = _graph_hook()
        self._hook = (lambda: None) if hook is None else weakref.ref(hook)

    def continues(self, neighbours: Neighbours, key: int, x: Tensor, state: tuple) -> bool:
        """Returns whether a call of the layer ``key`` belongs to this round."""
        return (
            self._neighbours is neighbours
            and self._x() is x
            and self._state == state
            and key not in self.called
            and self._hook() is _graph_hook()
        )

    def seed(self, dropout_p: float, x: Tensor) -> Tensor:
        seed = self._seeds.get(dropout_p)
        if seed is None:
            seed = self._seeds[dropout_p] = functional.draw_seed(x.device)
        return seed

    def compute(self, key: int, x: Tensor, operands: Operands) -> Tensor | None:
        """Computes the outputs of a group and returns that of the layer ``key``; None: no other layer goes with it."""
        weight = operands.weight
        if operands.quantized is None and x.dtype != weight.dtype and not torch.is_autocast_enabled(autocast_device(x)):
            return None
        if x.shape[-1:] != operands.lora_A.shape[1:] or x.device != weight.device:
            return None
        wanted = self._neighbours.group_of(key) - {key, *self.called} - self._computed
        keys, all_operands, stamps = [key], [operands], [None]
        for other, layer_ref in self._neighbours.layers.items():
            layer = layer_ref() if other in wanted else None
            theirs = None if layer is None else layer.operands()
            if theirs is None or not theirs.fit(operands):
                continue
            try:
                stamps.append(theirs.stamp())
            except RuntimeError:  # inference tensors
                continue
            keys.append(other)
            all_operands.append(theirs)
        if len(keys) == 1:
            return None
        seed = self.seed(operands.dropout_p, x) if operands.dropout_p > 0.0 else None
        y, *ys = _together(x, all_operands, seed)
        self._computed.update(keys)
        for other, *computed in zip(keys[1:], all_operands[1:], stamps[1:], ys, strict=True):
            self._outputs[other] = key, *computed
        return y

    def take(self, key: int, operands: Operands) -> Tensor | None:
        """Returns the output of the layer ``key``, if it was computed from ``operands`` as they are now."""
        found = self._outputs.pop(key, None)
        if found is None:
            return None
        first, theirs, stamp, y = found
        if not theirs.are(operands) or theirs.stamp() != stamp:
            return None
        self._neighbours.shared.update((key, first))
        return y

    def end(self) -> None:
        called = frozenset(self.called)
        missed = frozenset(self._computed - called)
        if missed and self._is_first:
            self._neighbours.divide(called, missed)
        self._outputs.clear()


class _Thread(threading.local):
    round: _Round | None = None


_thread = _Thread()


def _graph_hook() -> Callable[..., Any] | None:
    """Returns the hook that unpacks the tensors which autograd saves now, or None: another one in each checkpoint."""
    hooks = torch._C._autograd._top_saved_tensors_default_hooks(True)
    if hooks is None or not type(hooks[1]).__weakrefoffset__:  # without weak references it would be kept alive
        return None
    return hooks[1]


def _begins_reentrant_part(x: Tensor) -> bool:
    """Returns whether ``x`` is the input of a part that reentrant checkpointing runs, or runs again.

    Another part may get the same tensor; it must draw its own dropout seeds, which it draws again when it runs again.
    """
    if not x.requires_grad:
        return False
    if not torch.is_grad_enabled():
        return True
    return x.is_leaf and torch._C._current_graph_task_id() >= 0 and _graph_hook() is None


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


def _plus_update(base: Tensor, x: Tensor, operands: Operands, seed: Tensor | None) -> Tensor:
    """Adds the update to a copy of what a base layer returned, which may keep it."""
    update = operands.lora_A, operands.lora_B, operands.scaling, operands.dropout_p, seed
    y = base.clone(memory_format=torch.contiguous_format)
    return functional.plus_lora_delta(y, x.to(device=y.device, dtype=y.dtype), *update)
