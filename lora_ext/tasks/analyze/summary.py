"""Summarises the measurements of all layers."""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from typing import Any

import numpy as np

from lora_ext.analysis import expected_random_similarity
from lora_ext.tasks.analyze.measures import SIDES, rounded
from lora_ext.tasks.analyze.places import places

_MOST_CHANGED = 10


def summarise(layers: Sequence[dict[str, Any]], num_adapters: int) -> dict[str, Any]:
    """Computes figures over all layers.

    Args:
        layers: results of :func:`~lora_ext.tasks.analyze.measures.measure`.

    Returns:
        ``adapters``, for each: ``layers``; ``norm`` and ``relative_change`` of all its updates together; ``kinds``,
        means by kind of layer; ``most_changed``, the largest of :func:`changes` first.
        ``similarity``, for each pair: ``of``; ``layers``, the number that both have; by side, :func:`_mean_similarity`.
    """
    summary = {
        "adapters": [_adapter(layers, number) for number in range(num_adapters)],
        "similarity": [
            {
                "of": list(pair),
                "layers": sum(pair_of(layer, pair) is not None for layer in layers),
                **{side: _mean_similarity(layers, pair, side) for side in SIDES},
            }
            for pair in dict.fromkeys(tuple(entry["of"]) for layer in layers for entry in layer["similarity"])
        ],
    }
    return rounded(summary)


def changes(layers: Sequence[dict[str, Any]], number: int) -> dict[str, float]:
    """Returns an adapter's change of each layer relative to the weight; the updates' norms if no weight is known."""
    updates = {layer["name"]: layer["adapters"][number] for layer in layers if layer["adapters"][number] is not None}
    relative = {n: update["relative_change"] for n, update in updates.items() if update["relative_change"] is not None}
    return relative or {name: update["norm"] for name, update in updates.items()}


def _mean_similarity(layers: Sequence[dict[str, Any]], pair: tuple[int, int], side: str) -> dict[str, Any] | None:
    """Averages ``phi`` and its expectation for random subspaces over layers, up to the smallest layer's sizes.

    Returns:
        ``phi`` and ``random_mean``, grids; ``layers``, how many were averaged. None if no layer has both.
    """
    pairs = [entry for layer in layers if (entry := pair_of(layer, pair)) is not None]
    found = [entry[side] for entry in pairs if entry[side]["last"] is not None]
    if not found:
        return None
    grids = [np.array(similarity["phi"]) for similarity in found]
    i, j = np.min([grid.shape for grid in grids], axis=0).tolist()
    expected = [expected_random_similarity(i, j, similarity["dimension"]).numpy() for similarity in found]
    phi, random = (np.mean(values, axis=0) for values in ([grid[:i, :j] for grid in grids], expected))
    return {"phi": phi.tolist(), "random_mean": random.tolist(), "layers": len(found)}


def pair_of(layer: dict[str, Any], pair: tuple[int, int]) -> dict[str, Any] | None:
    """Returns the similarity of two adapters in a layer; None if one lacks it."""
    return next((entry for entry in layer["similarity"] if tuple(entry["of"]) == pair), None)


def _adapter(layers: Sequence[dict[str, Any]], number: int) -> dict[str, Any]:
    adapted = [layer for layer in layers if layer["adapters"][number] is not None]
    place = places([layer["name"] for layer in adapted])
    kinds: dict[str, list[dict[str, Any]]] = {}
    for layer in adapted:
        kinds.setdefault(place[layer["name"]][1], []).append(layer)
    norm = math.hypot(*(layer["adapters"][number]["norm"] for layer in adapted))
    weighed = [layer for layer in adapted if layer["weight_norm"] is not None]
    weight_norm = math.hypot(*(layer["weight_norm"] for layer in weighed))
    changed = math.hypot(*(layer["adapters"][number]["norm"] for layer in weighed))
    ranking = sorted(changes(layers, number).items(), key=lambda item: -item[1])[:_MOST_CHANGED]
    return {
        "layers": len(adapted),
        "norm": norm,
        "relative_change": changed / weight_norm if weight_norm else None,
        "kinds": {kind: _means(of_kind, number) for kind, of_kind in kinds.items()},
        "most_changed": [{"name": name, "change": size} for name, size in ranking],
    }


def _means(layers: Sequence[dict[str, Any]], number: int) -> dict[str, Any]:
    """Averages over layers of one kind; each figure over the layers that have it."""
    updates = [layer["adapters"][number] for layer in layers]
    tables = [update["projection"] for update in updates if update["projection"]]
    last = [{key: values[-1] for key, values in table.items() if values} for table in tables]
    in_update = ("norm", "relative_change", "effective_rank", "stable_rank")
    return {
        "layers": len(updates),
        **{key: _mean(update[key] for update in updates) for key in in_update},
        **{key: _mean(table.get(key) for table in last) for key in ("delta", "weight", "random", "amplification")},
    }


def _mean(values) -> float | None:
    known = [value for value in values if value is not None]
    return statistics.fmean(known) if known else None
