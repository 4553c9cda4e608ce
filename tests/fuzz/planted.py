"""Functions with a planted bug each; tests/fuzz/test_fuzz.py checks that they are found."""

from __future__ import annotations

import ctypes
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from .compare import WrongResult

PREFIX = "lora_ext_planted."


def hangs(x: Tensor) -> Tensor:
    while True:
        pass


# Each by its name, with the kind of finding that it must be.
KINDS: dict[str, tuple[str, Callable[[Tensor], Tensor]]] = {
    "leaves_garbage": ("uninitialised", lambda x: torch.empty(1 << 16)),  # large enough to be new memory
    "is_wrong": ("wrong result", lambda x: x + x.shape[1] // 2),
    "changes_without_a_trace": ("changed argument", lambda x: (x.data.view(-1)[:1].add_(1), x.clone())[1]),
    "raises_what_is_not_ours": ("wrong exception", lambda x: x.no_such_attribute),
    "crashes": ("crash", lambda x: ctypes.string_at(0)),
    "hangs": ("hang", hangs),
}
FUNCTIONS = {name: function for name, (_, function) in KINDS.items()}


def check(before: Any, result: Tensor, after: Any) -> None:
    if result.shape == before["x"].shape and not torch.allclose(result, before["x"], rtol=1e-3):
        raise WrongResult(f"the result is {result.flatten()[:3].tolist()}, want x")
