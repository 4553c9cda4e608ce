"""Matches names of parameters in an adapter with names in a checkpoint, which may have another prefix.

An adapter of ``BertForSequenceClassification`` calls ``bert.encoder...`` what a checkpoint of ``BertModel`` calls
``encoder...``, and the other way round.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Collection, Iterable, Iterator

_MOST_PLACES = 5  # in a message


@dataclasses.dataclass(frozen=True)
class Names:
    """The result of :func:`match_names`.

    Attributes:
        keys: name in the adapter -> key in the checkpoint, for the names that were found.
        same_prefix: every name is a key as it is.
        problems: names that match several keys, and prefixes that contradict each other.
    """

    keys: dict[str, str]
    same_prefix: bool
    problems: list[str]


def match_names(checkpoint: Collection[str], names: Iterable[str]) -> Names:
    """Finds a key for each name: the name itself, or the only key that ends with ``.name``, or the longest end of the
    name, after a dot, that is a key."""
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
    """Yields the part after each dot, the longest first."""
    place = name.find(".")
    while place >= 0:
        yield name[place + 1 :]
        place = name.find(".", place + 1)


def _ends(name: str) -> Iterator[str]:
    """Yields the ends with a dot. The name of a parameter alone identifies nothing."""
    return (end for end in ends(name) if "." in end)
