"""A call of a function: its run, and the judgement of what it returned, raised and changed."""

from __future__ import annotations

import functools
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

import lora_ext

from .cases import CannotTell, Finding, Outcome, WrongResult, finding, judge_exception
from .compare import lacks_memory, plain, tensors_in
from .tensors import Change
from .worker import POISON


@dataclass
class Call:
    """One call of a function.

    Attributes:
        function: the function's dotted name.
        arguments: a valid call, by name.
        differentiated: returns the outputs that have gradients, from the result and the arguments.
        steps: changes that make views, contents, histories or something invalid of the arguments.
        oracle: checks the result: ``oracle(before, result, after)`` gets the arguments before the call, the result,
            and the arguments after it. Raises :class:`WrongResult` or :class:`CannotTell`.
        changes: the arguments that the function may change.
        repeat: whether it is called again, for the same bits.
    """

    function: str
    arguments: dict[str, Any]
    oracle: Callable[[Mapping[str, Any], Any, Mapping[str, Any]], None] | None = None
    changes: tuple[str, ...] = ()
    differentiated: Callable[[Any, Mapping[str, Any]], list[Tensor]] | None = None
    steps: list[Change] = field(default_factory=list)
    repeat: bool = False

    def text(self) -> str:
        """Describes the call for a report."""
        arguments = [f"    {name}: {_described(value)}" for name, value in self.arguments.items()]
        return "\n".join([f"{self.function} of", *arguments, *(f"    then {step}" for step in self.steps)])

    def names(self) -> list[str]:
        """Returns names; a message about the call must contain one of them."""
        short = self.function.rpartition(".")[2]
        names = [name for name in self.arguments if len(name) > 1 or name in "xy"]
        return [short, short.rstrip("_"), "lora_ext", *names]

    def made(self) -> dict[str, Any] | None:
        """Makes the arguments; None: PyTorch cannot."""
        arguments = pytree.tree_map_only(Tensor, torch.clone, self.arguments)
        try:
            for step in self.steps:
                if any(map(lacks_memory, tensors_in(arguments.get(step.name)))):
                    return None  # PyTorch reads it anyway
                step.apply(arguments)
        except Exception:
            return None
        may_be = self.function.startswith("torch.ops.") or all(map(_is_for_pytorch, tensors_in([*arguments.values()])))
        return arguments if may_be else None

    def run(self) -> Outcome:
        """Runs the call and judges it."""
        function, arguments = self.function, self.made()
        if arguments is None:
            return Outcome("void")
        watched = Watched(arguments)
        try:
            before = {name: plain(value) for name, value in arguments.items()}
        except Exception:
            before = None
        try:
            result = _resolved(function)(**arguments)
        except Exception as error:
            changed = watched.findings("changed after a refusal", function, (), f" after {error}")
            return Outcome("refused", judge_exception(function, self.names(), error) + changed)
        found = watched.findings("changed argument", function, self.changes)
        devices = {tensor.device.type for tensor in tensors_in([*arguments.values()])}
        if len(devices) > 1:
            found.append(finding("mixed devices accepted", function, f"tensors on {sorted(devices)} were accepted"))
        try:
            self._backward(result, arguments)
        except Exception as error:
            return Outcome("refused", found + judge_exception(function, [*self.names(), "grad", "backward"], error))
        outputs = self._outputs(result, arguments)
        unwritten = sum(map(_poisoned, outputs))
        if unwritten and not sum(map(_poisoned, tensors_in(list((before or {}).values())))):
            found.append(finding("uninitialised", function, f"{unwritten} elements of the results were never written"))
        is_nested = any(tensor.is_nested for tensor in outputs)  # tests/ops/test_transforms.py compares those
        if self.oracle is None or before is None or len(devices) > 1 or is_nested:
            return Outcome("accepted", found)
        try:
            with torch.enable_grad():
                self.oracle(before, result, arguments)
        except CannotTell:
            return Outcome("accepted", found)
        except WrongResult as wrong:
            found.append(finding("wrong result", function, str(wrong)))
        except Exception as error:
            detail = f"accepted, but the reference fails: {type(error).__name__}: {error}"
            return Outcome("accepted", [*found, finding("accepted", function, detail)])
        if self.repeat and not found:
            again = self.made()
            result = _resolved(function)(**again)
            self._backward(result, again)
            if not all(map(_same_values, outputs, self._outputs(result, again))):
                found.append(finding("not reproducible", function, "the same call gave other results the second time"))
        return Outcome("compared", found)

    def _backward(self, result: Any, arguments: Mapping[str, Any]) -> None:
        """Computes gradients of all outputs that have any, with a fixed pattern."""
        outputs = self.differentiated(result, arguments) if self.differentiated else []
        outputs = [output for output in outputs if output.requires_grad and not output.is_nested]
        patterns = [torch.linspace(-1, 1, t.numel()).to(t.dtype).view(t.shape) for t in outputs]
        if outputs:
            torch.autograd.backward(outputs, patterns)

    def _outputs(self, result: Any, arguments: Mapping[str, Any]) -> list[Tensor]:
        """Returns the result, the arguments that the call may change, and the gradients that it left."""
        outputs = tensors_in([result, *(arguments[name] for name in self.changes if name in arguments)])
        return outputs + [t.grad for t in tensors_in([*arguments.values()]) if t.is_leaf and t.grad is not None]


def _resolved(function: str) -> Callable[..., Any]:
    first, *names = function.split(".")
    return functools.reduce(getattr, names, {"torch": torch, "lora_ext": lora_ext}[first])


def _described(value: Any) -> str:
    if isinstance(value, Tensor):
        return f"{str(value.dtype).removeprefix('torch.')} {list(value.shape)}"
    return f"[{', '.join(map(_described, value))}]" if isinstance(value, list) else repr(value)


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


def _same_values(first: Tensor, second: Tensor) -> bool:
    first, second = (tensor.detach().as_subclass(Tensor) for tensor in (first, second))
    if first.shape != second.shape or first.is_meta or not first.is_floating_point():
        return first.shape == second.shape
    return torch.equal(first.nan_to_num(), second.nan_to_num())
