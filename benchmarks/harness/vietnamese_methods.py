"""What benchmarks/vietnamese.py trains: methods, variants of them, and candidates for the defaults of LoRA."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any

from lora_ext.tasks.finetune.defaults import LEARNING_RATES

SEEDS = (0, 1, 2)

_QV = {"method": "lora", "target_modules": "q,v"}
MAIN = {"full": {"method": "full"}, "lora-qv": _QV, "lora-all": {"method": "lora", "target_modules": "all-linear"}}
OTHERS = ("bitfit", "adapter-h", "adapter-l", "adapter-p", "adapter-drop", "prefix-embed", "prefix-layer", "head-only")
METHODS: dict[str, dict[str, Any]] = MAIN | {name: {"method": name} for name in OTHERS}
VARIANTS: dict[str, tuple[str, dict[str, Any]]] = {  # name: the method whose rate it takes, and what differs
    "lora-qkvo": ("lora-qv", {"target_modules": "q,k,v,o"}),
    "lora-qv-pooler": ("lora-qv", {"pooling": "cls"}),
    "lora-qv-balanced": ("lora-qv", {"class_weights": "balanced"}),
    "lora-all-pooler": ("lora-all", {"pooling": "cls"}),
    "lora-all-balanced": ("lora-all", {"class_weights": "balanced"}),
    "full-pooler": ("full", {"pooling": "cls"}),
    "full-balanced": ("full", {"class_weights": "balanced"}),
}
_AVERAGED = {"schedule": "constant", "ema_decay": 0.995}
_POOLER = {"r": 6, "modules_to_save": "pooler"}  # as many parameters as rank 8 without a pooler, and 0.3 % more
_EMBEDDINGS = {  # what docs/results.md found on the reviews; averaged, and with the pooler if there is one: the default
    "target_modules": "query,key,value,dense,word_embeddings",
    "r": 4,
    "lora_alpha": 0.8,
    "learning_rate": 2e-4,
    "lora_plus_ratio": 60.0,
}
_EMBEDDINGS_AND_POOLER = _EMBEDDINGS | {"modules_to_save": "pooler"}
CANDIDATES: dict[str, tuple[str, dict[str, Any]]] = {  # for the defaults of LoRA; as VARIANTS, on both tasks
    "lora-embeddings-trained-pooler": ("lora-all", _EMBEDDINGS_AND_POOLER),
    "lora-embeddings": ("lora-all", _EMBEDDINGS),
    "lora-embeddings-trained-pooler-averaged": ("lora-all", _EMBEDDINGS_AND_POOLER | _AVERAGED),
    "lora-embeddings-averaged": ("lora-all", _EMBEDDINGS | _AVERAGED),
    "full-averaged": ("full", _AVERAGED),
    "lora-all-averaged": ("lora-all", _AVERAGED),
    "lora-all-trained-pooler": ("lora-all", _POOLER),
    "lora-all-trained-pooler-averaged": ("lora-all", _POOLER | _AVERAGED),
}


# The middle ones of the rates tried first, where they are not the default: it was, until the sweep found a better one.
_MIDDLE_RATES = {"prefix-embed": 1e-2, "prefix-layer": 5e-3}
_STEP = math.sqrt(10)  # between two learning rates
_MOST_RATES = 6


def default_rate(name: str) -> float:
    return LEARNING_RATES.get(METHODS[name]["method"], 1e-3)


def best_rate(name: str, score: Callable[[float], float]) -> float:
    """Returns the learning rate with the best score: of three, and further ones while the best is at an end."""
    middle = _MIDDLE_RATES.get(name, default_rate(name))
    scores = {rate: score(rate) for rate in (_rounded(middle / _STEP), middle, _rounded(middle * _STEP))}
    while len(scores) < _MOST_RATES:
        best = max(scores, key=scores.get)
        if min(scores) < best < max(scores):
            break
        further = _rounded(best / _STEP if best == min(scores) else best * _STEP)
        scores[further] = score(further)
    return max(scores, key=scores.get)


def _rounded(rate: float) -> float:
    return float(f"{rate:.1e}")


def validation_score(metrics: Mapping[str, Any]) -> float:
    return (metrics["validation"]["accuracy"] + metrics["validation"]["macro_f1"]) / 2


def place_in_table(row: Mapping[str, Any]) -> tuple[int, float, int]:
    """Returns the key by which rows are sorted: the main methods first, then by epochs."""
    groups = [list(MAIN), list(METHODS), list(CANDIDATES), list(VARIANTS)]
    group = next((number for number, names in enumerate(groups) if row["name"] in names), len(groups))
    names = [*METHODS, *CANDIDATES, *VARIANTS, row["name"]]
    return group, row["epochs"], names.index(row["name"])
