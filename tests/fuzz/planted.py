"""Functions with a bug, for the tests that one is reported and that the next cases run after a crash."""

from __future__ import annotations

import ctypes
from typing import Any

import torch
from torch import Tensor

from .compare import WrongResult

PREFIX = "lora_ext_planted."
FUNCTIONS = {"is_wrong": lambda x: x + x.shape[1] // 2, "crashes": lambda x: ctypes.string_at(0)}


def check(before: Any, result: Tensor, after: Any) -> None:
    if not torch.equal(result, before["x"]):
        raise WrongResult(f"the result is {result.flatten()[:3].tolist()}, want x")
