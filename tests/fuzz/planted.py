"""Functions with a planted bug each; tests/fuzz/test_fuzz.py checks that they are found."""

from __future__ import annotations

import ctypes
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from .calls import Call
from .cases import WrongResult
from .choices import Choices
from .values import TensorValue


def hangs(x: Tensor) -> Tensor:
    while True:
        pass


# Each by its name, with the kind of finding that it must be.
OPS: dict[str, tuple[str, Callable[[Tensor], Tensor]]] = {
    "leaves_garbage": ("uninitialised", lambda x: torch.empty(1 << 16)),  # large enough to be new memory
    "is_wrong": ("wrong result", lambda x: x + 1),
    "changes_without_a_trace": ("changed argument", lambda x: (x.data.view(-1)[:1].add_(1), x.clone())[1]),
    "raises_what_is_not_ours": ("wrong exception", lambda x: x.no_such_attribute),
    "crashes": ("crash", lambda x: ctypes.string_at(0)),
    "hangs": ("hang", hangs),
}
KINDS = {name: kind for name, (kind, _) in OPS.items()}

LIBRARY = torch.library.Library("lora_ext_planted", "DEF")
for _name, (_, _function) in OPS.items():
    LIBRARY.define(f"{_name}(Tensor x) -> Tensor")
    LIBRARY.impl(_name, _function, "CompositeExplicitAutograd")


def _check_op(before: Any, result: Tensor, after: Any) -> None:
    if result.shape == before["x"].shape and not torch.allclose(result, before["x"], rtol=1e-3):
        raise WrongResult(f"the result is {result.flatten()[:3].tolist()}, want x")


def make(choices: Choices, name: str) -> Call:
    values = {"x": TensorValue((choices.randint(3, 5), choices.randint(1, 3)))}
    return Call(f"torch.ops.lora_ext_planted.{name}", values, _check_op, repeat=True)
