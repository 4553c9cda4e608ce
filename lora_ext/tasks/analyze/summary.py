"""What the measurements of all layers come to."""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from typing import Any

import numpy as np

from lora_ext.analysis import expected_random_similarity
from lora_ext.tasks.analyze.measures import SIDES, rounded
from lora_ext.tasks.analyze.places import places

__all__ = ["changes", "pair_of", "summarise"]

_MOST_CHANGED = 10


def summarise(layers: Sequence[dict[str, Any]], num_adapters: int) -> dict[str, Any]:
    """Figures over all layers.

    Args:
        layers: what :func:`~lora_ext.tasks.analyze.measures.measure` returned.

    Returns:
        ``adapters``, for each: ``layers``; ``norm`` and ``relative_change`` of all its updates together; ``kinds``,
        means by kind of layer; ``most_changed``, the largest of :func:`changes` first.
        ``similarity``, for each pair: ``of``, ``layers`` that both have and, by side, :func:`_mean_similarity`.
    """
    summary = {
        "adapters": [_adapter(layers, number) for number in range(num_adapters)],
        "similarity": [
            {
                "of": list(pair),
                "layers": sum(pair_of(layer, pair) is not None for layer in layers),
                **{side: _mean_similarity(layers, pair, side) for side in SIDES},
            }
            for pair in dict.fromkeys(tuple(one["of"]) for layer in layers for one in layer["similarity"])
        ],
    }
    return rounded(summary)


def changes(layers: Sequence[dict[str, Any]], number: int) -> dict[str, float]:
    """By how much an adapter changed each layer: relative to the weight; the updates' norms where no layer has one."""
    own = {layer["name"]: layer["adapters"][number] for layer in layers if layer["adapters"][number] is not None}
    relative = {name: one["relative_change"] for name, one in own.items() if one["relative_change"] is not None}
    return relative or {name: one["norm"] for name, one in own.items()}


def _mean_similarity(layers: Sequence[dict[str, Any]], pair: tuple[int, int], side: str) -> dict[str, Any] | None:
    """The mean over layers of ``phi`` and of its expectation for random subspaces, up to the smallest layer's sizes.

    Returns:
        ``phi`` and ``random_mean``, grids, and ``layers`` that they are of; None where no layer has both.
    """
    pairs = [own for layer in layers if (own := pair_of(layer, pair)) is not None]
    found = [own[side] for own in pairs if own[side]["last"] is not None]
    if not found:
        return None
    grids = [np.array(one["phi"]) for one in found]
    i, j = np.min([grid.shape for grid in grids], axis=0).tolist()
    expected = [expected_random_similarity(i, j, one["dimension"]).numpy() for one in found]
    phi, random = (np.mean(values, axis=0) for values in ([grid[:i, :j] for grid in grids], expected))
    return {"phi": phi.tolist(), "random_mean": random.tolist(), "layers": len(found)}


def pair_of(layer: dict[str, Any], pair: tuple[int, int]) -> dict[str, Any] | None:
    """The similarity of two adapters in a layer, where both have it."""
    return next((one for one in layer["similarity"] if tuple(one["of"]) == pair), None)


def _adapter(layers: Sequence[dict[str, Any]], number: int) -> dict[str, Any]:
    own = [layer for layer in layers if layer["adapters"][number] is not None]
    place = places([layer["name"] for layer in own])
    kinds: dict[str, list[dict[str, Any]]] = {}
    for layer in own:
        kinds.setdefault(place[layer["name"]][1], []).append(layer)
    norm = math.hypot(*(layer["adapters"][number]["norm"] for layer in own))
    weighed = [layer for layer in own if layer["weight_norm"] is not None]
    weight_norm = math.hypot(*(layer["weight_norm"] for layer in weighed))
    changed = math.hypot(*(layer["adapters"][number]["norm"] for layer in weighed))
    ranking = sorted(changes(layers, number).items(), key=lambda item: -item[1])[:_MOST_CHANGED]
    return {
        "layers": len(own),
        "norm": norm,
        "relative_change": changed / weight_norm if weight_norm else None,
        "kinds": {kind: _means(of_kind, number) for kind, of_kind in kinds.items()},
        "most_changed": [{"name": name, "change": size} for name, size in ranking],
    }


def _means(layers: Sequence[dict[str, Any]], number: int) -> dict[str, Any]:
    """Over layers of one kind; of what some lack, over the others."""
    own = [layer["adapters"][number] for layer in layers]
    tables = [one["projection"] for one in own if one["projection"]]
    last = [{key: values[-1] for key, values in table.items() if values} for table in tables]
    return {
        "layers": len(own),
        **{key: _mean(one[key] for one in own) for key in ("norm", "relative_change", "effective_rank", "stable_rank")},
        **{key: _mean(one.get(key) for one in last) for key in ("delta", "weight", "random", "amplification")},
    }


def _mean(values) -> float | None:
    known = [value for value in values if value is not None]
    return statistics.fmean(known) if known else None
