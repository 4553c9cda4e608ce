"""Which way round an update lies on a tensor, and which of a module's parameters it belongs to: by shapes, mostly."""

from __future__ import annotations

import itertools
from collections.abc import Mapping
from typing import Literal, TypeAlias

from ..adapter_file import AdapterFile
from .contents import LowRankUpdate

__all__ = ["Layout", "assign_parameters", "choose_layout", "fitting_layouts", "misfit", "num_matrices"]

Layout: TypeAlias = Literal["plain", "transposed"]
"""``plain``: the tensor is ``[out, in]``, as in Linear; ``transposed``: ``[in, out]``, as in Conv1D and Embedding."""


def num_matrices(file: AdapterFile, update: LowRankUpdate) -> int:
    """Of experts, or groups of a convolution: they lie one above the other in the tensor, with factors of their own."""
    if update.kind == "parameter":
        return file.shape(update.lora_A)[0] // update.r
    if update.kind == "conv":
        return update.r // file.shape(update.lora_B)[1]
    return 1


def fitting_layouts(file: AdapterFile, update: LowRankUpdate, shape: tuple[int, ...]) -> set[Layout]:
    """The layouts in which the update has the shape of the tensor."""
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


def choose_layout(
    update: LowRankUpdate,
    fitting: Mapping[LowRankUpdate, set[Layout]],
    *,
    asked: bool | None,
    configured: bool,
) -> Layout | None:
    """The layout of ``update``; of a square tensor as asked, or as that of its kind; None where these disagree.

    Args:
        fitting: the layouts that fit, of each of the adapter's updates.
        asked: by the user: True for transposed.
        configured: by the adapter's config, which is not to be trusted: PEFT writes what it met last.
    """
    if len(own := fitting[update]) == 1:
        return next(iter(own))
    if asked is not None:
        return "transposed" if asked else "plain"
    alike = {other: fits for other, fits in fitting.items() if other.kind == update.kind and len(fits) == 1}
    leaf = update.path.rpartition(".")[2]
    same_name = [fits for other, fits in alike.items() if other.path.rpartition(".")[2] == leaf]
    for evidence in (same_name, list(alike.values())):
        if len(found := set().union(*evidence)) == 1:
            return found.pop()
    if alike or update.kind == "parameter":
        return None
    return "transposed" if configured else "plain"


def assign_parameters(
    file: AdapterFile, updates: list[LowRankUpdate], shapes: Mapping[str, tuple[int, ...]]
) -> list[dict[LowRankUpdate, str]]:
    """The ways in which updates of one module's parameters can belong to these: no key says whose an update is."""
    return [
        dict(zip(updates, order, strict=True))
        for order in itertools.permutations(shapes, len(updates))
        if all(fitting_layouts(file, update, shapes[key]) for update, key in zip(updates, order, strict=True))
    ]


def misfit(file: AdapterFile, update: LowRankUpdate, key: str, shape: tuple[int, ...]) -> str:
    """Says why no layout fits."""
    A, B = file.shape(update.lora_A), file.shape(update.lora_B)
    text = f"shape of {key}: {list(shape)}, but the update's lora_A is {list(A)} and lora_B {list(B)}"
    groups = num_matrices(file, update)
    if update.kind == "conv" and groups > 1 and len(shape) > 1 and A[1] == shape[1] * groups:
        text += "; it reaches across the groups of the convolution, which no weight of it can hold"
    return text
