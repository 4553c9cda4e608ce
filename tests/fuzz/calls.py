"""Calls of the compiled ops and of lora_ext.functional; half of them are valid.

Valid calls are those of tests/support/op_table.py with other sizes, dtypes and options.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any, TypeVar

import numpy
import torch
from support.layers import DTYPES
from support.merging import FLOATING
from support.op_table import (
    HAVE_KERNELS,
    LAYOUTS,
    OF_BASES,
    OPS,
    REGISTERED,
    entry_of,
    good_call,
    good_function_call,
    op_named,
    tensors_of,
    with_entry,
)
from torch import Tensor

from lora_ext import functional
from lora_ext._ops.checks import accumulation_dtype

from . import planted
from .compare import WrongResult, check_formula, check_merge, check_seed, lacks_memory, same_bits, tensors_in

T = TypeVar("T")
Arguments = dict[str, Any]
OP, FUNCTION = "torch.ops.lora_ext.", "lora_ext.functional."
NAMES = [OP + name for name in REGISTERED] + [FUNCTION + name for name in functional.__all__]
NAMES.remove(f"{FUNCTION}MergeRecord")  # calls of lora_unmerge_ make one


class Choices:
    """Choices made of numbers, and of zeros after their end; 0 is the simplest one."""

    def __init__(self, numbers: Iterable[int]) -> None:
        self._numbers = iter(numbers)

    def below(self, count: int) -> int:
        return next(self._numbers, 0) % count

    def choice(self, options: Iterable[T]) -> T:
        options = list(options)
        return options[self.below(len(options))]

    def chance(self, percent: int) -> bool:
        """True in ``percent`` of 100 cases."""
        return self.below(100) >= 100 - percent


@dataclass
class Call:
    """A call of a function by its dotted name.

    Attributes:
        run: called with the arguments by name.
        oracle: checks the result: ``oracle(before, result, after)`` gets the arguments before the call, the result,
            and the arguments after it. Raises :class:`WrongResult` or :class:`CannotTell`.
        writes: the argument that the function may change, or "".
        differentiated: returns the results that may have gradients.
        said: what was done to the arguments, in words.
        is_void: whether PyTorch can make no such arguments.
    """

    function: str
    run: Callable[..., Any]
    arguments: Arguments
    oracle: Callable[[Arguments, Any, Arguments], None] | None = None
    writes: str = ""
    differentiated: Callable[[Any], list[Tensor]] | None = None
    said: list[str] = field(default_factory=list)
    is_void: bool = False

    def __post_init__(self) -> None:
        self._valid = [f"    {name}: {_described(value)}" for name, value in self.arguments.items()]

    def text(self) -> str:
        return "\n".join([f"{self.function} of", *self._valid, *(f"    changed {words}" for words in self.said)])

    def words(self) -> list[str]:
        """Returns names; a message about the call must have one of them."""
        short = self.function.rpartition(".")[2]
        names = [name for name in self.arguments if len(name) > 1 or name in "xy"]
        return [short, short.rstrip("_"), "lora_ext", "MergeRecord", *names]


def _described(value: Any) -> str:
    if isinstance(value, Tensor):
        return f"{str(value.dtype).removeprefix('torch.')} {list(value.shape)}"
    return f"[{', '.join(map(_described, value))}]" if isinstance(value, list) else f"{value!r:.100}"


def make(name: str, numbers: Sequence[int]) -> Call:
    """Makes a call of a function whose dotted name ends with ``name``, or of any."""
    choices = Choices(numbers)
    torch.manual_seed(choices.below(1000))
    if name in planted.FUNCTIONS:
        x = torch.randn(choices.below(3) + 3, choices.below(3) + 1)
        return Call(planted.PREFIX + name, planted.FUNCTIONS[name], {"x": x}, planted.check)
    function = choices.choice(found for found in NAMES if f".{found}".endswith(f".{name}") or not name)
    call = _valid(choices, function)
    lists = [name for name, value in call.arguments.items() if isinstance(value, list)]
    try:
        _make_odd(choices, call)
        if choices.chance(50):
            _make_wrong(choices, call)
    except (RuntimeError, TypeError, ValueError, IndexError, AttributeError):  # PyTorch makes no such tensor
        call.is_void = True
    # PyTorch reads some wrong arguments before our ops see them: to name a tensor that stands for a list in its error,
    # and in functions, which call other ops of PyTorch. Of memory that is missing it would crash.
    read = [
        v for n, v in call.arguments.items() if function.startswith(FUNCTION) or (n in lists and isinstance(v, Tensor))
    ]
    call.is_void = call.is_void or not all(map(_is_for_pytorch, tensors_in(read)))
    return call


def _is_for_pytorch(tensor: Tensor) -> bool:
    """Whether PyTorch's ops can take it: they read missing memory, and huge tensors take for ever."""
    return not lacks_memory(tensor) and (tensor.is_nested or tensor.numel() < 1 << 24)


# --- valid calls ------------------------------------------------------------------------------------------------------

SIZES = (3, 1, 2, 0, 5, 8, 16, 17, 31, 32, 33, 64, 65, 70, 127, 130, 257)
TOKENS = (3, 1, 2, 0, 4, 8, 9, 17, 32, 33, 40, 65, 97)
RANKS = (2, 1, 3, 4, 8, 11, 16, 17, 33, 70)
SCALINGS = (1.0, 0.5, 2.0, 0.0, 1e-30, 1e4)
PAIRS = [*DTYPES, (torch.float32, torch.float64), (torch.bfloat16, torch.float16)]
PROBABILITIES = (0.1, 0.5, 2.0**-17, 2.0**-16, 1 - 2.0**-16, 0.9999999)
SEEDS = (0, 1, -1, 2**63 - 1, -(2**63), 12345)
MERGED_SIZES = (3, 1, 0, 2, 8, 17, 33, 64, 100, 255, 256, 257, 300, 520)


def _valid(choices: Choices, function: str) -> Call:
    name = function.rpartition(".")[2]
    is_op = function.startswith(OP)
    run = op_named(name) if is_op else getattr(functional, name)
    if name == "draw_seed":
        device = choices.choice((torch.device("cpu"), "cpu", torch.device("meta")))
        return Call(function, run, {"device": device}, check_seed)
    if "merge" in name:
        return (_merge if is_op else _merge_one)(choices, function, run)
    arguments = _arguments(choices, name, is_op)
    call = Call(function, run, arguments, writes="y" if name.endswith("_") else "")
    if "backward" in name or name == "lora_dropout_mask":
        return call
    if not is_op:
        call.oracle = partial(check_formula, OPS[name].plain)
    if name.endswith("_"):
        call.differentiated = lambda result: tensors_in(call.arguments["y"])
    else:  # ops also return what their backward reads
        call.differentiated = lambda result: tensors_in(result[0] if is_op and isinstance(result, tuple) else result)
    return call


def _arguments(choices: Choices, name: str, is_op: bool) -> Arguments:
    leading = (choices.choice(TOKENS), *[choices.choice((1, 2, 0, 3))] * choices.chance(20))
    layers = [(choices.choice(SIZES), choices.choice(RANKS)) for _ in range(choices.choice((2, 1, 3, 8)))]
    sizes = choices.choice(SIZES), *(layers[:1] if "grouped" in name else [layers])
    options = {"dtypes": choices.choice(PAIRS), "leading": leading}
    if "grouped" in name:
        options |= _groups(choices, leading) | {"features": (sizes[0], layers[0][0])}
    elif "siblings" in name:
        options["size"] = ((0, sizes[0]), layers)
    elif name == "bottleneck":
        activation = choices.choice(("relu", "identity", "gelu", "silu"))
        options |= {"size": (0, sizes[0], *layers[0]), "activation": activation, "residual": choices.chance(50)}
    elif name != "lora_dropout_mask":
        options["size"] = (0, sizes[0], *layers[0])
    if name == "bottleneck":
        arguments = {"residual": None} | OPS[name].small(**options).call
    elif is_op:
        of_bases = f"{name}{OF_BASES}" in HAVE_KERNELS and choices.chance(50)
        arguments = good_call(name + OF_BASES * of_bases, **options)
    else:
        arguments = good_function_call(name, **options)
    return _with_options(choices, name, is_op, arguments)


def _groups(choices: Choices, leading: tuple[int, ...]) -> Arguments:
    """Draws which adapters there are, and which row uses which."""
    ranks = [choices.choice((2, 1, 3, 4, 0, 8, 17, 33)) for _ in range(2)]
    entries = [(choices.choice((2, 1, 3, 0)), rank) if choices.chance(50) else rank for rank in ranks]
    count = sum(entry[0] if isinstance(entry, tuple) else 1 for entry in entries)
    rows = torch.empty(leading[: choices.choice((len(leading), 0, 1))])
    groups = torch.arange(rows.numel()) * choices.choice((3, 1, 7, 0)) % (count + 1) - 1
    return {"entries": entries, "groups": groups.reshape(rows.shape), "ranks": choices.chance(50)}


def _with_options(choices: Choices, name: str, is_op: bool, arguments: Arguments) -> Arguments:
    """Draws numbers, and leaves out optional tensors that no wanted gradient needs."""
    p = choices.choice(PROBABILITIES) if choices.chance(40) or name == "lora_dropout_mask" else 0.0
    has_seed = p > 0 or choices.chance(20)
    scalings = (*SCALINGS, -1.0) if "delta" in name or "grouped" in name else SCALINGS
    drawn = {
        "dropout_p": p,
        "seed": torch.full(choices.choice(((), (1,), (1, 1))), choices.choice(SEEDS)) if has_seed else None,
        "scaling": choices.choice(scalings),
        "scalings": [choices.choice(scalings) for _ in arguments.get("scalings", ())],
        "output_mask": [not choices.chance(30) for _ in arguments.get("output_mask", ())],
        "num_tokens": choices.choice(TOKENS),
        "in_features": choices.choice(SIZES),
    }
    if "grouped" in name:
        drawn["scalings"] = torch.tensor(drawn["scalings"], dtype=torch.float64)
    arguments = arguments | {argument: value for argument, value in drawn.items() if argument in arguments}
    wanted, factors = drawn["output_mask"], len(arguments.get("lora_As", [None]))
    needed = {"x": any(wanted[1 : 1 + factors]), "xa": any(wanted[-factors:]), "mask": p > 0, "seed": True}
    optional = ["bias", "down_bias", "up_bias", "ranks"]
    if is_op:
        optional = [a.name for a in op_named(name)._schema.arguments if isinstance(a.type, torch.OptionalType)]
    for argument in optional:
        if argument in arguments and not needed.get(argument) and choices.chance(50):
            arguments[argument] = None
    if "biases" in arguments:
        arguments["biases"] = [None if choices.chance(50) else bias for bias in arguments["biases"]]
    return arguments


def _merged_sizes(choices: Choices) -> tuple[int, int, int]:
    return choices.choice(MERGED_SIZES), choices.choice(MERGED_SIZES), choices.choice(RANKS)


def _merge(choices: Choices, function: str, run: Callable) -> Call:
    shapes = [_merged_sizes(choices) for _ in range(choices.choice((1, 2, 3)))]
    dtype = choices.choice(FLOATING)
    arguments = good_call("lora_merge_record_", dtype=dtype, shapes=shapes)
    if dtype.itemsize == 2 and choices.chance(40):  # rounds stochastically
        arguments |= {"seeds": [choices.choice(SEEDS) for _ in shapes]}
        arguments |= {"first_rows": [choices.choice((0, 1, 1 << 31)) for _ in shapes]}
    if function.endswith("unmerge_"):
        _, arguments["words"], arguments["corrections"] = torch.ops.lora_ext.lora_merge_record_(**arguments)
    return Call(function, run, arguments, writes="weights")


def _merge_one(choices: Choices, function: str, run: Callable) -> Call:
    dtype = choices.choice(FLOATING)
    rows, columns, rank = _merged_sizes(choices)
    factors = choices.choice((accumulation_dtype(dtype), dtype, torch.float32, torch.bfloat16, torch.float64))
    weight = torch.randn(rows, columns).to(dtype)
    arguments = {"weight": weight, "lora_A": torch.randn(rank, columns).to(factors)}
    arguments |= {
        "lora_B": torch.randn(rows, rank).to(factors),
        "scaling": choices.choice((1.0, 0.5, 0.0, 1e-30, -1.0)),
    }
    if function.endswith("lora_merge_"):
        arguments |= {"record": not choices.chance(30), "seed": None}
        return Call(function, run, arguments, check_merge, "weight")
    before, record = weight.clone(), functional.lora_merge_(**arguments)
    valid = {"weight": weight, **{name: value for name, value in vars(record).items() if name != "draws"}}

    def oracle(_: Arguments, result: Tensor, after: Arguments) -> None:
        if not call.said and (result is not after["weight"] or not same_bits(result, before)):
            raise WrongResult("the weight has other bits than before the merge")

    def lora_unmerge_(weight: Any, **record: Any) -> Tensor:
        return run(weight, functional.MergeRecord(**record))

    call = Call(function, lora_unmerge_, valid, oracle, "weight")
    return call


# --- other forms of an argument ---------------------------------------------------------------------------------------

# The layouts that an op accepts of a tensor it changes: y must be contiguous; a weight to merge into may have gaps
# between its rows.
IN_PLACE = {name: LAYOUTS[name] for name in ("unaligned", "the middle of a storage")}
MERGED = IN_PLACE | {"apart": LAYOUTS["apart"]}


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
HISTORIES: dict[str, Callable[[Tensor], Tensor]] = {
    "leaf": lambda t: t.requires_grad_(),
    "not a leaf": lambda t: t.requires_grad_() * 1,
}


def _make_odd(choices: Choices, call: Call) -> None:
    """Gives arguments contents, layouts and histories that an op must take."""
    trains = call.differentiated is not None and choices.chance(40)
    layouts = {call.writes: IN_PLACE if call.writes == "y" else MERGED}
    for name, i, tensor in list(tensors_of(call.arguments)):
        if not tensor.is_floating_point() or name == "scalings":
            continue
        if choices.chance(15):
            _change(choices, call, name, i, FILLS)
        if choices.chance(30) and tensor.dim() and len(tensor):
            _change(choices, call, name, i, layouts.get(name, LAYOUTS))
        if trains and name != "y" and choices.chance(60):
            _change(choices, call, name, i, HISTORIES)


def _change(choices: Choices, call: Call, name: str, i: int | None, table: dict[str, Callable[[Any], Any]]) -> None:
    what = choices.choice(table)
    call.said.append(f"{name}{'' if i is None else f'[{i}]'}: {what}")
    call.arguments = with_entry(call.arguments, name, i, table[what](entry_of(call.arguments, name, i)))


# Views with other values, whose elements share memory.
OVERLAPS: dict[str, Callable[[Tensor], Tensor]] = {
    "rows expanded": lambda t: t[:1].expand(t.shape),
    "columns expanded": lambda t: t[..., :1].expand(t.shape),
    "overlapping": lambda t: t.contiguous().as_strided(t.shape, (1,) * t.dim()),
}
# The same values, but not a plain tensor without history.
KINDS: dict[str, Callable[[Tensor], Any]] = HISTORIES | {
    "parameter": torch.nn.Parameter,
    "view of a leaf": lambda t: t.requires_grad_().view_as(t),
    "one of several views": lambda t: torch.unbind(t.requires_grad_().clone().unsqueeze(0))[0],
    "view made without gradients": lambda t: torch.no_grad()(lambda t: t.view_as(t))(t.requires_grad_()),
    "inference": lambda t: torch.inference_mode()(torch.clone)(t),
    "negative bit": lambda t: torch._neg_view(t),
    "meta": lambda t: t.to("meta"),
    "sparse": lambda t: t.to_sparse(),
    "sparse rows": lambda t: t.to_sparse_csr(),
    "mkldnn": lambda t: t.to_mkldnn(),
    "nested": lambda t: torch.nested.nested_tensor([t]),
    "quantised": lambda t: torch.quantize_per_tensor(t.float(), 0.1, 0, torch.qint8),
    "conjugated": lambda t: torch.complex(t.float(), t.float()).conj(),
    "imaginary part of a conjugate": lambda t: torch.complex(t.float(), t.float()).conj().imag,
    "storage resized to nothing": lambda t: (t := t.clone(), t.untyped_storage().resize_(0))[0],
    "subclass": lambda t: t.as_subclass(type("Sub", (Tensor,), {})),
    "a list of it": lambda t: [t],
}
INTEGERS: dict[str, Callable[[Tensor], Tensor]] = {
    "-1": lambda t: torch.full_like(t, -1),
    "the largest": lambda t: torch.full_like(t, torch.iinfo(t.dtype).max),
    "more": lambda t: t + 3,
    "fewer": lambda t: t[:1],
}
DTYPE_NAMES = (  # noqa: SIM905
    "float32 float64 bfloat16 float16 int64 int32 int16 uint8 int8 bool complex64 complex128 complex32 float8_e4m3fn "
    "float8_e5m2 uint16 uint32 uint64"
).split()
OF_DTYPES = {name: (lambda t, name=name: t.to(getattr(torch, name))) for name in DTYPE_NAMES}
OTHER_SIZES = (0, 1, 2, 7, 33, 300, 1 << 31, 1 << 40, (1 << 62) + 1)
# A tensor with more elements than this is one element in memory with a stride of 0.
MOST_ELEMENTS = 1 << 18
NUMBERS = (0.0, -0.0, -1.0, 1.0, 0.9999999999999999, 0.99999, 2.0**-17, 2.0**-18, 5e-324, 1e-30, 3e38, 1e308, math.inf)
NUMBERS += (-math.inf, math.nan, True, 1, 2**70, torch.tensor(0.5), torch.tensor([0.5, 0.5]), numpy.float32(0.5), 1j)
WHOLE_NUMBERS = (0, 1, -1, 2**31, 2**62, 2**63 - 1, -(2**63), 2**63, 2**70, 1.0, 1.5, True)
OTHERS = (None, "lora", 1, 0.5, True, -1, (), [], {}, "", object(), torch.float32, numpy.zeros((2, 2)), numpy.int64(3))
OTHERS += (b"\x00", "\ud800", "a" * 5000, [None], [[]], ["a", 1], {"a": None}, {"a"}, math.nan, 2**70, math.inf)
OTHERS += ([2**70], type, torch.zeros(2), torch.nn.Linear(2, 2))


def _make_wrong(choices: Choices, call: Call) -> None:
    """Changes one to three arguments, each of which can make the call invalid."""
    for _ in range(choices.below(3) + 1):
        name = choices.choice(call.arguments)
        value = call.arguments[name]
        if choices.chance(3) and len(call.arguments) > 1:
            call.said.append(f"{name}: left out")
            del call.arguments[name]
        elif choices.chance(12):
            _alias(choices, call, name)
        elif isinstance(value, list) and value and choices.chance(45):
            _change_one(choices, call, name, choices.below(len(value)))
        else:
            _change_one(choices, call, name, None)


def _change_one(choices: Choices, call: Call, name: str, i: int | None) -> None:
    value = entry_of(call.arguments, name, i)
    if choices.chance(6):
        table = _table(OTHERS)
    elif isinstance(value, Tensor):
        integers = INTEGERS if not value.is_floating_point() else FILLS
        forms = LAYOUTS | OVERLAPS, KINDS, KINDS, integers, OF_DTYPES
        table = choices.choice((*forms, *[_of_shape(_other_shape(choices, value.shape))] * 3))
        if lacks_memory(value):  # PyTorch reads it anyway
            return
    elif isinstance(value, list) and value:
        at = choices.below(len(value))
        table = {f"without [{at}]": lambda v: [*v[:at], *v[at + 1 :]], f"[{at}] twice": lambda v: [*v, v[at]]}
        table |= {f"{n} times": lambda v, n=n: v * n for n in (0, 2, 9, 100)} | {"its first entry": lambda v: v[0]}
    else:
        is_number = isinstance(value, int | float) and not isinstance(value, bool)
        numbers = WHOLE_NUMBERS if isinstance(value, int) else NUMBERS
        table = _table(numbers if is_number and not choices.chance(25) else OTHERS)
    _change(choices, call, name, i, table)


def _table(values: Sequence[Any]) -> dict[str, Callable[[Any], Any]]:
    return {f"{value!r:.40}": lambda _, value=value: value for value in values}


def _other_shape(choices: Choices, old: Sequence[int]) -> list[int]:
    shape, at, what = list(old), choices.below(len(old) + 1), choices.below(6)
    if what == 0:
        return [choices.choice(OTHER_SIZES[:6]) for _ in range(choices.below(4))]
    if what == 1:
        shape.insert(at, choices.choice((1, 2, 0)))
    elif what == 2 and at < len(shape):
        del shape[at]
    elif at < len(shape):
        shape[at] = choices.choice((max(shape[at] - 1, 0), shape[at] + 1, *OTHER_SIZES))
    return shape


def _of_shape(shape: list[int]) -> dict[str, Callable[[Tensor], Tensor]]:
    def make(tensor: Tensor) -> Tensor:
        if math.prod(shape) > MOST_ELEMENTS:
            return torch.ones((), dtype=tensor.dtype).expand(shape)
        return (5 * torch.randn(shape)).to(tensor.dtype)

    return {f"shape {shape}": make}


def _alias(choices: Choices, call: Call, name: str) -> None:
    """Replaces an argument, or an entry of it, by another one or a part of it."""
    other = choices.choice(call.arguments)
    value, target = call.arguments[name], call.arguments[other]
    i = j = None
    if isinstance(value, list) and isinstance(target, list) and value and target:
        i, j = choices.below(len(value)), choices.below(len(target))
    views: dict[str, Callable[[Any], Any]] = {"": lambda t: t, "[:1]": lambda t: t[:1], ".T": lambda t: t.T}
    views |= {"[..., :1]": lambda t: t[..., :1], "[0]": lambda t: t[0]}
    view = choices.choice(views)
    found = views[view](entry_of(call.arguments, other, j))
    _change(choices, call, name, i, {f"{other}{'' if j is None else f'[{j}]'}{view}": lambda _: found})
