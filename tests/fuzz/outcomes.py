"""Runs one call and judges its outcome."""

from __future__ import annotations

import inspect
import re
import traceback
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor

from .calls import Call, CannotTell
from .compare import WrongResult, lacks_memory, plain, tensors_in

# Value of every byte of new memory: MALLOC_PERTURB_ (processes.py) or malloc_fill_byte (a sanitizer) sets it.
POISON = 0xFE
_OURS = (ValueError, TypeError, KeyError, RuntimeError, MemoryError)
_NEVER = re.compile(
    r"INTERNAL ASSERT|API call failed|[Rr]eport a bug|report this|std::|bad_alloc|Traceback|NoneType' object has no"
)

# Messages of PyTorch and Python that need no name: sizes beyond all memory, devices and paths that are not text.
_CLEAR = re.compile(
    r"can't allocate memory: you tried to allocate|Storage size calculation overflowed|Overflow when unpa|"
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

    def as_json(self) -> dict[str, str]:
        return asdict(self)


def finding(kind: str, function: str, detail: str, place: str = "") -> Finding:
    words = re.sub(
        r"0x[0-9a-f]+|-?\d+(\.\d+)?(e[-+]?\d+)?|\bnan\b|\binf\b", "#", detail.splitlines()[0][:160] if detail else ""
    )
    words = re.sub(r"#([,\s]+#)+", "#", words)
    return Finding(kind, function, f"{kind}: {function}: {place or words}", detail[:2000])


@dataclass(frozen=True)
class Outcome:
    """The outcome of a call: refused, compared, accepted (not compared) or void (its arguments cannot be made)."""

    kind: str
    findings: tuple[Finding, ...] = ()


class Watched:
    """Records tensors' states: the bits of their storages, sizes, versions, flags."""

    def __init__(self, values: Mapping[str, Any]):
        self.states = [
            (name, tensor, self._state(tensor)) for name, value in values.items() for tensor in tensors_in(value)
        ]
        self.lists = {name: (value, list(value)) for name, value in values.items() if isinstance(value, list)}

    @staticmethod
    def _state(tensor: Tensor) -> tuple | None:
        try:
            storage = tensor.untyped_storage()
            bits = torch.tensor([], dtype=torch.uint8) if tensor.is_meta else _bytes_of(tensor)
            version = None if tensor.is_inference() else tensor._version
            flags = (tuple(tensor.shape), tensor.stride(), tensor.storage_offset(), tensor.dtype, tensor.requires_grad)
            return storage.nbytes(), bits, version, flags, tensor.is_neg()
        except (RuntimeError, AttributeError):
            return None  # not a strided tensor

    def changes(self, may_change: Sequence[str]) -> list[str]:
        """Describes changed arguments; for those that may change, changed memory around them."""
        said = []
        # Two arguments can share a storage: then writes to the writable one are allowed there.
        writable = [tensor for name, tensor, state in self.states if name in may_change and state is not None]
        for name, tensor, state in self.states:
            if state is None:
                continue
            nbytes, bits, version, flags, _ = state
            now = self._state(tensor)
            if now is None:
                said.append(f"{name} is another kind of tensor")
                continue
            if now[0] != nbytes or (now[3] != flags and name not in may_change):
                said.append(f"{name} has {now[3]}, had {flags}")
            elif name not in may_change and now[2] != version and not any(_shares(tensor, w) for w in writable):
                said.append(f"{name}'s version is {now[2]}, was {version}")
            different = now[1] != bits if now[1].shape == bits.shape else None
            if different is not None and different.any():
                for other in writable:
                    if _shares(tensor, other):
                        different &= ~_elements_of(other)
                if different.any():
                    said.append(f"{name} has {int(different.sum())} other bytes of storage")
        said += [
            f"{name} has other entries" for name, (value, entries) in self.lists.items() if not _same(value, entries)
        ]
        return said

    def versions_kept(self, names: Sequence[str]) -> list[str]:
        """Returns the arguments whose bits changed without a change of their version counter."""
        kept = []
        for name, tensor, state in self.states:
            if name in names and state is not None and state[2] is not None and tensor._version == state[2]:
                now = self._state(tensor)
                kept += [name] if now is not None and not torch.equal(now[1], state[1]) else []
        return kept


def _same(first: list, second: list) -> bool:
    return len(first) == len(second) and all(a is b for a, b in zip(first, second, strict=True))


def _bytes_of(tensor: Tensor) -> Tensor:
    storage = tensor.untyped_storage()
    return torch.empty(0, dtype=torch.uint8).set_(storage, 0, (storage.nbytes(),)).clone()


def _shares(first: Tensor, second: Tensor) -> bool:
    return first.untyped_storage().data_ptr() == second.untyped_storage().data_ptr()


def _elements_of(tensor: Tensor) -> Tensor:
    """Marks the bytes of a tensor's storage that are its elements."""
    size = tensor.element_size()
    places = torch.zeros(tensor.untyped_storage().nbytes() // size, dtype=torch.bool)
    places.as_strided(tensor.shape, tensor.stride(), tensor.storage_offset()).fill_(True)
    bytes_ = places.repeat_interleave(size)
    rest = tensor.untyped_storage().nbytes() - bytes_.numel()
    return torch.cat([bytes_, torch.zeros(rest, dtype=torch.bool)])


def poisoned(tensor: Tensor) -> int:
    """Number of elements that were never written."""
    try:
        if tensor.is_meta or not tensor.is_floating_point() or tensor.numel() == 0 or tensor.numel() > 1 << 22:
            return 0
        bits = tensor.detach().contiguous().view(torch.uint8).view(tensor.numel(), tensor.element_size())
    except RuntimeError:  # not a strided tensor
        return 0
    return int((bits == POISON).all(dim=1).sum())


def judge_exception(
    function: str, names: Sequence[str], error: BaseException, with_files: bool = False
) -> Finding | None:
    """Returns a finding unless the exception has a documented type and a useful message."""
    text = str(error)
    if isinstance(error, torch.OutOfMemoryError) or type(error) is MemoryError or _CLEAR.search(text):
        return None
    frames = traceback.extract_tb(error.__traceback__)
    last = next((f for f in reversed(frames) if "/lora_ext/" in f.filename), frames[-1] if frames else None)
    place = "" if last is None else f"{last.filename.rpartition('/lora_ext/')[2]}:{last.name}"
    described = f"{type(error).__name__}: {text}"
    kinds = (*_OURS, OSError) if with_files else _OURS
    if not isinstance(error, kinds) or isinstance(error, (UnicodeError, RecursionError)):
        return finding("wrong exception", function, described, f"{type(error).__name__} in {place}")
    if _NEVER.search(text):
        return finding("unclear message", function, described)
    if not any(re.search(rf"\b{re.escape(name)}", text) for name in names):
        return finding("unclear message", function, described, f"{type(error).__name__} in {place}")
    return None


def words_of(call: Call) -> list[str]:
    """Returns names; a message about the call must contain one of them."""
    short = call.function.rpartition(".")[2]
    later = ["lora_unmerge_"] if call.after else []
    names = [name for name in call.arguments if len(name) > 1 or name in "xy"]
    return [short, short.rstrip("_"), "lora_ext", *later, *names, *call.words]


def run_call(call: Call, repeat: bool = False) -> Outcome:
    """Runs a call and judges it."""
    space: dict[str, Any] = {}
    function = call.function
    try:
        exec(call.imports(), space)
        for name, value in call.arguments.items():
            exec("\n".join(value.lines(name)), space)
            if not function.startswith("torch.ops.") and not all(map(_is_for_pytorch, tensors_in(space[name]))):
                return Outcome("void")  # later arguments can depend on it
    except Exception:
        return Outcome("void")
    arguments = {name: space[name] for name in call.arguments}
    watched = Watched(arguments)
    try:
        before = {name: plain(value) for name, value in arguments.items()}
    except Exception:
        before = None
    found: list[Finding] = []
    try:
        exec(call.body(), space)
    except Exception as error:
        trouble = judge_exception(function, words_of(call), error)
        found += [trouble] if trouble else []
        found += [
            finding("changed after a refusal", function, f"{change} after {error}", re.sub(r"\d+", "#", change))
            for change in watched.changes(())
        ]
        return Outcome("refused", tuple(found))
    result = space["result"]
    found += [
        finding("changed argument", function, change, re.sub(r"\d+", "#", change))
        for change in watched.changes(call.changes)
    ]
    kept = watched.versions_kept(call.changes)
    found += [finding("version not counted", function, f"{name} was changed, its version was not") for name in kept]
    outputs = tensors_in([result, *(arguments[name] for name in call.changes if name in arguments)])
    devices = {tensor.device.type for value in arguments.values() for tensor in tensors_in(value)}
    if len(devices) > 1:
        found.append(finding("mixed devices accepted", function, f"tensors on {sorted(devices)} were accepted"))
    try:
        exec(call.backward(), space)
    except Exception as error:
        trouble = judge_exception(function, [*words_of(call), "grad", "backward"], error)
        return Outcome("refused", (*found, *([trouble] if trouble else [])))
    outputs += [tensor.grad for value in arguments.values() for tensor in tensors_in(value) if _has_gradient(tensor)]
    unwritten = sum(map(poisoned, outputs))
    if unwritten and not sum(poisoned(tensor) for tensor in tensors_in(list((before or {}).values()))):
        found.append(finding("uninitialised", function, f"{unwritten} elements of the results were never written"))
    kind = "accepted"
    is_nested = any(tensor.is_nested for tensor in outputs)  # tests/ops/test_transforms.py compares those
    if call.oracle is not None and before is not None and len(devices) <= 1 and not is_nested:
        try:
            with torch.enable_grad():
                call.oracle(before, result, {**space, **arguments})
            kind = "compared"
        except CannotTell:
            pass
        except WrongResult as wrong:
            kind = "compared"
            found.append(finding("wrong result", function, str(wrong)))
        except Exception as error:
            detail = f"accepted, but the reference fails: {type(error).__name__}: {error}"
            found.append(finding("accepted", function, detail))
    if repeat and kind == "compared" and not found:
        found += _again(call, outputs)
    return Outcome(kind, tuple(found))


def _is_for_pytorch(tensor: Tensor) -> bool:
    """Whether PyTorch's ops can take it: they read missing memory, and huge tensors take for ever."""
    return not lacks_memory(tensor) and (tensor.is_nested or tensor.numel() < 1 << 24)


def _has_gradient(tensor: Tensor) -> bool:
    return tensor.is_leaf and tensor.grad is not None


def _undressed(tensor: Tensor) -> Tensor:
    return tensor.detach().as_subclass(Tensor)


def _again(call: Call, outputs: Sequence[Tensor]) -> list[Finding]:
    """Repeats the call, which must give the same bits."""
    space: dict[str, Any] = {}
    exec(call.source(), space)
    arguments = [space[name] for name in call.arguments]
    again = tensors_in([space["result"], *(space[name] for name in call.changes if name in call.arguments)])
    again += [tensor.grad for value in arguments for tensor in tensors_in(value) if _has_gradient(tensor)]
    for first, second in zip(map(_undressed, outputs), map(_undressed, again), strict=True):
        same = first.shape == second.shape and (
            first.is_meta or not first.is_floating_point() or torch.equal(first.nan_to_num(), second.nan_to_num())
        )
        if not same:
            return [finding("not reproducible", call.function, "the same call gave other results the second time")]
    return []


def parameter_names(function: Any) -> list[str]:
    try:
        return list(inspect.signature(function).parameters)
    except (TypeError, ValueError):
        return []
