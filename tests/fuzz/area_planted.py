"""Ops and readers of files with planted bugs; tests/fuzz/test_fuzz.py checks that each kind is found."""

from __future__ import annotations

import ctypes
import itertools
import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from . import area_files
from .area_files import Kind, Reader
from .areas import Case
from .calls import Call
from .choices import Choices
from .compare import WrongResult
from .outcomes import run_call
from .values import literal, tensor

LIBRARY = torch.library.Library("lora_ext_planted", "DEF")


def _crashes(x: Tensor, size: int) -> Tensor:
    if size > 3:
        ctypes.string_at(0)
    return x.clone()


def _hangs(x: Tensor, size: int) -> Tensor:
    while size > 3:
        pass
    return x.clone()


def _leaves_garbage(x: Tensor, size: int) -> Tensor:
    return torch.empty(1 << 16)  # large enough to be new memory


def _is_wrong(x: Tensor, size: int) -> Tensor:
    return x + (size > 3)


def _raises_what_is_not_ours(x: Tensor, size: int) -> Tensor:
    return x.clone() if size <= 3 else x.no_such_attribute


def _names_nothing(x: Tensor, size: int) -> Tensor:
    if size > 3:
        raise ValueError("something is wrong")
    return x.clone()


def _asserts(x: Tensor, size: int) -> Tensor:
    if size > 3:
        raise RuntimeError('size INTERNAL ASSERT FAILED at "planted.cpp":1, please report a bug to PyTorch.')
    return x.clone()


def _changes_and_refuses(x: Tensor, size: int) -> Tensor:
    if size > 3:
        x.add_(1)
        raise ValueError(f"changes_and_refuses: size is {size}, want 3")
    return x.clone()


def _changes_its_argument(x: Tensor, size: int) -> Tensor:
    return x.add_(1) if size > 3 else x.clone()


def _changes_without_a_trace(x: Tensor, size: int) -> Tensor:
    x.data.view(-1)[:1] += 1  # does not increment the version
    return x.clone()


_CALLS = itertools.count()


def _is_never_the_same(x: Tensor, size: int) -> Tensor:
    return x * (1 + next(_CALLS) % 2 * 1e-5)


OPS: dict[str, Callable[[Tensor, int], Tensor]] = {
    "crash": _crashes,
    "hang": _hangs,
    "uninitialised": _leaves_garbage,
    "wrong result": _is_wrong,
    "wrong exception": _raises_what_is_not_ours,
    "unclear message": _names_nothing,
    "unclear message of pytorch": _asserts,
    "changed after a refusal": _changes_and_refuses,
    "changed argument": _changes_its_argument,
    "changed argument, not counted": _changes_without_a_trace,
    "not reproducible": _is_never_the_same,
}
for _function in OPS.values():
    LIBRARY.define(f"{_function.__name__[1:]}(Tensor x, int size) -> Tensor")
    LIBRARY.impl(_function.__name__[1:], _function, "CompositeExplicitAutograd")
OP_NAMES = [function.__name__[1:] for function in OPS.values()]


def _check_same(before: Mapping[str, Any], result: Any, after: Mapping[str, Any]) -> None:
    if result.shape == before["x"].shape and not torch.allclose(result, before["x"], rtol=1e-3, equal_nan=True):
        raise WrongResult(f"the result is {result.flatten()[:3].tolist()}, want x")


# --- readers ----------------------------------------------------------------------------------------------------------


def refuses_without_a_name(path: Path) -> bytes:
    raise ValueError("that is no table")


def takes_seconds(path: Path) -> None:
    import time

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


def _check_found(files: Path, result: Any, space: dict[str, Any]) -> None:
    if not result:
        raise WrongResult("the content of the file is missing")


READERS: dict[str, Callable[[Path], Any]] = {
    "unclear message": refuses_without_a_name,
    "slow": takes_seconds,
    "memory": takes_memory,
    "changed after a refusal": leaves_a_file,
    "hang": waits_for_ever,
    "wrong result": finds_nothing,
}


exec(f"{area_files._SETUP}\nfrom support import refusals", {})  # imports take longer than the limit of these cases
COSTLY = ("crashes", "hangs", "waits_for_ever")  # last in NAMES, because minimising leads to the first name
_EVERY = [*OP_NAMES, *(reader.__name__ for reader in READERS.values())]
NAMES = sorted(_EVERY, key=lambda name: name in COSTLY)


def make(choices: Choices) -> Case:
    name = choices.pick(NAMES)
    if name in OP_NAMES:
        values = {
            "x": tensor(choices, (choices.pick((2, 5, 9)), 3), "float32", ()),
            "size": literal(choices.integer(200)),
        }
        call = Call(f"torch.ops.lora_ext_planted.{name}", values, _check_same)
        return Case(call.function, f"import fuzz.area_planted\n{call.source()}", lambda: run_call(call, repeat=True))
    line = f'__import__("fuzz.area_planted").area_planted.{name}(files / "adapter" / "adapter_config.json")'
    check = _check_found if name == "finds_nothing" else None
    area_files._SECONDS = 0.5
    area_files._KINDS["planted"] = (Kind("adapter", ("adapter/adapter_config.json",), (Reader(name, line, check),)),)
    return area_files.make(choices, "planted")
