"""A call of a function: its source, its run, and the judgement of what it returned, raised and changed."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from .cases import CannotTell, Finding, Outcome, WrongResult, finding, judge_exception
from .compare import lacks_memory, plain, tensors_in
from .values import Value
from .worker import POISON

# Computes gradients of all outputs that have any, with a fixed pattern.
_GRADIENTS = """
outputs = [t for t in differentiated if t.requires_grad and not t.is_nested]
if outputs:
    patterns = [torch.linspace(-1, 1, t.numel()).to(t.dtype).view(t.shape) for t in outputs]
    torch.autograd.backward(outputs, patterns)
"""


@dataclass
class Call:
    """One call of a function.

    Attributes:
        function: the function's dotted name.
        arguments: sources of the arguments, all passed by name. Names that start with "_" are not passed; others use
            them.
        oracle: checks the result: ``oracle(before, result, after)`` gets the arguments before the call, the result,
            and the arguments after it. Raises :class:`WrongResult` or :class:`CannotTell`.
        changes: the arguments that the function may change.
        differentiated: source of the outputs to differentiate; "": none.
        mutated: the arguments that may be wrong.
        repeat: whether it is called again, for the same bits.
    """

    function: str
    arguments: dict[str, Value]
    oracle: Callable[[Mapping[str, Any], Any, Mapping[str, Any]], None] | None = None
    changes: tuple[str, ...] = ()
    differentiated: str = ""
    mutated: list[str] = field(default_factory=list)
    repeat: bool = False

    @property
    def imports(self) -> str:
        planted = "import fuzz.planted\n" if "planted" in self.function else ""
        return f"import numpy\nimport torch\nimport lora_ext.functional\n{planted}"

    @property
    def body(self) -> str:
        passed = ", ".join(f"{name}={name}" for name in self.arguments if not name.startswith("_"))
        return f"result = {self.function}({passed})\n"

    @property
    def backward(self) -> str:
        return f"differentiated = {self.differentiated}\n{_GRADIENTS}" if self.differentiated else ""

    def source(self) -> str:
        lines = [line for name, value in self.arguments.items() for line in value.lines(name)]
        return self.imports + "\n".join(lines) + f"\n{self.body}{self.backward}"

    def names(self) -> list[str]:
        """Returns names; a message about the call must contain one of them."""
        short = self.function.rpartition(".")[2]
        names = [name for name in self.arguments if len(name) > 1 or name in "xy"]
        return [short, short.rstrip("_"), "lora_ext", *names]

    def run(self) -> Outcome:
        """Runs the call and judges it."""
        space: dict[str, Any] = {}
        function = self.function
        try:
            exec(self.imports, space)
            for name, value in self.arguments.items():
                exec("\n".join(value.lines(name)), space)
                if not function.startswith("torch.ops.") and not all(map(_is_for_pytorch, tensors_in(space[name]))):
                    return Outcome("void")  # later arguments can depend on it
        except Exception:
            return Outcome("void")
        arguments = {name: space[name] for name in self.arguments}
        watched = Watched(arguments)
        try:
            before = {name: plain(value) for name, value in arguments.items()}
        except Exception:
            before = None
        try:
            exec(self.body, space)
        except Exception as error:
            changed = watched.findings("changed after a refusal", function, (), f" after {error}")
            return Outcome("refused", judge_exception(function, self.names(), error) + changed)
        found = watched.findings("changed argument", function, self.changes)
        devices = {tensor.device.type for tensor in tensors_in(list(arguments.values()))}
        if len(devices) > 1:
            found.append(finding("mixed devices accepted", function, f"tensors on {sorted(devices)} were accepted"))
        try:
            exec(self.backward, space)
        except Exception as error:
            return Outcome("refused", found + judge_exception(function, [*self.names(), "grad", "backward"], error))
        outputs = _outputs(self, space)
        unwritten = sum(map(_poisoned, outputs))
        if unwritten and not sum(map(_poisoned, tensors_in(list((before or {}).values())))):
            found.append(finding("uninitialised", function, f"{unwritten} elements of the results were never written"))
        is_nested = any(tensor.is_nested for tensor in outputs)  # tests/ops/test_transforms.py compares those
        if self.oracle is None or before is None or len(devices) > 1 or is_nested:
            return Outcome("accepted", found)
        try:
            with torch.enable_grad():
                self.oracle(before, space["result"], {**space, **arguments})
        except CannotTell:
            return Outcome("accepted", found)
        except WrongResult as wrong:
            found.append(finding("wrong result", function, str(wrong)))
        except Exception as error:
            detail = f"accepted, but the reference fails: {type(error).__name__}: {error}"
            return Outcome("accepted", [*found, finding("accepted", function, detail)])
        if self.repeat and not found:
            space = {}
            exec(self.source(), space)
            if not all(map(_same_values, outputs, _outputs(self, space))):
                found.append(finding("not reproducible", function, "the same call gave other results the second time"))
        return Outcome("compared", found)


class Watched:
    """Tensors and lists as they were: the bits of their storages, sizes, versions, flags, entries."""

    def __init__(self, values: Mapping[str, Any]):
        self._states = [(name, t, _state(t)) for name, value in values.items() for t in tensors_in(value)]
        self._lists = [(name, value, list(value)) for name, value in values.items() if isinstance(value, list)]

    def changes(self, may_change: Sequence[str]) -> list[str]:
        """Describes changed arguments; for those that may change, changed memory around them."""
        said = [
            f"{name} has other entries"
            for name, value, entries in self._lists
            if [*map(id, value)] != [*map(id, entries)]
        ]
        # Two arguments can share a storage: then writes to the writable one are allowed there.
        writable = [tensor for name, tensor, state in self._states if name in may_change and state]
        for name, tensor, before in self._states:
            if before is None:
                continue
            now, flags = _state(tensor), before[2:]
            sharing = [t for t in writable if t.untyped_storage().data_ptr() == tensor.untyped_storage().data_ptr()]
            if now is None or (now[2:] != flags and name not in may_change):
                said.append(f"{name} has {now and now[2:]}, had {flags}")
                continue
            if now[1] != before[1] and not sharing:
                said.append(f"{name}'s version is {now[1]}, was {before[1]}")
            if now[0].shape == before[0].shape and (different := now[0] != before[0]).any():
                if name in may_change and now[1] == before[1] is not None:
                    said.append(f"{name} was changed, its version was not")
                for other in sharing:
                    different &= ~_elements_of(other)
                if different.any():
                    said.append(f"{name} has {int(different.sum())} other bytes of storage")
        return said

    def findings(self, kind: str, function: str, may_change: Sequence[str], after: str = "") -> list[Finding]:
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


def _is_for_pytorch(tensor: Tensor) -> bool:
    """Whether PyTorch's ops can take it: they read missing memory, and huge tensors take for ever."""
    return not lacks_memory(tensor) and (tensor.is_nested or tensor.numel() < 1 << 24)


def _outputs(call: Call, space: Mapping[str, Any]) -> list[Tensor]:
    """Returns the result, the arguments that the call may change, and the gradients that it left."""
    outputs = tensors_in([space["result"], *(space[name] for name in call.changes if name in call.arguments)])
    arguments = tensors_in([space[name] for name in call.arguments])
    return outputs + [tensor.grad for tensor in arguments if tensor.is_leaf and tensor.grad is not None]


def _same_values(first: Tensor, second: Tensor) -> bool:
    first, second = (tensor.detach().as_subclass(Tensor) for tensor in (first, second))
    if first.shape != second.shape or first.is_meta or not first.is_floating_point():
        return first.shape == second.shape
    return torch.equal(first.nan_to_num(), second.nan_to_num())
