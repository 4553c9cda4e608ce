"""Runs a call, and judges what it returned, raised and changed. What must not happen is a finding."""

from __future__ import annotations

import re
import traceback
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from .calls import Arguments, Call, make
from .compare import CannotTell, WrongResult, plain, tensors_in
from .worker import POISON, poisoned

_OURS = (ValueError, TypeError, KeyError, RuntimeError, MemoryError)
_NEVER = re.compile(
    r"INTERNAL ASSERT|API call failed|[Rr]eport a bug|report this|std::|bad_alloc|Traceback|NoneType' object has no"
)
# Messages of PyTorch and Python that need no name: memory, inference tensors, devices, odd paths.
_CLEAR = re.compile(
    r"can't allocate memory: you tried to allocate|Storage size calculation overflowed|Overflow when unpa|"
    r"its data is not allocated yet|Inference tensors cannot be saved for backward|"
    r"are out of bounds for storage of size|"
    r"cannot be represented as a SymInt|Device (string|index) must|error unpacking string as utf-8|embedded null byte"
)


@dataclass(frozen=True)
class Finding:
    """Something that must not happen.

    Attributes:
        kind: crash, hang, wrong result, uninitialised, wrong exception, unclear message, changed argument ...
        function: the called function.
        signature: equal for findings with the same cause.
        detail: the message, with values.
    """

    kind: str
    function: str
    signature: str
    detail: str


def finding(kind: str, function: str, detail: str, place: str = "") -> Finding:
    words = re.sub(
        r"0x[0-9a-f]+|-?\d+(\.\d+)?(e[-+]?\d+)?|\bnan\b|\binf\b", "#", detail.splitlines()[0][:160] if detail else ""
    )
    words = re.sub(r"#([,\s]+#)+", "#", words)
    return Finding(kind, function, f"{kind}: {function}: {place or words}", detail[:2000])


@dataclass(frozen=True)
class Outcome:
    """The outcome of a case: refused, compared, accepted (not compared) or void (its arguments cannot be made)."""

    kind: str
    findings: Sequence[Finding] = ()


def run(call: Call) -> Outcome:
    """Runs a call and judges it."""
    if call.is_void:
        return Outcome("void")
    function, arguments = call.function, call.arguments
    watched = Watched(arguments)
    try:
        before = {name: plain(value) for name, value in arguments.items()}
    except (CannotTell, RuntimeError, TypeError):  # PyTorch cannot copy an argument: the call runs, uncompared
        before = None
    try:
        result = call.run(**arguments)
    except Exception as error:
        changed = watched.findings("changed after a refusal", function, "", f" after {error}")
        return Outcome("refused", judge_exception(function, call.words(), error) + changed)
    found = watched.findings("changed argument", function, call.writes)
    devices = {tensor.device.type for tensor in tensors_in([*arguments.values()])}
    if len(devices) > 1:
        found.append(finding("mixed devices accepted", function, f"tensors on {sorted(devices)} were accepted"))
    try:
        _backward(call, result)
    except Exception as error:
        return Outcome("refused", found + judge_exception(function, [*call.words(), "grad", "backward"], error))
    outputs = _outputs(call, result)
    if unwritten := sum(map(_poisoned, outputs)):
        found.append(finding("uninitialised", function, f"{unwritten} elements of the results were never written"))
    is_nested = any(tensor.is_nested for tensor in outputs)  # tests/ops/test_transforms.py compares those
    if call.oracle is None or before is None or len(devices) > 1 or is_nested:
        return Outcome("accepted", found)
    try:
        with torch.enable_grad():
            call.oracle(before, result, arguments)
    except CannotTell:
        return Outcome("accepted", found)
    except WrongResult as wrong:
        found.append(finding("wrong result", function, str(wrong)))
    except Exception as error:
        detail = f"accepted, but the reference fails: {type(error).__name__}: {error}"
        return Outcome("accepted", [*found, finding("accepted", function, detail)])
    return Outcome("compared", found)


def judge_exception(function: str, names: Sequence[str], error: Exception) -> list[Finding]:
    """Returns a finding unless the exception has a documented type and a message with one of ``names``."""
    text = str(error)
    if isinstance(error, torch.OutOfMemoryError) or type(error) is MemoryError or _CLEAR.search(text):
        return []
    frames = traceback.extract_tb(error.__traceback__)
    last = next((f for f in reversed(frames) if "/lora_ext/" in f.filename), frames[-1])
    place = f"{type(error).__name__} in {last.filename.rpartition('/lora_ext/')[2]}:{last.name}"
    described = f"{type(error).__name__}: {text}"
    if not isinstance(error, _OURS) or isinstance(error, (UnicodeError, RecursionError)):
        return [finding("wrong exception", function, described, place)]
    if _NEVER.search(text):
        return [finding("unclear message", function, described)]
    if not any(re.search(rf"\b{re.escape(name)}", text) for name in names):
        return [finding("unclear message", function, described, place)]
    return []


def confirmed(outcome: Outcome, name: str, numbers: list[int]) -> Outcome:
    """Drops the finding that memory was not written if the same elements come out of memory of another value."""
    if all(finding.kind != "uninitialised" for finding in outcome.findings):
        return outcome
    with poisoned(POISON ^ 2):
        again = run(make(name, numbers)).findings
    return Outcome(outcome.kind, [f for f in outcome.findings if f.kind != "uninitialised" or f not in again])


def run_twice(name: str, numbers: list[int]) -> Outcome:
    """Judges a call, and whether the same call has the same bits the second time."""
    outputs = []
    for _ in range(2):
        call = make(name, numbers)
        result = call.run(**call.arguments)
        _backward(call, result)
        outputs.append(_outputs(call, result))
    if all(map(_same_values, *outputs)):
        return Outcome("compared")
    text = "the same call gave other results the second time"
    return Outcome("compared", [finding("not reproducible", call.function, text)])


def _backward(call: Call, result: Any) -> None:
    """Computes gradients of all outputs that have any, with a fixed pattern."""
    outputs = call.differentiated(result) if call.differentiated else []
    outputs = [output for output in outputs if output.requires_grad and not output.is_nested]
    patterns = [torch.linspace(-1, 1, t.numel()).to(t.dtype).view(t.shape) for t in outputs]
    if outputs:
        torch.autograd.backward(outputs, patterns)


def _outputs(call: Call, result: Any) -> list[Tensor]:
    """Returns the result, the argument that the call may change, and the gradients that it left."""
    leaves = [t for t in tensors_in([*call.arguments.values()]) if t.is_leaf and t.grad is not None]
    return tensors_in([result, call.arguments.get(call.writes)]) + [leaf.grad for leaf in leaves]


class Watched:
    """Tensors and lists as they were: the bits of their storages, sizes, versions, flags, entries."""

    def __init__(self, values: Arguments):
        self._states = [(name, t, _state(t)) for name, value in values.items() for t in tensors_in(value)]
        self._lists = [(name, value, list(value)) for name, value in values.items() if isinstance(value, list)]

    def changes(self, may_change: str) -> list[str]:
        """Describes changed arguments; for the one that may change, changed memory around it."""
        said = [
            f"{name} has other entries"
            for name, value, entries in self._lists
            if [*map(id, value)] != [*map(id, entries)]
        ]
        # Two arguments can share a storage: then writes to the writable one are allowed there.
        writable = [tensor for name, tensor, state in self._states if name == may_change and state]
        for name, tensor, before in self._states:
            if before is None:
                continue
            now, flags = _state(tensor), before[2:]
            sharing = [t for t in writable if t.untyped_storage().data_ptr() == tensor.untyped_storage().data_ptr()]
            if now is None or (now[2:] != flags and name != may_change):
                said.append(f"{name} has {now and now[2:]}, had {flags}")
                continue
            if now[1] != before[1] and not sharing:
                said.append(f"{name}'s version is {now[1]}, was {before[1]}")
            if now[0].shape == before[0].shape and (different := now[0] != before[0]).any():
                if name == may_change and now[1] == before[1] is not None:
                    said.append(f"{name} was changed, its version was not")
                for other in sharing:
                    different &= ~_elements_of(other)
                if different.any():
                    said.append(f"{name} has {int(different.sum())} other bytes of storage")
        return said

    def findings(self, kind: str, function: str, may_change: str, after: str = "") -> list[Finding]:
        changes = self.changes(may_change)
        return [finding(kind, function, change + after, re.sub(r"\d+", "#", change)) for change in changes]


def _state(tensor: Tensor) -> tuple | None:
    """Returns the bytes of a tensor's storage, its version, and what else must stay; None if it is not strided."""
    try:
        storage = tensor.untyped_storage()
        bits = torch.empty(0, dtype=torch.uint8)
        if not tensor.is_meta:
            bits = bits.set_(storage, 0, (storage.nbytes(),)).clone()
        version = None if tensor.is_inference() else tensor._version
        sizes = storage.nbytes(), tuple(tensor.shape), tensor.stride(), tensor.storage_offset()
        return bits, version, *sizes, tensor.dtype, tensor.requires_grad, tensor.is_neg()
    except (RuntimeError, AttributeError):
        return None


def _elements_of(tensor: Tensor) -> Tensor:
    """Marks the bytes of a tensor's storage that are its elements."""
    marks = torch.zeros(tensor.untyped_storage().nbytes(), dtype=torch.bool)
    size = tensor.element_size()
    strides = [stride * size for stride in tensor.stride()]
    marks.as_strided((*tensor.shape, size), (*strides, 1), tensor.storage_offset() * size).fill_(True)
    return marks


def _poisoned(tensor: Tensor) -> int:
    """Number of elements that were never written."""
    try:
        if tensor.is_meta or not tensor.is_floating_point() or tensor.numel() == 0 or tensor.numel() > 1 << 22:
            return 0
        bits = tensor.detach().contiguous().view(torch.uint8).view(tensor.numel(), tensor.element_size())
    except RuntimeError:  # not a strided tensor
        return 0
    return int((bits == POISON).all(dim=1).sum())


def _same_values(first: Tensor, second: Tensor) -> bool:
    first, second = (tensor.detach().as_subclass(Tensor) for tensor in (first, second))
    if first.shape != second.shape or first.is_meta or not first.is_floating_point():
        return first.shape == second.shape
    return torch.equal(first.nan_to_num(), second.nan_to_num())
