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

_CALLS = itertools.count()


def hangs(x: Tensor) -> Tensor:
    while True:
        pass


def raises(text: str) -> Any:
    raise ValueError(text)


# Each by its name, with the kind of finding that it must be.
OPS: dict[str, tuple[str, Callable[[Tensor], Tensor]]] = {
    "leaves_garbage": ("uninitialised", lambda x: torch.empty(1 << 16)),  # large enough to be new memory
    "is_wrong": ("wrong result", lambda x: x + 1),
    "raises_what_is_not_ours": ("wrong exception", lambda x: x.no_such_attribute),
    "names_nothing": ("unclear message", lambda x: raises("something is wrong")),
    "changes_and_refuses": (
        "changed after a refusal",
        lambda x: (x.add_(1), raises("changes_and_refuses: x is wrong")),
    ),
    "changes_its_argument": ("changed argument", lambda x: x.add_(1)),
    "changes_without_a_trace": ("changed argument", lambda x: (x.data.view(-1)[:1].add_(1), x.clone())[1]),
    "is_never_the_same": ("not reproducible", lambda x: x * (1 + next(_CALLS) % 2 * 1e-5)),
    "crashes": ("crash", lambda x: ctypes.string_at(0)),
    "hangs": ("hang", hangs),
}


def takes_seconds(path: Path) -> None:
    begin = time.process_time()
    while time.process_time() < begin + 0.6:  # the limit of these cases is 0.5
        pass


def leaves_a_file(path: Path) -> None:
    path.with_suffix(".partial").write_text("half")
    raise ValueError(f"{path} is refused")


def waits_for_ever(path: Path) -> None:
    os.mkfifo(path.with_suffix(".fifo"))
    path.with_suffix(".fifo").read_bytes()


READERS: dict[str, tuple[str, Callable[[Path], Any]]] = {
    "takes_seconds": ("slow", takes_seconds),
    "takes_memory": ("memory", lambda path: len(b"x" * (300 << 20))),
    "leaves_a_file": ("changed after a refusal", leaves_a_file),
    "waits_for_ever": ("hang", waits_for_ever),
    "finds_nothing": ("wrong result", lambda path: []),
}
KINDS = {name: kind for name, (kind, _) in (OPS | READERS).items()}
NAMES = [*KINDS]

LIBRARY = torch.library.Library("lora_ext_planted", "DEF")
for _name, (_, _function) in OPS.items():
    LIBRARY.define(f"{_name}(Tensor x) -> Tensor")
    LIBRARY.impl(_name, _function, "CompositeExplicitAutograd")


def _check_op(before: Any, result: Tensor, after: Any) -> None:
    if result.shape == before["x"].shape and not torch.allclose(result, before["x"], rtol=1e-3):
        raise WrongResult(f"the result is {result.flatten()[:3].tolist()}, want x")


def _check_reader(files: Path, result: Any, model: None) -> None:
    if result == []:
        raise WrongResult("the content of the file is missing")


def make(choices: Choices, name: str = "") -> Case:
    name = name or choices.choice(NAMES)
    if name in OPS:
        values = {"x": TensorValue((choices.randint(3, 5), choices.randint(1, 3)))}
        return Call(f"torch.ops.lora_ext_planted.{name}", values, _check_op).case(repeat=True)
    area_files.SECONDS = 0.5

    def read(files: Path, model: None) -> Any:
        return READERS[name][1](files / "adapter" / "adapter_config.json")

    reader = area_files.Reader(name, ("adapter/adapter_config.json",), read, _check_reader)
    return area_files.make(choices, readers=(reader,))
