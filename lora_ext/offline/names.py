"""A module's parameters by the names of an adapter, among the names of a checkpoint, which may have another prefix.

An adapter of ``BertForSequenceClassification`` calls ``bert.encoder...`` what a checkpoint of ``BertModel`` calls
``encoder...``, and the other way round.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Collection, Iterable

__all__ = ["Names", "match_names"]


@dataclasses.dataclass(frozen=True)
class Names:
    """Attributes:
    keys: adapter's name -> checkpoint's key, for the names that were found.
    same_prefix: no name had to be changed.
    problems: names with several places, and prefixes that contradict each other.
    """

    keys: dict[str, str]
    same_prefix: bool
    problems: list[str]


def match_names(checkpoint: Collection[str], names: Iterable[str]) -> Names:
    """Each name's key: the same, else the only one that ends with it after a dot, else the longest such end of it."""
    keys: dict[str, str] = {}
    problems: list[str] = []
    prefixes: dict[tuple[str, str], str] = {}  # (removed, added) -> the first name
    by_end: dict[str, list[str]] = {}
    for name in dict.fromkeys(names):
        if name in checkpoint:
            keys[name] = name
            prefixes.setdefault(("", ""), name)
            continue
        if not by_end:
            for key in checkpoint:
                for end in _ends(key):
                    by_end.setdefault(end, []).append(key)
        longer = by_end.get(name, [])
        shorter = next((end for end in _ends(name) if end in checkpoint), None)
        if len(longer) > 1:
            problems.append(f"{name} may be any of {', '.join(sorted(longer))}")
        elif longer:
            keys[name] = longer[0]
            prefixes.setdefault(("", longer[0].removesuffix(name)), name)
        elif shorter is not None:
            keys[name] = shorter
            prefixes.setdefault((name.removesuffix(shorter), ""), name)
    if len(prefixes) > 1:
        problems.append(
            "names fit by different prefixes: " + "; ".join(f"{name} is {keys[name]}" for name in prefixes.values())
        )
    return Names(keys, not prefixes.keys() - {("", "")}, problems)


def _ends(name: str) -> Iterable[str]:
    """What follows each dot but the last, the longest first: a parameter's name alone says nothing."""
    parts = name.split(".")
    return (".".join(parts[i:]) for i in range(1, len(parts) - 1))
