"""Every public function with bad arguments: the kind of error, its words, and nothing changed."""

from __future__ import annotations

import dataclasses
import inspect
from typing import Any

import pytest
from support.refusals import CALLS, Call, call, state

import lora_ext
from lora_ext import adapters, analysis, methods
from lora_ext import nn as layers
from lora_ext.integrations import peft as integration

MODULES = (lora_ext, adapters, analysis, layers, methods, integration)
NO_CALLS = {
    "ActiveAdapters": "is made by layers",
    "AdapterLayer": "is abstract",
    "LoraConfig": "has tests/injection/test_config.py",
    "LoraLayer": "is abstract",
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
    assert functions - NO_CALLS.keys() == {name_of(call) for call in CALLS} - NO_CALLS.keys()


def issubclass_of_tuple(value: Any) -> bool:
    return isinstance(value, type) and issubclass(value, tuple)


@pytest.mark.parametrize("each", CALLS, ids=name_of)
def test_the_good_call_is_good(each, tmp_path):
    arguments = each.arguments(tmp_path)
    given = {*arguments, "arguments", "options", "args", "kwargs", "self"}
    assert set(inspect.signature(each.function).parameters) <= given  # or an argument would not be tested
    call(each.function, arguments)


REFUSED = [(each, *refusal) for each in CALLS for refusal in each.refused]


@pytest.mark.parametrize(
    ("each", "change", "error", "words"), REFUSED, ids=[f"{name_of(each)}: {words[:40]}" for each, *_, words in REFUSED]
)
def test_bad_values(each, change, error, words, tmp_path):
    arguments = each.arguments(tmp_path) | (change(tmp_path) if callable(change) else change)
    before = {name: state(value) for name, value in arguments.items()}
    with pytest.raises(error) as caught:
        call(each.function, arguments)
    assert words in str(caught.value)
    assert {name: state(value) for name, value in arguments.items()} == before


class Strange:
    """Of no type that anything takes."""


ARGUMENTS = [
    (each, name)
    for each in CALLS
    for name, parameter in inspect.signature(each.function).parameters.items()
    if parameter.kind not in (parameter.VAR_POSITIONAL, parameter.VAR_KEYWORD)
]


@pytest.mark.parametrize(("each", "name"), ARGUMENTS, ids=[f"{name_of(each)}: {name}" for each, name in ARGUMENTS])
def test_bad_types(each, name, tmp_path):
    arguments = each.arguments(tmp_path) | {name: Strange()}
    before = {key: state(value) for key, value in arguments.items() if key != name}
    with pytest.raises(TypeError) as caught:
        call(each.function, arguments)
    assert str(caught.value).startswith(f"{name_of(each)}: {name} is of type Strange, want "), str(caught.value)
    assert {key: state(value) for key, value in arguments.items() if key != name} == before
