"""Checks the values of a :class:`LoraConfig` and converts them to immutable types."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from enum import Enum
from typing import Any, NoReturn

from lora_ext._common.printable import shown
from lora_ext.matching.bounded_regex import check_expressions


class FrozenDict(dict[str, Any]):
    """A dict that cannot change after construction; picklable, copyable, and hashable if its values are."""

    def _refuse(self, *args: Any, **kwargs: Any) -> NoReturn:
        raise TypeError("FrozenDict: cannot be changed; build another config with dataclasses.replace")

    __setitem__ = __delitem__ = __ior__ = clear = pop = popitem = setdefault = update = _refuse  # type: ignore[assignment]

    def __hash__(self) -> int:  # type: ignore[override]
        return hash(frozenset(self.items()))

    def __reduce__(self) -> tuple[Any, ...]:
        return type(self), (dict(self),)


def check_number(key: str, value: Any, types: tuple[type, ...], is_valid: Callable[[Any], bool], want: str) -> None:
    if not isinstance(value, types) or isinstance(value, bool):
        raise TypeError(f"LoraConfig: {key} is {shown(value)} of type {type(value).__name__}, want {want}")
    if not is_valid(value):
        raise ValueError(f"LoraConfig: {key} is {shown(value)}, want {want}")


def check_rank(key: str, value: Any) -> None:
    check_number(key, value, (int,), lambda r: 1 <= r < 2**31, "an integer of at least 1 and below 2**31")


def check_alpha(key: str, value: Any) -> None:
    check_number(key, value, (int, float), lambda alpha: 0 < alpha < math.inf, "a positive finite number")


def names(key: str, value: Any, *, may_be_regex: bool) -> tuple[str, ...] | str | None:
    """Checks a list of names, or a regular expression where allowed; returns a tuple or the expression."""
    if value is None:
        return None
    if isinstance(value, str):
        if not may_be_regex:
            text = shown(value)
            raise TypeError(f"LoraConfig: {key} is the string {text}, want a list of module names: [{text}]")
        check_expressions(key, [value])
        return value
    values = _sequence(key, value, "module names")
    for name in values:
        if not isinstance(name, str) or not name:
            raise TypeError(f"LoraConfig: {key} has the entry {shown(name)}, want non-empty strings")
    return values


def _sequence(key: str, value: Any, what: str) -> tuple[Any, ...]:
    if not isinstance(value, (list, tuple, set, frozenset)):
        raise TypeError(f"LoraConfig: {key} is {shown(value)} of type {type(value).__name__}, want a list of {what}")
    return tuple(sorted(value)) if isinstance(value, (set, frozenset)) else tuple(value)


def _whole_numbers(key: str, value: Any, what: str) -> tuple[int, ...]:
    values = _sequence(key, value, what)
    for number in values:
        if not isinstance(number, int) or isinstance(number, bool):
            raise TypeError(f"LoraConfig: {key} has the entry {shown(number)}, want {what}")
        if number < 0:
            raise ValueError(f"LoraConfig: {key} has the entry {shown(number)}, want {what}, at least 0")
    return values


def layer_numbers(value: Any) -> tuple[int, ...] | int | None:
    if value is None:
        return None
    if isinstance(value, int):
        return _whole_numbers("layers_to_transform", [value], "layer numbers")[0]
    return _whole_numbers("layers_to_transform", value, "layer numbers")


def _mapping(key: str, value: Any, want: str) -> Mapping[str, Any]:
    if not isinstance(value, Mapping):
        raise TypeError(f"LoraConfig: {key} is {shown(value)} of type {type(value).__name__}, want {want}")
    for name in value:
        if not isinstance(name, str) or not name:
            raise TypeError(f"LoraConfig: {key} has the key {shown(name)}, want non-empty strings")
    return value


def pattern(key: str, value: Any, check: Callable[[str, Any], None]) -> FrozenDict:
    # PEFT's type allows None, and some files have it.
    value = _mapping(key, {} if value is None else value, "a dict of path patterns")
    check_expressions(key, value)
    for pattern, number in value.items():
        check(f"{key}[{shown(pattern)}]", number)
    return FrozenDict(value)


def token_indices(value: Any) -> tuple[int, ...] | FrozenDict | None:
    key = "trainable_token_indices"

    def indices(where: str, tokens: Any) -> tuple[int, ...]:
        tokens = _whole_numbers(where, tokens, "token numbers")
        if len(set(tokens)) < len(tokens):
            twice = sorted(token for token, count in Counter(tokens).items() if count > 1)
            raise ValueError(f"LoraConfig: {where} has {shown(twice)} more than once; name each token once")
        return tokens

    if value is None:
        return None
    if isinstance(value, Mapping):
        value = _mapping(key, value, "")
        return FrozenDict({name: indices(f"{key}[{shown(name)}]", tokens) for name, tokens in value.items()})
    return indices(key, value)


def invocation_tokens(value: Any) -> tuple[int, ...] | None:
    # Empty: off, as in PEFT.
    if isinstance(value, set | frozenset):
        raise TypeError(f"LoraConfig: alora_invocation_tokens is the set {shown(value)}, want a list: order matters")
    return None if value is None else _whole_numbers("alora_invocation_tokens", value, "token numbers") or None


def enabled_parts(value: Any) -> FrozenDict | None:
    if value is None:
        return None
    parts = {}
    for name, flags in _mapping("enable_lora", value, "a dict: module name to one bool for each part").items():
        flags = flags if isinstance(flags, Iterable) and not isinstance(flags, str) else (flags,)
        parts[name] = tuple(flags)
        if not all(isinstance(flag, bool) for flag in parts[name]) or not any(parts[name]):
            raise ValueError(
                f"LoraConfig: enable_lora[{shown(name)}] is {shown(flags)}, want bools, at least one of them True"
            )
    return FrozenDict(parts)


def thaw(value: Any) -> Any:
    """Converts frozen values to JSON types: tuples to lists, mappings to dicts."""
    if isinstance(value, tuple):
        return [thaw(entry) for entry in value]
    if isinstance(value, Mapping):
        return {key: thaw(entry) for key, entry in value.items()}
    return value


def plain(value: Any) -> Any:
    """Converts a value of a PEFT config to JSON types: an enum to its value, a set to a sorted list."""
    if isinstance(value, Enum):
        return value.value
    return sorted(value) if isinstance(value, (set, frozenset)) else value
