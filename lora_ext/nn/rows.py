"""Mixed batches: each row of a batch names the adapter that it uses, and one op adds all of them.

:mod:`lora_ext.model.mixed_batch` checks the names of a call and makes a :class:`RowChoice` current; layers ask for it
(:func:`row_choice`) and add the chosen updates, by a grouped op (:func:`add_chosen`, :func:`linear_with_chosen`,
:class:`LayerSlots`) or, where there is none, adapter by adapter (:func:`add_by_rows`).

The choice belongs to a call and its thread (``ActiveAdapters.running``); the model does not change. Activation
checkpointing runs layers again in the backward, when the call is over; then the autograd node that runs tells which
call it belongs to (:func:`_choice_of_backward`).
"""

from __future__ import annotations

import threading
import weakref
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, NamedTuple, NoReturn

import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves

from lora_ext import functional
from lora_ext._ops.checks import FLOATING
from lora_ext.nn import base_product
from lora_ext.nn.adapter_layer import AdapterLayer
from lora_ext.nn.base_layer import own_copy

if TYPE_CHECKING:
    from lora_ext.nn.active import ActiveAdapters

BASE = "__base__"
"""The name that stands for no adapter, as in PEFT."""


class RowChoice:
    """The adapters that the rows of a batch use.

    Attributes:
        names: the distinct names, without :data:`BASE`.
        rows: for each row the position of its name in ``names``, or -1.
        is_uniform: whether all rows have one name and a layer may get any number of rows, as :meth:`aligned` counts.
        active: the shared state of the layers that the choice is for; None: the caller gives it to the layers.
        multiples: how many rows of a layer's input may belong to one name: 1, and in a model that flattens its tokens,
            their number.
        repeats: in ``generate``, how many rows of the model's input may belong to one name (beams, returned sequences);
            None: the choice is that of a single call.
        pool: gives the names in ``pool_names`` slots for the time of the call; the others are adapters of the layers.
        slots: by name.
    """

    def __init__(self, names: Sequence[str], active: ActiveAdapters | None = None) -> None:
        numbers = {name: i for i, name in enumerate(dict.fromkeys(name for name in names if name != BASE))}
        self.names = tuple(numbers)
        self.rows = [numbers.get(name, -1) for name in names]
        self.is_uniform = False
        self.active = active
        self.multiples = frozenset((1,))
        self.repeats: frozenset[int] | None = None
        self.pool: Any = None
        self.pool_names: tuple[str, ...] = ()
        self.slots: Mapping[str, int] = {}
        self._tensors: dict[tuple, Tensor] = {}  # kept for the next layer: a copy to a GPU waits for it
        self._task = -1  # the backward in which the call began
        self._begin = self._end = -1  # the numbers of the call's autograd nodes

    def aligned(self, layer: AdapterLayer, x: Tensor) -> tuple[Tensor, int]:
        """Returns ``x`` and how many consecutive rows of it belong to each name, or to the only one.

        A single row of ids, such as the position ids of all rows of the batch, is repeated for each of several names.

        Raises:
            ValueError: the first dimension of ``x`` does not fit the names.
        """
        n = len(self.rows)
        rows = x.shape[0] if x.dim() else 0
        if self.is_uniform and x.dim() > x.is_floating_point():
            return x, rows
        if rows == 1 != n and not x.is_floating_point():
            return x.expand(n, *x.shape[1:]), 1
        times, rest = divmod(rows, n)
        if rest or times not in self.multiples:
            raise ValueError(
                f"{type(layer).__name__}: adapter_names has {n} names, but the layer's input has the shape "
                f"{list(x.shape)}, whose rows do not belong to one name each; leave this module out of the adapters, "
                "or call the model once for each adapter (one name for all rows, or set_adapter)"
            )
        return x, times

    def groups(self, present: tuple[str, ...] | None, times: int, device: torch.device) -> Tensor:
        """Returns, for each row of a layer's input, its name's position in ``present``, int64 ``[rows]``; -1: none.

        None stands for the pool: returns the slots of the rows' adapters.
        """
        found = self._tensors.get((present, times, device))
        if found is None:
            numbers = self.slots if present is None else {name: i for i, name in enumerate(present)}
            of_name = [numbers.get(name, -1) for name in self.names] + [-1]  # index -1: BASE
            rows = self.rows[:1] if self.is_uniform else self.rows
            of_row = [of_name[i] for i in rows for _ in range(times)]
            found = self._tensors[present, times, device] = _tensor(of_row, torch.int64, device)
        return found

    def scalings(self, values: tuple[float, ...], device: torch.device) -> Tensor:
        """Returns ``values`` as float64 on ``device``."""
        found = self._tensors.get((values, device))
        if found is None:
            found = self._tensors[values, device] = _tensor(values, torch.float64, device)
        return found


def _tensor(values: Sequence[float], dtype: torch.dtype, device: torch.device) -> Tensor:
    with torch.inference_mode(False):  # a later call may be recorded by autograd
        return torch.tensor(values, dtype=dtype, device=device)


# --- the current choice -----------------------------------------------------------------------------------------------

_count_lock = threading.Lock()
_KEPT = "lora_ext_row_choices"  # what autograd nodes of a call's outputs keep


def row_choice(active: ActiveAdapters) -> RowChoice | None:
    """Returns the current choice of layers that share ``active``, or None: the active adapters are used.

    Raises:
        ValueError: the layer is compiled, and the batch is mixed.
        RuntimeError: in a backward, see :func:`_choice_of_backward`.
    """
    if torch.compiler.is_compiling():
        # Compiled code holds for all choices: it guards on whether some thread has a mixed batch, and then asks.
        if active.mixed_calls > 0:
            from lora_ext.nn.compiled_rows import refuse_if_chosen

            refuse_if_chosen(active)
        return None
    if active.mixed_calls == 0 and not active.pending:
        return None
    choice, task = active.running.choice, torch._C._current_graph_task_id()
    if task >= 0 and (choice is None or choice._task != task):
        choice = _choice_of_backward(active)
    return choice


def enter(choice: RowChoice) -> None:
    """Makes ``choice`` current until :func:`leave`. Raises what the pool does that cannot serve it."""
    if choice.pool_names:
        choice.slots = choice.pool.acquire(choice.pool_names)
    choice._task = torch._C._current_graph_task_id()
    if torch.is_grad_enabled():
        choice._begin = torch.autograd._get_sequence_nr()
    with _count_lock:
        choice.active.mixed_calls += 1
    choice.active.running.choice = choice


def leave(choice: RowChoice, outputs: Any = None) -> None:
    """Ends ``choice``. ``outputs`` are those of the call: a backward from them may run its layers again."""
    choice.active.running.choice = None
    with _count_lock:
        choice.active.mixed_calls -= 1
    if choice.pool_names:
        choice.pool.release(choice.pool_names)
    if choice._begin < 0:
        return
    choice._end = torch.autograd._get_sequence_nr()
    tensors = [leaf for leaf in tree_leaves(outputs) if isinstance(leaf, Tensor) and leaf.grad_fn is not None]
    for tensor in tensors:  # the choice lives as long as their graph
        tensor.grad_fn.metadata.setdefault(_KEPT, []).append(choice)
    if tensors:
        choice.active.pending.add(weakref.ref(choice, choice.active.pending.discard))


@contextmanager
def choosing(choice: RowChoice) -> Iterator[None]:
    """Makes ``choice`` current within the context."""
    enter(choice)
    try:
        yield
    finally:
        leave(choice)


def _choice_of_backward(active: ActiveAdapters) -> RowChoice | None:
    """Returns the choice of the call that a backward computes again (activation checkpointing), or None: it named none.

    The autograd node that runs now, and asks for what was not saved, belongs to the call during which it was made. A
    reentrant checkpoint makes nodes of its own in the backward, of which nothing tells that.

    RuntimeError: the call cannot be told.
    """
    node = torch._C._current_autograd_node()
    number = -1 if node is None else node._sequence_nr()
    pending = [choice for ref in tuple(active.pending) if (choice := ref()) is not None]
    found = [choice for choice in pending if choice._begin <= number < choice._end]
    if len(found) > 1 or (pending and type(node).__name__ == "CheckpointFunctionBackward"):
        raise RuntimeError(
            "adapter_names: activation checkpointing runs a layer again, and which call it belongs to cannot be told, "
            "so its adapters neither; use use_reentrant=False, and train in one thread at a time"
        )
    return found[0] if found else None


# --- one op for all adapters ------------------------------------------------------------------------------------------


class RowUpdate(NamedTuple):
    """The update of an adapter of a linear layer, for the rows that name it; ``bias`` is scaled already."""

    name: str
    lora_A: Tensor
    lora_B: Tensor
    scaling: float
    dropout_p: float
    bias: Tensor | None = None


def _alike(updates: Sequence[RowUpdate]) -> list[list[RowUpdate]]:
    """Splits them into those that one op can compute: of one dropout and one dtype."""
    kinds: dict[tuple, list[RowUpdate]] = {}
    for update in updates:
        kinds.setdefault((update.dropout_p, update.lora_A.dtype), []).append(update)
    return list(kinds.values())


def add_chosen(
    y: Tensor,
    x: Tensor,
    choice: RowChoice,
    updates: Sequence[RowUpdate],
    times: int,
    seeds: Callable[[float], Tensor | None] | None = None,
) -> Tensor:
    """Adds the chosen updates to ``y [rows, ..., out_features]``, in place; rows of other names stay as they are.

    Args:
        x: ``[rows, ..., in_features]``, device and dtype of ``y``.
        times: consecutive rows for each name.
        seeds: gives the dropout seed for a probability; None: each op draws one.
    """
    for alike in _alike(updates):
        names, lora_As, lora_Bs, scalings, (dropout_p, *_), _ = zip(*alike, strict=True)
        groups, scalings = choice.groups(names, times, x.device), choice.scalings(scalings, x.device)
        seed = seeds(dropout_p) if seeds is not None and dropout_p else None
        y = functional.lora_grouped_(y, x, lora_As, lora_Bs, groups, scalings, None, dropout_p, seed)
    return _add_biases(y, choice, updates, times)


def linear_with_chosen(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    choice: RowChoice,
    updates: Sequence[RowUpdate],
    times: int,
    seeds: Callable[[float], Tensor | None] | None = None,
) -> Tensor:
    """Returns ``F.linear(x, weight, bias)`` with what :func:`add_chosen` adds: in one call, if one op can do it all."""
    if any(update.dropout_p for update in updates) or len(_alike(updates)) != 1:
        y = base_product.product(x, weight, bias)
        return add_chosen(y, x.to(y.dtype), choice, updates, times, seeds)
    names, lora_As, lora_Bs, scalings, *_ = zip(*updates, strict=True)
    groups, scalings = choice.groups(names, times, x.device), choice.scalings(scalings, x.device)
    y = functional.lora_grouped_linear(x, weight, bias, lora_As, lora_Bs, groups, scalings)
    return _add_biases(y, choice, updates, times)


def _add_biases(y: Tensor, choice: RowChoice, updates: Sequence[RowUpdate], times: int) -> Tensor:
    biases = {update.name: update.bias.to(y.dtype) for update in updates if update.bias is not None}
    if not biases:
        return y
    table = torch.stack([*biases.values(), torch.zeros_like(next(iter(biases.values())))])
    groups = choice.groups(tuple(biases), times, y.device)
    of_row = table[groups]  # index -1: zeros
    return y + of_row.view(*groups.shape, *[1] * (y.dim() - groups.dim() - 1), -1)


class LayerSlots:
    """Factors of many adapters of one linear layer, each in a slot of the same size: the storage of an AdapterPool.

    Memory is allocated once and never moves. A slot is written while no call uses it; calls that read other slots go on
    meanwhile.

    Attributes:
        lora_A, lora_B: ``[slots, r, in_features]`` and ``[slots, out_features, r]``; ranks beyond an adapter's are not
            initialised.
        ranks: int64 ``[slots]``; 0: the adapter has no part in this layer.
        scalings: float64 ``[slots]``.
    """

    def __init__(
        self, slots: int, r: int, in_features: int, out_features: int, dtype: torch.dtype, device: torch.device
    ) -> None:
        if dtype not in FLOATING:
            raise ValueError(f"AdapterPool: dtype is {dtype}, want one of {', '.join(map(str, FLOATING))}")
        with torch.inference_mode(False):
            self.lora_A = torch.empty(slots, r, in_features, dtype=dtype, device=device)
            self.lora_B = torch.empty(slots, out_features, r, dtype=dtype, device=device)
            self.ranks = torch.zeros(slots, dtype=torch.int64, device=device)
            self.scalings = torch.zeros(slots, dtype=torch.float64, device=device)

    @torch.no_grad()
    def write(self, slot: int, lora_A: Tensor, lora_B: Tensor, scaling: float) -> None:
        """Fills a slot with factors ``[rank, in_features]`` and ``[out_features, rank]`` of any dtype and device."""
        rank = lora_A.shape[0]
        self.lora_A[slot, :rank].copy_(lora_A)
        self.lora_B[slot, :, :rank].copy_(lora_B)
        self.scalings[slot] = scaling
        self.ranks[slot] = rank

    @torch.no_grad()
    def clear(self, slot: int) -> None:
        self.ranks[slot] = 0

    def add_chosen(self, y: Tensor, x: Tensor, choice: RowChoice, times: int) -> Tensor:
        """Adds the updates of the slots that the rows have chosen to ``y``, in place."""
        slots = choice.groups(None, times, x.device)
        return functional.lora_grouped_(y, x, self.lora_A, self.lora_B, slots, self.scalings, self.ranks)

    def linear_with_chosen(
        self, x: Tensor, weight: Tensor, bias: Tensor | None, choice: RowChoice, times: int
    ) -> Tensor:
        """Returns ``F.linear(x, weight, bias)`` with the updates of the slots that the rows have chosen."""
        slots = choice.groups(None, times, x.device)
        return functional.lora_grouped_linear(
            x, weight, bias, self.lora_A, self.lora_B, slots, self.scalings, self.ranks
        )

    def __reduce__(self) -> NoReturn:
        raise TypeError("a model with an AdapterPool cannot be copied or pickled; call pool.close() first")


# --- adapter by adapter -----------------------------------------------------------------------------------------------


def add_by_rows(
    layer: AdapterLayer,
    x: Tensor,
    choice: RowChoice,
    names: tuple[str, ...],
    add: Callable[[Tensor, Tensor, str], Tensor],
) -> Tensor:
    """Returns the base layer's output, in which ``add(rows of it, rows of x, name)`` replaces those of each adapter.

    ``names`` are the chosen adapters that the layer has; rows of others stay as they are.

    Raises:
        TypeError, ValueError: the base layer returns no tensor, or another number of rows than ``x`` has.
    """
    y = layer.base_layer(x)
    given, (x, times) = x, choice.aligned(layer, x)
    y = own_copy(layer, y if x is given else y.expand(len(x), *y.shape[1:]))
    if y.shape[:1] != x.shape[:1]:
        raise ValueError(
            f"{type(layer).__name__}: adapter_names needs a module that returns a row for each row of its input, but "
            f"{list(x.shape)} became {list(y.shape)}"
        )
    x = x.to(y.device)
    groups = choice.groups(names, times, x.device)
    for i, name in enumerate(names):
        rows = (groups == i).nonzero().squeeze(1)
        y = y.index_copy_(0, rows, add(y[rows], x[rows], name))
    return y
