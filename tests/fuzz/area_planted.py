"""Ops and readers of files with planted bugs; tests/fuzz/test_fuzz.py checks that each kind is found."""

from __future__ import annotations

import ctypes
import itertools
import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from . import area_files
from .calls import Call
from .cases import Case, WrongResult
from .choices import Choices
from .values import TensorValue


def crashes(x: Tensor) -> Tensor:
    return ctypes.string_at(0)


def hangs(x: Tensor) -> Tensor:
    while True:
        pass


def leaves_garbage(x: Tensor) -> Tensor:
    return torch.empty(1 << 16)  # large enough to be new memory


def is_wrong(x: Tensor) -> Tensor:
    return x + 1


def raises_what_is_not_ours(x: Tensor) -> Tensor:
    return x.no_such_attribute


def names_nothing(x: Tensor) -> Tensor:
    raise ValueError("something is wrong")


def changes_and_refuses(x: Tensor) -> Tensor:
    x.add_(1)
    raise ValueError("changes_and_refuses: x is wrong")


def changes_its_argument(x: Tensor) -> Tensor:
    return x.add_(1)


def changes_without_a_trace(x: Tensor) -> Tensor:
    x.data.view(-1)[:1] += 1  # does not increment the version
    return x.clone()


_CALLS = itertools.count()


def is_never_the_same(x: Tensor) -> Tensor:
    return x * (1 + next(_CALLS) % 2 * 1e-5)


OPS: dict[Callable[[Tensor], Tensor], str] = {
    leaves_garbage: "uninitialised",
    is_wrong: "wrong result",
    raises_what_is_not_ours: "wrong exception",
    names_nothing: "unclear message",
    changes_and_refuses: "changed after a refusal",
    changes_its_argument: "changed argument",
    changes_without_a_trace: "changed argument",
    is_never_the_same: "not reproducible",
    crashes: "crash",
    hangs: "hang",
}


def takes_seconds(path: Path) -> None:
    begin = time.process_time()
    while time.process_time() < begin + 0.6:  # the limit of these cases is 0.5
        pass


def takes_memory(path: Path) -> int:
    return len(b"x" * (300 << 20))


def leaves_a_file(path: Path) -> None:
    path.with_suffix(".partial").write_text("half")
    raise ValueError(f"{path} is refused")


def waits_for_ever(path: Path) -> None:
    os.mkfifo(path.with_suffix(".fifo"))
    path.with_suffix(".fifo").read_bytes()


def finds_nothing(path: Path) -> list:
    return []


READERS: dict[Callable[[Path], Any], str] = {
    takes_seconds: "slow",
    takes_memory: "memory",
    leaves_a_file: "changed after a refusal",
    waits_for_ever: "hang",
    finds_nothing: "wrong result",
}
FUNCTIONS = [*OPS, *READERS]

LIBRARY = torch.library.Library("lora_ext_planted", "DEF")
for _function in OPS:
    LIBRARY.define(f"{_function.__name__}(Tensor x) -> Tensor")
    LIBRARY.impl(_function.__name__, _function, "CompositeExplicitAutograd")


def _check_op(before: Any, result: Tensor, after: Any) -> None:
    if result.shape == (5, 3) and not torch.allclose(result, before["x"], rtol=1e-3):
        raise WrongResult(f"the result is {result.flatten()[:3].tolist()}, want x")


def _check_reader(files: Path, result: Any, model: None) -> None:
    if result == []:
        raise WrongResult("the content of the file is missing")


def make(choices: Choices) -> Case:
    function = choices.pick(FUNCTIONS)
    if function in OPS:
        values = {"x": TensorValue((5, 3))}
        return Call(f"torch.ops.lora_ext_planted.{function.__name__}", values, _check_op).case(repeat=True)
    area_files.SECONDS = 0.5

    def read(files: Path, model: None) -> Any:
        return function(files / "adapter" / "adapter_config.json")

    reader = area_files.Reader(function.__name__, ("adapter/adapter_config.json",), read, _check_reader)
    return area_files.make(choices, (reader,))
