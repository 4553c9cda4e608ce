"""Fuzzes the compiled ops and lora_ext.functional; half of the calls are valid."""

from __future__ import annotations

from . import ops_grouped, ops_merge  # noqa: F401  registers their makers
from .cases import Case
from .choices import Choices
from .mutations import mutate
from .ops import MAKERS

# These refuse without a kernel, or take no tensor: few calls are enough.
_SELDOM = ("torch.ops.lora_ext.lora_merge_check", "lora_ext.functional.draw_seed")
_OFTEN = [MAKERS[name] for name in sorted(MAKERS) for _ in range(1 if name in _SELDOM else 6)]


def make(choices: Choices) -> Case:
    call = choices.pick(_OFTEN)(choices)
    if choices.chance(50):
        call.arguments, call.mutated = mutate(choices, call.arguments)
    return call.case(repeat=choices.chance(10))
