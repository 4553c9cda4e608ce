"""Fuzzes functions and classes that take plain values and modules; half of the calls are valid."""

from __future__ import annotations

from . import python_analysis  # noqa: F401  registers its makers
from .areas import Case
from .choices import Choices
from .mutations import mutate
from .outcomes import run_call
from .python_values import VALUES

_MAKERS = [
    VALUES[name] for name in sorted(VALUES) for _ in range(8 if "LoraConfig" in name else 2 if ".nn." in name else 1)
]


def make(choices: Choices) -> Case:
    call = choices.pick(_MAKERS)(choices)
    if choices.chance(50):
        call.arguments, call.mutated = mutate(choices, call.arguments)
    return Case(call.function, call.source(), lambda: run_call(call))
