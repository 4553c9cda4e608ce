"""Checks the arguments of public functions against their annotations, before the function runs.

The annotation is both the rule and the end of the message, so the two cannot differ. A check takes 0.1 microseconds per
argument. The functions of single ops check only after a call has failed (lora_ext/_ops/errors.py).
"""

from __future__ import annotations

import functools
import inspect
import numbers
import os
import reprlib
import types
import typing
from collections.abc import Callable, Iterable, Mapping, Sized
from typing import Any, NamedTuple, ParamSpec, TypeVar

import torch

P = ParamSpec("P")
R = TypeVar("R")

# The types that an annotation accepts, where they are not itself, and the words for it.
_KINDS: dict[Any, tuple[tuple[type, ...], str]] = {
    bool: ((bool,), "True or False"),
    int: ((numbers.Integral, torch.SymInt), "an integer"),
    float: ((numbers.Real, torch.SymInt, torch.SymFloat), "a number"),
    str: ((str,), "a string"),
    type(None): ((type(None),), "None"),
    os.PathLike: ((os.PathLike,), "a path"),
    torch.nn.Module: ((torch.nn.Module,), "an nn.Module"),
}


class Rule(NamedTuple):
    """Tests a value against an annotation; ``words`` say what the annotation allows, for messages."""

    test: Callable[[Any], bool]
    words: str


def checked(function: Callable[P, R]) -> Callable[P, R]:
    """Makes ``function`` raise TypeError, naming itself and the argument, for values that its annotations exclude.

    Arguments of ``*names`` and ``**options`` are not checked.
    """
    parameters = inspect.signature(function).parameters
    by_position = [n for n, p in parameters.items() if p.kind in (p.POSITIONAL_ONLY, p.POSITIONAL_OR_KEYWORD)]
    names = [*by_position, *(n for n, p in parameters.items() if p.kind is p.KEYWORD_ONLY)]
    tests: dict[str, Callable[[Any], bool]] = {}

    @functools.wraps(function)
    def run(*args: P.args, **kwargs: P.kwargs) -> R:
        if not tests:  # on the first call: annotations may name what the module defines further down
            hints = typing.get_type_hints(function)
            tests.update({name: rule(hints.get(name, Any)).test for name in names})
        for name, value in zip(by_position, args, strict=False):
            if not tests[name](value):
                _refuse(function, args, name, value)
        for name, value in kwargs.items():
            if name in tests and not tests[name](value):
                _refuse(function, args, name, value)
        return function(*args, **kwargs)

    return run


def check_types(function: Callable, arguments: Mapping[str, object]) -> None:
    """Raises the TypeError of ``checked`` for a call of ``function`` with these arguments."""
    hints = typing.get_type_hints(function)
    for name, value in arguments.items():
        if not rule(hints[name]).test(value):
            _refuse(function, (), name, value)


def _refuse(function: Callable, args: tuple, name: str, value: object) -> None:
    caller = type(args[0]).__name__ if function.__name__ == "__init__" else function.__name__
    kind = type(value).__name__
    plain = isinstance(value, (str, numbers.Number, list, tuple, dict))  # models print long text, tensors slowly
    shown = "None" if value is None else f"{reprlib.repr(value)} of type {kind}" if plain else f"of type {kind}"
    raise TypeError(f"{caller}: {name} is {shown}, want {rule(typing.get_type_hints(function)[name]).words}")


def rule(hint: Any) -> Rule:
    """Returns what an annotation asks for, also of the entries of lists."""
    origin, arguments = typing.get_origin(hint), typing.get_args(hint)
    if isinstance(hint, TypeVar):
        return rule(hint.__bound__ or Any)
    if hint is Any:
        return Rule(lambda value: True, "anything")
    if origin in (typing.Union, types.UnionType):
        rules = [rule(argument) for argument in arguments]
        *others, last = dict.fromkeys(one.words for one in rules)
        words = f"{', '.join(others)} or {last}" if others else last
        return Rule(lambda value: any(one.test(value) for one in rules), words)
    if origin is typing.Literal:
        return Rule(lambda value: value in arguments, ", ".join(map(repr, arguments)))
    kind = origin or hint
    if arguments and issubclass(kind, Iterable):
        return _list_of(kind, rule(arguments[0]))
    accepted, words = _KINDS.get(kind) or ((kind,), _name(kind))
    is_number = kind in (int, float)
    return Rule(lambda value: isinstance(value, accepted) and not (is_number and isinstance(value, bool)), words)


def _list_of(kind: type, entry: Rule) -> Rule:
    # A string is not a list of strings, bytes are no list of numbers, and a 0-dimensional array is not a list.
    # One-pass iterables are not read.
    def test(value: Any) -> bool:
        if not isinstance(value, kind) or isinstance(value, (str, bytes, bytearray)) or getattr(value, "ndim", 1) == 0:
            return False
        return not isinstance(value, Sized) or all(map(entry.test, value))

    first, of, rest = entry.words.partition(" ")[2].partition(" of ")
    plural = entry.words if " or " in entry.words else f"{first}s{of}{rest}"
    return Rule(test, f"a list of {plural}")


def _name(kind: type) -> str:
    name = f"torch.{kind.__qualname__}" if kind.__module__.startswith("torch") else kind.__qualname__
    return f"{'an' if name[0] in 'aeioAEIO' else 'a'} {name}"
