"""Checks the arguments of public functions against their annotations, before the function runs.

The annotation is both the rule and the end of the message, so the two cannot differ. A check takes 0.1 microseconds per
argument. The functions of single ops check only after a call has failed (lora_ext/_ops/errors.py).
"""

from __future__ import annotations

import collections.abc
import functools
import inspect
import itertools
import numbers
import os
import reprlib
import types
import typing
from collections.abc import Callable, Iterator, Mapping
from typing import Any, ParamSpec, TypeVar

import torch

P = ParamSpec("P")
R = TypeVar("R")
Test = Callable[[Any], bool]

_NUMBERS: dict[type, tuple[type, ...]] = {
    int: (numbers.Integral, torch.SymInt),
    float: (numbers.Real, torch.SymInt, torch.SymFloat),
}
_WORDS: dict[Any, str] = {
    bool: "True or False",
    int: "an integer",
    float: "a number",
    str: "a string",
    type(None): "None",
    os.PathLike: "a path",
    collections.abc.Callable: "a function",
    torch.nn.Module: "an nn.Module",
}


def checked(function: Callable[P, R]) -> Callable[P, R]:
    """Makes ``function`` raise TypeError, naming itself and the argument, for values that its annotations exclude."""
    parameters = inspect.signature(function).parameters
    kinds = [parameter.kind for parameter in parameters.values()]
    many = kinds.index(inspect.Parameter.VAR_POSITIONAL) if inspect.Parameter.VAR_POSITIONAL in kinds else None
    tests: dict[str, Test] = {}

    @functools.wraps(function)
    def run(*args: P.args, **kwargs: P.kwargs) -> R:
        if not tests:  # on the first call: annotations may name what the module defines further down
            hints = typing.get_type_hints(function)
            tests.update(
                {
                    n: _anything if p.kind is inspect.Parameter.VAR_KEYWORD else _test(hints.get(n, Any))
                    for n, p in parameters.items()
                }
            )
        positional = tests.items() if many is None else _repeating(list(tests.items()), many)
        for (name, test), value in zip(positional, args, strict=False):
            if not test(value):
                _refuse(function, args, name, value)
        for name, value in kwargs.items():
            if name in tests and not tests[name](value):
                _refuse(function, args, name, value)
        return function(*args, **kwargs)

    return run


def _repeating(tests: list[tuple[str, Test]], many: int) -> Iterator[tuple[str, Test]]:
    """The tests of all positional arguments, of which those from number ``many`` on have one name (``*names``)."""
    return itertools.chain(tests[:many], itertools.repeat(tests[many]))


def check_types(function: Callable, arguments: Mapping[str, object]) -> None:
    """Raises the TypeError of ``checked`` for a call of ``function`` with these arguments."""
    hints = typing.get_type_hints(function)
    for name, value in arguments.items():
        if not _test(hints[name])(value):
            _refuse(function, (), name, value)


def _refuse(function: Callable, args: tuple, name: str, value: object) -> None:
    caller = type(args[0]).__name__ if function.__name__ == "__init__" else function.__name__
    kind = type(value).__name__
    plain = isinstance(value, (str, numbers.Number, list, tuple, dict))  # models print long text, tensors slowly
    shown = "None" if value is None else f"{reprlib.repr(value)} of type {kind}" if plain else f"of type {kind}"
    raise TypeError(f"{caller}: {name} is {shown}, want {_described(typing.get_type_hints(function)[name])}")


def _anything(value: object) -> bool:
    return True


def _test(hint: Any) -> Test:
    """Returns a test of values against an annotation; it also tests the entries of lists and dicts."""
    origin, arguments = typing.get_origin(hint), typing.get_args(hint)
    if isinstance(hint, TypeVar):
        return _test(hint.__bound__ or Any)
    if hint is Any:
        return _anything
    if origin in (typing.Union, types.UnionType):
        return _either([_test(argument) for argument in arguments])
    if origin is typing.Literal:
        return lambda value: value in arguments
    kind = origin or hint
    if kind in _NUMBERS:
        return lambda value: isinstance(value, _NUMBERS[kind]) and not isinstance(value, bool)
    if not arguments or not issubclass(kind, collections.abc.Iterable):
        return lambda value: isinstance(value, kind)
    if issubclass(kind, collections.abc.Mapping):
        key, entry = map(_test, arguments)
        return lambda value: isinstance(value, kind) and all(key(k) and entry(v) for k, v in value.items())
    entry = _test(arguments[0])
    # A string is not a list of strings, bytes are no list of numbers, and a 0-dimensional array is not a list.
    # One-pass iterables are not read.
    return lambda value: (
        isinstance(value, kind)
        and not isinstance(value, (str, bytes, bytearray))
        and getattr(value, "ndim", 1) > 0
        and (not isinstance(value, collections.abc.Sized) or all(map(entry, value)))
    )


def _either(tests: list[Test]) -> Test:
    return lambda value: any(test(value) for test in tests)


def _described(hint: Any) -> str:
    """Describes in words what an annotation asks for."""
    origin, arguments = typing.get_origin(hint), typing.get_args(hint)
    if isinstance(hint, TypeVar):
        return _described(hint.__bound__)
    if origin in (typing.Union, types.UnionType):
        *others, last = dict.fromkeys(map(_described, arguments))
        return f"{', '.join(others)} or {last}" if others else last
    if origin is typing.Literal:
        return ", ".join(map(repr, arguments))
    kind = origin or hint
    if kind in _WORDS:
        return _WORDS[kind]
    if arguments and issubclass(kind, collections.abc.Mapping):
        return "a dict of " + " to ".join(map(_plural, arguments))
    if arguments and issubclass(kind, collections.abc.Iterable):
        return f"a list of {_plural(arguments[0])}"
    name = f"torch.{kind.__qualname__}" if kind.__module__.startswith("torch") else kind.__qualname__
    return f"{'an' if name[0] in 'aeioAEIO' else 'a'} {name}"


def _plural(hint: Any) -> str:
    words = _described(hint)
    kind, of, entries = words.partition(" ")[2].partition(" of ")
    return words if " or " in words else f"{kind}s{of}{entries}"
