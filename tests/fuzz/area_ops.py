"""Fuzzes the compiled ops and lora_ext.functional; half of the calls are valid."""

from __future__ import annotations

from . import ops_backward, ops_grouped, ops_merge  # noqa: F401  registers their makers
from .areas import Case
from .choices import Choices
from .functions import FUNCTIONS
from .mutations import mutate
from .ops import OPS
from .outcomes import run_call

# These have no CPU kernels, so few calls are enough to see that they refuse.
_SELDOM = ("lora_merge_check",)
_MAKERS = [OPS[name] for name in sorted(OPS) for _ in range(1 if name in _SELDOM else 6)]
_MAKERS += [FUNCTIONS[name] for name in sorted(FUNCTIONS) for _ in range(1 if name == "draw_seed" else 6)]


def make(choices: Choices) -> Case:
    call = choices.pick(_MAKERS)(choices)
    if choices.chance(50):
        call.arguments, call.mutated = mutate(choices, call.arguments)
    repeat = choices.chance(10)
    return Case(call.function, call.source(), lambda: run_call(call, repeat))
