"""Decides the layout of a tensor that an update is added to, and which parameter of a module it belongs to."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Literal, TypeAlias

from lora_ext.checkpoints.contents import LowRankUpdate
from lora_ext.files.adapter_file import AdapterFile

Layout: TypeAlias = Literal["plain", "transposed"]
"""``plain``: the tensor is ``[out, in]``, as in Linear; ``transposed``: ``[in, out]``, as in Conv1D and Embedding."""


def num_matrices(file: AdapterFile, update: LowRankUpdate) -> int:
    """Number of matrices in the tensor that have factors each: experts, or groups of a convolution."""
    if update.kind == "parameter":
        return file.shape(update.lora_A)[0] // update.r
    if update.kind == "conv":
        return update.r // file.shape(update.lora_B)[1]
    return 1


def fitting_layouts(file: AdapterFile, update: LowRankUpdate, shape: tuple[int, ...]) -> set[Layout]:
    """Returns the layouts that give the update the shape of the tensor."""
    A, B, matrices = file.shape(update.lora_A), file.shape(update.lora_B), num_matrices(file, update)
    if update.kind == "conv":
        return {"plain"} if shape == (B[0], *A[1:]) and B[0] % matrices == 0 else set()
    if update.kind == "parameter" and len(shape) == 3:
        shape, matrices = shape[1:], matrices if shape[0] == matrices else 0
        if not matrices:
            return set()
    elif matrices != 1:
        return set()
    if update.kind == "embedding":
        return {"transposed"} if shape == (A[1], B[0]) else set()
    sizes: dict[Layout, tuple[int, int]] = {"plain": (B[0], A[1]), "transposed": (A[1], B[0])}
    return {layout for layout, size in sizes.items() if shape == size}


class Evidence:
    """The layouts of an adapter's updates whose shapes fit only one."""

    def __init__(self, fitting: Mapping[LowRankUpdate, set[Layout]]) -> None:
        """``fitting``: each of the adapter's updates -> the layouts that fit it."""
        self._by_kind: dict[str, set[Layout]] = {}
        self._by_name: dict[tuple[str, str], set[Layout]] = {}
        for update, fits in fitting.items():
            if len(fits) == 1:
                self._by_kind.setdefault(update.kind, set()).update(fits)
                self._by_name.setdefault((update.kind, _leaf(update)), set()).update(fits)

    def like(self, update: LowRankUpdate) -> list[set[Layout]]:
        """The layouts of updates of the same kind and name, then of all updates of the same kind."""
        return [self._by_name.get((update.kind, _leaf(update)), set()), self._by_kind.get(update.kind, set())]


def choose_layout(
    update: LowRankUpdate, fitting: set[Layout], evidence: Evidence, *, asked: bool | None, configured: bool
) -> Layout | None:
    """The layout of ``update``. On a square tensor, the user's choice or that of similar updates; None if these differ.

    Args:
        fitting: layouts that fit the update.
        asked: the user's choice: True for transposed, None for no choice.
        configured: ``fan_in_fan_out`` of the adapter's config. It is a last resort: PEFT writes the value of the layer
            that it met last.
    """
    if len(fitting) == 1:
        return next(iter(fitting))
    if asked is not None:
        return "transposed" if asked else "plain"
    like = evidence.like(update)
    for found in like:
        if len(found) == 1:
            return next(iter(found))
    if like[-1] or update.kind == "parameter":
        return None
    return "transposed" if configured else "plain"


def assign_parameters(
    file: AdapterFile, updates: Sequence[LowRankUpdate], shapes: Mapping[str, tuple[int, ...]]
) -> list[dict[LowRankUpdate, str]]:
    """Assigns the updates of one module to its parameters by shape, because keys do not. Returns up to two ways."""
    fits = {update: [key for key in shapes if fitting_layouts(file, update, shapes[key])] for update in updates}
    first = _assignment(fits)
    if first is None:
        return []
    for update, key in first.items():  # any other assignment differs for some update
        without = fits | {update: [other for other in fits[update] if other != key]}
        if (second := _assignment(without)) is not None:
            return [first, second]
    return [first]


def _assignment(fits: Mapping[LowRankUpdate, Sequence[str]]) -> dict[LowRankUpdate, str] | None:
    """Gives each update a different key that fits it, by augmenting paths. Returns None if that is impossible."""
    owners: dict[str, LowRankUpdate] = {}

    def place(update: LowRankUpdate, seen: set[str]) -> bool:
        for key in fits[update]:
            if key not in seen:
                seen.add(key)
                if key not in owners or place(owners[key], seen):
                    owners[key] = update
                    return True
        return False

    if not all(place(update, set()) for update in fits):
        return None
    return {update: key for key, update in owners.items()}


def _leaf(update: LowRankUpdate) -> str:
    return update.path.rpartition(".")[2]


def misfit(file: AdapterFile, update: LowRankUpdate, key: str, shape: tuple[int, ...]) -> str:
    """Says why no layout fits."""
    A, B = file.shape(update.lora_A), file.shape(update.lora_B)
    text = f"shape of {key}: {list(shape)}, but the update's lora_A is {list(A)} and lora_B {list(B)}"
    groups = num_matrices(file, update)
    if update.kind == "conv" and groups > 1 and len(shape) > 1 and A[1] == shape[1] * groups:
        text += "; it reaches across the groups of the convolution, which no weight of it can hold"
    return text
