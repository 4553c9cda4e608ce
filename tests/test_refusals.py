"""Tests that every public function refuses bad arguments with a clear error and changes nothing."""

from __future__ import annotations

import dataclasses
import inspect
from pathlib import Path
from types import FunctionType
from typing import Any

import pytest
from support.models import Net
from support.public_calls import Call, call, state
from support.refusals import CALLS, REFUSED

import lora_ext
from lora_ext import adapters, analysis, methods
from lora_ext import nn as layers
from lora_ext.integrations import peft as integration

MODULES = (lora_ext, adapters, analysis, layers, methods, integration)
NO_CALLS = {
    "AdapterLayer": "is abstract",
    "LoraConfig": "has tests/injection/test_config.py",
    "LoraLayer": "is abstract",
    "MergedLinear": "is LoraPackedLinear",
    "Method": "is abstract",
}


def name_of(call: Call) -> str:
    return call.function.__name__


def test_no_public_function_is_missing():
    public = {name: getattr(module, name) for module in MODULES for name in module.__all__}
    functions = {
        value.__name__  # one name for a class and its aliases
        for value in public.values()
        if callable(value) and not (dataclasses.is_dataclass(value) or issubclass_of_tuple(value))
    }
    called = {name_of(call) for call in CALLS}
    missing = functions - NO_CALLS.keys() - called
    assert not missing, "give these a row of good and bad calls in tests/support/refusals.py"
    assert functions - NO_CALLS.keys() == called - NO_CALLS.keys()


def issubclass_of_tuple(value: Any) -> bool:
    return isinstance(value, type) and issubclass(value, tuple)


@pytest.mark.parametrize("public", CALLS, ids=name_of)
def test_the_good_call_is_good(public, tmp_path):
    arguments = public.arguments(tmp_path)
    given = {*arguments, "arguments", "options", "args", "kwargs", "self"}
    assert set(inspect.signature(public.function).parameters) <= given  # or an argument would not be tested
    call(public.function, arguments)


TAKE_MODELS = [public for public in CALLS if "model" in inspect.signature(public.function).parameters]
NAMED = {public.function: public for public in CALLS}
ALL_REFUSED = [(NAMED[function], *refusal) for function, *refusal in REFUSED]
ALL_REFUSED += [(one, {"model": Net}, TypeError, "model is of type type, want an nn.Module") for one in TAKE_MODELS]


def made(value: Any, directory: Path) -> Any:
    if not isinstance(value, FunctionType):
        return value
    return value(directory) if inspect.signature(value).parameters else value()


@pytest.mark.full(but=2)
@pytest.mark.parametrize(
    ("public", "changes", "error", "words"),
    ALL_REFUSED,
    ids=[f"{name_of(row[0])}: {row[3][:40]}" for row in ALL_REFUSED],
)
def test_bad_values(public, changes, error, words, tmp_path):
    arguments = public.arguments(tmp_path) | {name: made(value, tmp_path) for name, value in changes.items()}
    before = {name: state(value) for name, value in arguments.items()}
    with pytest.raises(error) as caught:
        call(public.function, arguments)
    assert words.replace("FUNCTION", name_of(public)) in str(caught.value)
    assert {name: state(value) for name, value in arguments.items()} == before


class Strange:
    """A type that no function accepts."""


ARGUMENTS = [
    (public, name)
    for public in CALLS
    for name, parameter in inspect.signature(public.function).parameters.items()
    if parameter.kind not in (parameter.VAR_POSITIONAL, parameter.VAR_KEYWORD)
]


@pytest.mark.parametrize(("public", "name"), ARGUMENTS, ids=[f"{name_of(entry)}: {name}" for entry, name in ARGUMENTS])
def test_bad_types(public, name, tmp_path):
    arguments = public.arguments(tmp_path) | {name: Strange()}
    before = {key: state(value) for key, value in arguments.items() if key != name}
    with pytest.raises(TypeError) as caught:
        call(public.function, arguments)
    assert str(caught.value).startswith(f"{name_of(public)}: {name} is of type Strange, want "), str(caught.value)
    assert {key: state(value) for key, value in arguments.items() if key != name} == before
