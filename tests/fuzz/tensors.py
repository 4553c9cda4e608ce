"""What can stand for an argument: other layouts and contents, which an op must take, and what it may refuse.

Changes are drawn where a call is made, and applied in the process that runs it and may crash.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy
import torch
from torch import Tensor

from .choices import Choices

RANKS = (2, 1, 3, 4, 8, 11, 16, 17, 33, 70)
SCALINGS = (1.0, 0.5, 2.0, 0.0, 1e-30, 1e4)
# Views and copies with the same values. Tensors that are written to have one of the last two.
LAYOUTS: dict[str, Callable[[Tensor], Tensor]] = {
    "transposed": lambda t: t.mT.contiguous().mT,
    "outermost last": lambda t: t.transpose(0, -1).contiguous().transpose(0, -1),
    "gaps between rows": lambda t: torch.cat([t, t.new_full((*t.shape[:-1], 3), 77)], -1)[..., : t.shape[-1]],
    "every other column": lambda t: t.repeat_interleave(2, -1)[..., ::2],
    "unaligned": lambda t: torch.cat([t.new_full((1,), 77), t.flatten()])[1:].view(t.shape),
    "the middle of a storage": lambda t: torch.cat([t[:1], t, t[:1]])[1:-1],
}
IN_PLACE = ("unaligned", "the middle of a storage")
# Views with other values, whose elements share memory.
OVERLAPS: dict[str, Callable[[Tensor], Tensor]] = {
    "rows expanded": lambda t: t[:1].expand(t.shape),
    "columns expanded": lambda t: t[..., :1].expand(t.shape),
    "overlapping": lambda t: t.contiguous().as_strided(t.shape, (1,) * t.dim()),
}
# The same values, but not a plain tensor without history.
KINDS: dict[str, Callable[[Tensor], Any]] = {
    "parameter": torch.nn.Parameter,
    "leaf": lambda t: t.requires_grad_(),
    "not a leaf": lambda t: t.requires_grad_() * 1,
    "view of a leaf": lambda t: t.requires_grad_().view_as(t),
    "one of several views": lambda t: torch.unbind(t.requires_grad_().clone().unsqueeze(0))[0],
    "view made without gradients": lambda t: torch.no_grad()(lambda t: t.view_as(t))(t.requires_grad_()),
    "inference": lambda t: torch.inference_mode()(torch.clone)(t),
    "negative bit": torch._neg_view,
    "meta": lambda t: t.to("meta"),
    "sparse": lambda t: t.to_sparse(),
    "sparse rows": lambda t: t.to_sparse_csr(),
    "mkldnn": lambda t: t.to_mkldnn(),
    "nested": lambda t: torch.nested.nested_tensor([t]),
    "quantised": lambda t: torch.quantize_per_tensor(t.float(), 0.1, 0, torch.qint8),
    "conjugated": lambda t: torch.complex(t.float(), t.float()).conj(),
    "imaginary part of a conjugate": lambda t: torch.complex(t.float(), t.float()).conj().imag,
    "storage resized to nothing": lambda t: (lambda t: (t.untyped_storage().resize_(0), t)[1])(t.clone()),
    "subclass": lambda t: t.as_subclass(type("Sub", (Tensor,), {})),
}


def _with_one(tensor: Tensor, value: float) -> Tensor:
    tensor = tensor.clone()
    tensor.view(-1)[tensor.numel() // 2 : tensor.numel() // 2 + 1] = value
    return tensor


FILLS: dict[str, Callable[[Tensor], Tensor]] = {
    "zeros": torch.zeros_like,
    "one NaN": partial(_with_one, value=math.nan),
    "one Inf": partial(_with_one, value=math.inf),
    "all NaN": lambda t: torch.full_like(t, math.nan),
    "huge": lambda t: (t.double() * 1e30).to(t.dtype),
    "subnormal": lambda t: (t.double() * 1e-40).to(t.dtype),
    "large": lambda t: (t.double() * 1e4).to(t.dtype),
}
DTYPES = (  # noqa: SIM905
    "float32 float64 bfloat16 float16 int64 int32 int16 uint8 int8 bool complex64 complex128 complex32 float8_e4m3fn "
    "float8_e5m2 uint16 uint32 uint64"
).split()
_SIZES = (0, 1, 2, 7, 33, 300, 1 << 31, 1 << 40, (1 << 62) + 1)
# A tensor with more elements than this is one element in memory with a stride of 0.
_MOST_ELEMENTS = 1 << 18
# Expressions: words are easier to read than a list with a line each.
_NUMBERS = (  # noqa: SIM905
    "0.0 -0.0 -1.0 1.0 0.9999999999999999 0.99999 2.0**-17 2.0**-18 5e-324 1e-30 3e38 1e308 float('inf') float('-inf') "
    "float('nan') True 1 2**70 torch.tensor(0.5) torch.tensor([0.5,0.5]) numpy.float32(0.5) 1j"
).split()
_INTEGERS = "0 1 -1 2**31 2**62 2**63-1 -(2**63) 2**63 2**70 1.0 1.5 True".split()  # noqa: SIM905
_OTHERS = (  # noqa: SIM905
    "None 'lora' 1 0.5 True -1 () [] {} '' object() torch.float32 numpy.zeros((2,2)) numpy.int64(3) b'\\x00' "
    "'\\ud800' 'a'*5000 [None] [[]] ['a',1] {'a':None} {'a'} iter('ab') float('nan') 2**70 -0.0 1e400 [2**70] type "
    "torch.zeros(2) torch.nn.Linear(2,2)"
).split()
Arguments = dict[str, Any]


@dataclass
class Change:
    """A change of an argument, or of one entry of a list: ``make(value, arguments)`` returns the other value."""

    text: str
    name: str
    make: Callable[[Any, Mapping[str, Any]], Any]
    index: int | None = None

    def __str__(self) -> str:
        return f"{self.name}{'' if self.index is None else f'[{self.index}]'}: {self.text}"

    def apply(self, arguments: Arguments) -> None:
        if self.index is None:
            arguments[self.name] = self.make(arguments[self.name], arguments)
        else:
            entries = list(arguments[self.name])
            entries[self.index] = self.make(entries[self.index], arguments)
            arguments[self.name] = entries


class Removed(Change):
    """Leaves the argument out."""

    def apply(self, arguments: Arguments) -> None:
        del arguments[self.name]


def places(arguments: Mapping[str, Any]) -> list[tuple[str, int | None, Any]]:
    """Returns every argument, and every entry of a list."""
    lists = {name: list(enumerate(v)) if isinstance(v, list) else [(None, v)] for name, v in arguments.items()}
    return [(name, i, entry) for name, entries in lists.items() for i, entry in entries]


def oddities(choices: Choices, arguments: Mapping[str, Any], in_place: Mapping[str, Sequence[str]]) -> list[Change]:
    """Draws contents and layouts that an op must take; ``in_place``: layouts of the arguments that it writes to."""
    changes = []
    for name, i, tensor in places(arguments):
        if not isinstance(tensor, Tensor) or not tensor.is_floating_point() or name == "scalings":
            continue
        if choices.chance(15):
            changes.append(_named(choices, FILLS, name, i))
        if choices.chance(30) and tensor.dim() and tensor.shape[0]:
            layouts = in_place.get(name, [layout for layout in LAYOUTS if layout != "transposed" or tensor.dim() > 1])
            changes.append(_named(choices, {layout: LAYOUTS[layout] for layout in layouts}, name, i))
    return changes


def history(choices: Choices, arguments: Mapping[str, Any]) -> list[Change]:
    """Lets some of the arguments require gradients."""
    changes = []
    for name, i, tensor in places(arguments) if choices.chance(40) else ():
        is_float = isinstance(tensor, Tensor) and tensor.is_floating_point()
        if is_float and name not in ("y", "scalings") and choices.chance(60):
            changes.append(_named(choices, {kind: KINDS[kind] for kind in ("leaf", "not a leaf")}, name, i))
    return changes


def mutations(choices: Choices, arguments: Mapping[str, Any]) -> list[Change]:
    """Draws one to three changes, each of which can make the call invalid."""
    changes, left = [], dict(arguments)
    for _ in range(choices.randint(1, 3)):
        name = choices.choice(list(left))
        if choices.chance(3) and len(left) > 1:
            del left[name]
            changes.append(Removed("left out", name, lambda value, _: value))
        elif choices.chance(12):
            changes.append(_alias(choices, name, left))
        else:
            changes.append(_mutation(choices, name, left[name]))
    return changes


def _named(choices: Choices, table: Mapping[str, Callable], name: str, i: int | None) -> Change:
    what = choices.choice(list(table))
    return Change(what, name, lambda value, _: table[what](value), i)


def _expression(choices: Choices, words: list[str], name: str, i: int | None = None) -> Change:
    word = choices.choice(words)
    return Change(word, name, lambda *_: eval(word, {"torch": torch, "numpy": numpy}), i)


def _alias(choices: Choices, name: str, arguments: Mapping[str, Any]) -> Change:
    """Another argument, or a part of it."""
    other = choices.choice(list(arguments))
    value, target = arguments[name], arguments[other]
    index = part = None
    if isinstance(value, list) and isinstance(target, list) and value and target:
        index, part = choices.randrange(len(value)), choices.randrange(len(target))
    views: dict[str, Callable] = {"": lambda t: t, "[:1]": lambda t: t[:1], ".T": lambda t: t.T}
    views |= {} if part is not None else {"[..., :1]": lambda t: t[..., :1], "[0]": lambda t: t[0]}
    view = choices.choice(list(views))

    def make(_: Any, arguments: Mapping[str, Any]) -> Any:
        return views[view](arguments[other] if part is None else arguments[other][part])

    return Change(f"{other}{'' if part is None else f'[{part}]'}{view}", name, make, index)


def _mutation(choices: Choices, name: str, value: Any, i: int | None = None) -> Change:
    if isinstance(value, Tensor):
        return _of_tensor(choices, name, value, i)
    if isinstance(value, list):
        return _of_list(choices, name, value)
    is_number = isinstance(value, int | float) and not isinstance(value, bool)
    if choices.chance(25) or not is_number:
        return _expression(choices, _OTHERS, name, i)
    return _expression(choices, _INTEGERS if isinstance(value, int) else _NUMBERS, name, i)


def _of_tensor(choices: Choices, name: str, tensor: Tensor, i: int | None) -> Change:
    shape, what = list(tensor.shape), choices.randrange(9)
    if what == 0 and shape:  # another size
        at = choices.randrange(len(shape))
        shape[at] = choices.choice((max(shape[at] - 1, 0), shape[at] + 1, *_SIZES))
    elif what == 1:  # another number of dimensions
        at = choices.randrange(len(shape) + 1)
        if shape and choices.chance(50):
            del shape[min(at, len(shape) - 1)]
        else:
            shape.insert(at, choices.choice((1, 2, 0)))
    elif what == 2:
        dtype = choices.choice(DTYPES)
        return Change(dtype, name, lambda value, _: value.to(getattr(torch, dtype)), i)
    elif what in (3, 4, 5, 6):
        table = {3: KINDS, 4: KINDS, 5: LAYOUTS | OVERLAPS, 6: FILLS}[what]
        return _named(choices, table, name, i)
    elif what == 7:
        shape = [choices.choice(_SIZES[:6]) for _ in range(choices.randrange(4))]
    elif choices.chance(50):
        return _expression(choices, _OTHERS, name, i)
    else:
        return Change("a list of it", name, lambda value, _: [value], i)
    return Change(f"shape {shape}", name, lambda value, _: _of_shape(shape, value.dtype), i)


def _of_shape(shape: list[int], dtype: torch.dtype) -> Tensor:
    if math.prod(shape) > _MOST_ELEMENTS:
        return torch.ones((), dtype=dtype).expand(shape)
    return (5 * torch.randn(shape)).to(dtype)


def _of_list(choices: Choices, name: str, entries: list) -> Change:
    what = choices.randrange(7)
    at = choices.randrange(len(entries)) if entries else 0
    if what <= 2 and entries:
        return _mutation(choices, name, entries[at], at)
    if what == 3 and entries:
        return Change(f"without [{at}]", name, lambda value, _: [*value[:at], *value[at + 1 :]])
    if what == 4 and entries:
        return Change(f"[{at}] twice", name, lambda value, _: [*value, value[at]])
    if what == 5:
        times = choices.choice((0, 2, 9, 100))
        return Change(f"{times} times", name, lambda value, _: value * times)
    if not entries or choices.chance(50):
        return _expression(choices, _OTHERS, name)
    return Change("its first entry", name, lambda value, _: value[0])
