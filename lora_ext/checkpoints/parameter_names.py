"""A module's parameters by the names of an adapter, among the names of a checkpoint, which may have another prefix.

An adapter of ``BertForSequenceClassification`` calls ``bert.encoder...`` what a checkpoint of ``BertModel`` calls
``encoder...``, and the other way round.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Collection, Iterable, Iterator

__all__ = ["Names", "ends", "match_names"]

_MOST_PLACES = 5  # in a message


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
    wanted = dict.fromkeys(names)
    by_end: dict[str, list[str]] = {name: [] for name in wanted if name not in checkpoint}
    if by_end:
        for key in checkpoint:
            for end in _ends(key):
                if end in by_end:
                    by_end[end].append(key)
    for name in wanted:
        if name in checkpoint:
            keys[name] = name
            prefixes.setdefault(("", ""), name)
            continue
        longer = by_end[name]
        shorter = next((end for end in _ends(name) if end in checkpoint), None)
        if len(longer) > 1:
            problems.append(f"{name} may be any of {', '.join(sorted(longer)[:_MOST_PLACES])}")
        elif longer:
            keys[name] = longer[0]
            prefixes.setdefault(("", longer[0].removesuffix(name)), name)
        elif shorter is not None:
            keys[name] = shorter
            prefixes.setdefault((name.removesuffix(shorter), ""), name)
    if len(prefixes) > 1:
        problems.append(
            "names fit by different prefixes: "
            + "; ".join(f"{name} is {keys[name]}" for name in list(prefixes.values())[:_MOST_PLACES])
        )
    return Names(keys, not prefixes.keys() - {("", "")}, problems)


def ends(name: str) -> Iterator[str]:
    """What follows each dot, the longest first."""
    place = name.find(".")
    while place >= 0:
        yield name[place + 1 :]
        place = name.find(".", place + 1)


def _ends(name: str) -> Iterator[str]:
    """Those with a dot: a parameter's name alone says nothing."""
    return (end for end in ends(name) if "." in end)
