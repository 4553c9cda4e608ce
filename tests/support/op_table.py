"""The table of the ops as users call them: how each is called, what it computes, and samples of its arguments.

The tests of tests/ops go over it. An op that is given a row here has tests of values, gradients, forms, machinery and
bad arguments. :func:`good_call` has a call of every registered op, backward ops and merges included.
"""

from __future__ import annotations

import inspect
import itertools
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

import torch
from support.layers import assert_errors_as_plain, rounds_factors
from support.merging import packed_layers
from torch import Tensor
from torch.nn import functional as F
from torch.utils import _pytree as pytree

from lora_ext import _load, functional, reference
from lora_ext._ops.checks import accumulation_dtype
from lora_ext.merging.weights import merge_all_

ops = torch.ops.lora_ext
SEED = torch.tensor(0x1234_5678_9ABC_DEF0 >> 1)
FLOAT, DOUBLE = (torch.float32,) * 2, (torch.float64,) * 2
Dtypes = tuple[torch.dtype, torch.dtype]
"""The dtypes of x and of the factors."""


def tensors_of(call: dict[str, Any]) -> Iterator[tuple[str, int | None, Tensor]]:
    """Yields every tensor of a call: the argument's name, its index in a list, and the tensor."""
    for name, value in call.items():
        for i, entry in enumerate(value) if isinstance(value, list) else [(None, value)]:
            if isinstance(entry, Tensor):
                yield name, i, entry


def entry_of(call: dict[str, Any], name: str, i: int | None) -> Any:
    return call[name] if i is None else call[name][i]


def with_entry(call: dict[str, Any], name: str, i: int | None, entry: object) -> dict[str, Any]:
    """Returns the call with another value in one place."""
    if i is None:
        return call | {name: entry}
    return call | {name: [*call[name][:i], entry, *call[name][i + 1 :]]}


def every_second(tensor: Tensor) -> Tensor:
    """Places the elements of the last dimension apart."""
    between = torch.full_like(tensor, torch.nan if tensor.is_floating_point() else 77)
    return torch.stack([tensor, between], -1)[..., 0]


def apart(tensor: Tensor) -> Tensor:
    """Places the tensor in a larger one: there are gaps behind every dimension."""
    wide = F.pad(tensor, (3, 5) * tensor.dim(), value=torch.nan if tensor.is_floating_point() else 77)
    return wide[(slice(3, -5),) * tensor.dim()]


LAYOUTS: dict[str, Callable[[Tensor], Tensor]] = {
    "apart": apart,
    "every other column": every_second,
    "columns": lambda t: t.mT.contiguous().mT if t.dim() > 1 else t,
    "last dimension outermost": lambda t: t.movedim(-1, 0).contiguous().movedim(0, -1),
    "unaligned": lambda t: torch.cat([t.new_ones(1), t.flatten()])[1:].view(t.shape),
    "the middle of a storage": lambda t: torch.cat([t[:1], t, t[:1]])[1:-1],
}
"""Views and copies with the same values; what lies between floating-point elements is NaN."""


def label(name: str, i: int | None) -> str:
    """Returns the name of an argument in messages."""
    return name if i is None else f"{name}[{i}]"


@dataclass
class Sample:
    """Arguments of an op by name, without dropout, and gradients of its results.

    ``is_exact``: whether no dtype rounds anything of them.
    """

    call: dict[str, Any]
    grads: list[Tensor]
    is_exact: bool = False

    def mapped(self, change: Callable[[Tensor], Tensor]) -> Sample:
        """Returns the sample with other tensors."""
        call, grads = pytree.tree_map_only(Tensor, change, (self.call, self.grads))
        return replace(self, call=call, grads=grads)

    def double(self) -> Sample:
        return self.mapped(lambda t: t.double() if t.is_floating_point() else t)

    def as_read(self, x_dtype: torch.dtype) -> Sample:
        """Returns the sample with factors as the kernels read them."""
        call = self.call
        for name, i, tensor in list(tensors_of(call)) if rounds_factors(self.grads[0].device, x_dtype) else ():
            if name.startswith(("lora_A", "lora_B", "down_weight", "up_weight")):
                call = with_entry(call, name, i, tensor.to(x_dtype))
        return Sample(call, self.grads)

    def with_dropout(self, dropout_p: float, seed: Tensor | None = SEED) -> Sample:
        dropout_p = 0.5 if dropout_p and self.is_exact else dropout_p  # nor the scale of what is kept
        return replace(self, call=self.call | {"dropout_p": dropout_p, "seed": seed}) if dropout_p else self

    def smallest(self) -> int:
        """Returns the number of elements of the smallest tensor."""
        tensors = [t for name, _, t in tensors_of(self.call) if t.is_floating_point() and name != "scalings"]
        return min(tensor.numel() for tensor in [*tensors, *self.grads])


@dataclass(frozen=True)
class Op:
    """An op.

    Attributes:
        name: of the function in ``lora_ext.functional``, or of the registered op.
        run: called with a sample's arguments by name; returns the results. Changes none of the arguments.
        plain: the same in plain PyTorch.
        trained: the arguments with gradients, "" for the weight and bias, which are usually frozen.
        keeps: what the backward reads, and the arguments whose gradients read it.
        small: makes a sample from dtypes and leading dimensions, for tests of everything but the arithmetic.
        samples: makers of samples from dtypes, for the tests of the arithmetic.
        empty: the same, with sizes of zero.
    """

    name: str
    run: Callable[..., list[Tensor]]
    plain: Callable[..., list[Tensor]]
    trained: tuple[str, ...]
    small: Callable[..., Sample]
    samples: dict[str, Callable[[Dtypes], Sample]]
    empty: dict[str, Callable[[Dtypes], Sample]]
    frozen: tuple[str, ...] = ()
    keeps: dict[str, tuple[str, ...]] = field(default_factory=dict)
    has_dropout: bool = True

    def leaves(self, sample: Sample, with_frozen: bool = False) -> list[tuple[str, int | None]]:
        """Returns the places of the tensors with gradients."""
        names = self.trained + self.frozen * with_frozen
        return [(name, i) for name, i, _ in tensors_of(sample.call) if name in names]

    def results(self, sample: Sample, names: Sequence[str] | None = None) -> dict[str, Tensor]:
        """Returns the results, and the gradients of these arguments; None: of all that are trained."""
        leaves = [place for place in self.leaves(sample) if names is None or place[0] in names]
        return results(self.run, sample, leaves)


def results(
    function: Callable[..., list[Tensor]], sample: Sample, leaves: list[tuple[str, int | None]]
) -> dict[str, Tensor]:
    """Returns the results of a call and the gradients of its leaves, zero if unused. Views of arguments stay views."""
    call, tensors = sample.call, []
    for name, i in leaves:
        tensors.append(entry_of(call, name, i).detach().requires_grad_())
        call = with_entry(call, name, i, tensors[-1])
    ys = function(**call)
    outputs = [(y, grad) for y, grad in zip(ys, sample.grads, strict=True) if y.requires_grad]
    grads = list(map(torch.zeros_like, tensors))
    if outputs and tensors:
        ys_used, grad_ys = zip(*outputs, strict=True)
        grads = torch.autograd.grad(ys_used, tensors, grad_ys, materialize_grads=True)
    named = {f"grad of {label(*leaf)}": grad for leaf, grad in zip(leaves, grads, strict=True)}
    return {f"result {i}": y.detach() for i, y in enumerate(ys)} | named


def joined(found: dict[str, Tensor]) -> dict[str, Tensor]:
    """Joins the gradients of a list of factors: those of few rows can be exact by chance."""
    parts: dict[str, list[Tensor]] = {}
    for name, value in found.items():
        parts.setdefault(name.partition("[")[0], []).append(value)
    return {n: v[0] if len(v) == 1 else torch.cat([value.flatten() for value in v]) for n, v in parts.items()}


def assert_as_good_as_plain(
    op: Op,
    make: Callable[[Dtypes], Sample],
    dtypes: Dtypes,
    dropout_p: float = 0.0,
    seed: Tensor = SEED,
    names: Sequence[str] | None = None,
) -> None:
    """Checks that errors against float64 are at most twice those of plain PyTorch at the same dtypes.

    Several samples are judged by their joint error, until each result has 64 elements, and 200 if one has a single
    element, whose error is often zero; of exact results, 16 do. ``names``: of the arguments with gradients; None: all.
    """
    dropout_p = dropout_p if op.has_dropout else 0.0
    samples = [make(dtypes).with_dropout(dropout_p, seed)]
    if smallest := samples[0].smallest():
        wanted = 16 if samples[0].is_exact else 200 if smallest == 1 else 64
        samples += [make(dtypes).with_dropout(dropout_p, seed) for _ in range((wanted - 1) // smallest)]
    compared = []
    for sample in samples:
        leaves = [place for place in op.leaves(sample) if names is None or place[0] in names]
        read = sample.as_read(dtypes[0])
        runs = ((op.run, sample), (op.plain, read.double()), (op.plain, read))
        found = [results(function, of, leaves) for function, of in runs]
        # The gradients of rounded factors have the dtype of these.
        found[2] = {name: value.to(found[0][name].dtype) for name, value in found[2].items()}
        compared.append(tuple(map(joined, found)) if "grouped" in op.name else tuple(found))
        assert all(value.isfinite().all() for value in found[0].values())
    is_rounded = rounds_factors(read.grads[0].device, dtypes[0])
    assert_errors_as_plain(compared, dtypes[0], dtypes[0] if is_rounded else dtypes[1])


def assert_bits(actual: dict[str, Tensor], expected: dict[str, Tensor], but: str = "") -> None:
    """Checks that results are equal to the bit, except the one named ``but``."""
    compared = [{name: tensor for name, tensor in found.items() if name != but} for found in (actual, expected)]
    torch.testing.assert_close(*compared, rtol=0, atol=0)


# --- how the ops are called -------------------------------------------------------------------------------------------


def _plain_delta(y: Tensor, x: Tensor, *rest: Any, **dropout: Any) -> Tensor:
    return (y + reference.lora_delta(x, *rest, **dropout)).to(y.dtype)


def _plain_grouped(y: Tensor, x: Tensor, *, ranks: Tensor | None = None, **call: Any) -> list[Tensor]:
    return [(y + reference.lora_grouped(x, **call, ranks=ranks)).to(y.dtype)]


def _plain_shrink(x: Tensor, lora_A: Tensor) -> list[Tensor]:
    wide = torch.promote_types(x.dtype, lora_A.dtype)
    return [(x.to(wide) @ lora_A.to(wide).T).to(accumulation_dtype(x.dtype))]


def _plain_expand(base: Tensor, xa: Tensor, lora_B: Tensor, bias: Tensor | None = None) -> list[Tensor]:
    y = base + xa @ lora_B.to(xa.dtype).T
    return [(y if bias is None else y + bias).to(base.dtype)]


def one_by_one(x: Tensor, lora_As, lora_Bs, scalings, weights=(), biases=(), bases=(), **dropout) -> list[Tensor]:
    """Computes layers that share x, with a call for each."""
    if bases:
        layers = zip(bases, lora_As, lora_Bs, scalings, strict=True)
        return [functional.lora_delta_(base.clone(), x, *layer, **dropout) for base, *layer in layers]
    layers = zip(weights, biases, lora_As, lora_Bs, scalings, strict=True)
    return [functional.lora_linear(x, *layer, **dropout) for layer in layers]


# --- samples ----------------------------------------------------------------------------------------------------------

_SIBLINGS = {name: f"{name}s" for name in ("weight", "lora_A", "lora_B")} | {"bias": "biases"}


def _random(dtype: torch.dtype, *shape: int) -> Tensor:
    return torch.randn(shape).to(dtype)


def _matrix(dtype: torch.dtype, *shape: int) -> Tensor:
    """Makes matrices whose products with random vectors have elements of size 1."""
    return (torch.randn(shape) / max(shape[-1], 1) ** 0.5).to(dtype)


def linear(dtypes: Dtypes = FLOAT, leading=(), size=(6, 24, 20, 4), bias: bool | None = None) -> Sample:
    tokens, in_features, out_features, rank = size
    rows, (dtype, factor_dtype) = leading or (tokens,), dtypes
    call = {
        "x": _random(dtype, *rows, in_features),
        "weight": _matrix(dtype, out_features, in_features),
        "bias": _random(dtype, out_features) if bias or (bias is None and in_features % 2 == 0) else None,
        "lora_A": _matrix(factor_dtype, rank, in_features),
        "lora_B": _random(factor_dtype, out_features, rank),
        "scaling": 0.75,
    }
    return Sample(call, [_random(dtype, *rows, out_features)])


def delta(dtypes: Dtypes = FLOAT, leading=(), size=(6, 24, 20, 4)) -> Sample:
    sample = linear(dtypes, leading, size)
    rest = {name: value for name, value in sample.call.items() if name not in ("weight", "bias")}
    return Sample({"y": torch.randn_like(sample.grads[0])} | rest, sample.grads)


SIBLINGS = ((6, 24), ((20, 4), (12, 3)))


def siblings(dtypes: Dtypes = FLOAT, leading=(), size=SIBLINGS) -> Sample:
    """Makes layers of one x: every other one has a bias, and scalings differ."""
    of_x, layers = size
    alone = [linear(dtypes, leading, (*of_x, *layer), bias=i % 2 == 0) for i, layer in enumerate(layers)]
    call = {"x": alone[0].call["x"]} | {names: [one.call[name] for one in alone] for name, names in _SIBLINGS.items()}
    scalings = [0.75 + i / 2 for i in range(len(layers))]
    return Sample(call | {"scalings": scalings}, [one.grads[0] for one in alone])


def delta_siblings(dtypes: Dtypes = FLOAT, leading=(), size=SIBLINGS) -> Sample:
    sample = siblings(dtypes, leading, size)
    rest = {name: value for name, value in sample.call.items() if name not in ("weights", "biases")}
    return Sample({"bases": [torch.randn_like(grad) for grad in sample.grads]} | rest, sample.grads)


def grouped(
    dtypes: Dtypes = FLOAT,
    leading=(),
    tokens=6,
    features=(24, 20),
    entries=((3, 4), 2),
    ranks: bool | list[int] = False,
    groups: Tensor | None = None,
) -> Sample:
    """Makes rows of random groups, and of none.

    Args:
        entries: for each entry the rank of a matrix, or the slots and the rank of a stack.
        ranks: of the groups; True: random numbers, and what no row may read of the factors is NaN.
        groups: the group of each row; None: random.
    """
    (in_features, out_features), (dtype, factor_dtype) = features, dtypes
    rows = leading or (tokens,)
    shapes = [(entry,) if isinstance(entry, int) else entry for entry in entries]
    most = torch.tensor([r for *slots, r in shapes for _ in range(slots[0] if slots else 1)])
    call = {
        "y": _random(dtype, *rows, out_features),
        "x": _random(dtype, *rows, in_features),
        "lora_As": [_matrix(factor_dtype, *shape, in_features) for shape in shapes],
        "lora_Bs": [_random(factor_dtype, *slots, out_features, rank) for *slots, rank in shapes],
        "group_of_row": torch.randint(-1, len(most), rows) if groups is None else groups,
        "scalings": torch.rand(len(most), dtype=torch.float64) + 0.5,
    }
    if ranks:
        call["ranks"] = (torch.rand(len(most)) * (most + 1)).long() if ranks is True else torch.tensor(ranks)
    if ranks is True:
        for group, (A, B) in enumerate(factors_of_groups(call)):
            rank = call["ranks"][group] if (call["group_of_row"] == group).any() else 0
            A[rank:] = B[:, rank:] = torch.nan
    return Sample(call, [_random(dtype, *rows, out_features)])


def factors_of_groups(call: dict[str, Any]) -> list[tuple[Tensor, Tensor]]:
    """Returns views of the factors of each group, with all ranks."""
    entries = zip(call["lora_As"], call["lora_Bs"], strict=True)
    return [pair for A, B in entries for pair in (zip(A, B, strict=True) if A.dim() == 3 else [(A, B)])]


def grouped_linear(dtypes: Dtypes = FLOAT, leading=(), bias: bool = True, **options) -> Sample:
    sample = grouped(dtypes, leading, **options)
    out_features, in_features = sample.call.pop("y").shape[-1], sample.call["x"].shape[-1]
    own = {"weight": _matrix(dtypes[0], out_features, in_features)}
    own["bias"] = _random(dtypes[0], out_features) if bias else None
    return Sample({"x": sample.call.pop("x")} | own | sample.call, sample.grads)


def bottleneck(
    dtypes: Dtypes = FLOAT, leading=(), size=(6, 24, 20, 4), activation="silu", residual=True, bias=True
) -> Sample:
    tokens, in_features, out_features, narrow = size
    lead, out_features = leading or (tokens,), out_features if residual else in_features
    x, down = _random(dtypes[0], *lead, in_features), _matrix(dtypes[1], narrow, in_features)
    down_bias, up_bias = (_random(dtypes[1], n) if bias else None for n in (narrow, out_features))
    if activation == "relu":  # tokens near the kink, where rounding could flip the gradient
        hidden = F.linear(x.double(), down.double(), None if down_bias is None else down_bias.double())
        x[hidden.abs().amin(-1) < 0.02] = 0.0
    call = {"x": x, "down_weight": down, "down_bias": down_bias}
    call |= {"up_weight": _random(dtypes[1], out_features, narrow), "up_bias": up_bias, "activation": activation}
    call |= {"residual": _random(dtypes[0], *lead, out_features)} if residual else {}
    return Sample(call, [_random(dtypes[0], *lead, out_features)])


def shrink(dtypes: Dtypes = FLOAT, leading=(), size=(6, 24, 20, 4)) -> Sample:
    call = delta(dtypes, leading, size).call
    x, A = call["x"], call["lora_A"]
    return Sample({"x": x, "lora_A": A}, [_random(accumulation_dtype(x.dtype), *x.shape[:-1], len(A))])


def expand(dtypes: Dtypes = FLOAT, leading=(), size=(6, 24, 20, 4)) -> Sample:
    sample = delta(dtypes, leading, size)
    base, rank = sample.call["y"], size[3]
    call = {"base": base, "xa": _random(accumulation_dtype(base.dtype), *base.shape[:-1], rank)}
    call |= {"lora_B": sample.call["lora_B"], "bias": _random(base.dtype, base.shape[-1])}
    return Sample(call, sample.grads)


def _of_signs(make: Callable[..., Sample], dtypes: Dtypes) -> Sample:
    """Replaces all numbers by 1 and -1, of which short sums of products are exact."""
    return replace(make(dtypes).mapped(torch.sign), is_exact=True)


def _of_sizes(make: Callable[..., Sample], sizes) -> dict[str, Callable[[Dtypes], Sample]]:
    """Returns makers by size; those of single features have exact results."""
    makers = {size: partial(make, size=size) for size in sizes}
    single = {size for size in sizes if {*pytree.tree_leaves(size)[1:]} == {1}}
    return {str(size): partial(_of_signs, maker) if size in single else maker for size, maker in makers.items()}


# num_tokens, in_features, out_features, rank: no rows, one row, odd tails, ranks that are not multiples of 16, and
# sizes that cross every block boundary of the kernels.
SIZES = [
    (0, 5, 3, 2),
    (1, 1, 1, 1),
    (1, 64, 48, 8),
    (7, 5, 3, 2),
    (31, 63, 130, 3),
    (33, 64, 48, 17),
    (70, 97, 131, 8),
    (100, 515, 257, 100),
    (40, 384, 384, 16),
]
# Both sides of every width in which kernels stream few tokens, and one token more. With one or two tokens a GPU's
# library takes other kernels, and some releases pass it one pointer as bias and output.
FEW = [(n, *size) for n in (1, 2, 3, 4, 5, 8, 9, 16, 17, 18, 24, 32, 33) for size in ((70, 130, 20), (512, 48, 16))]
FEW += [(n, *size) for n in (1, 2) for size in ((256, 384, 16), (384, 128, 3), (33, 19, 1))]
FEW += [(n, *size) for n in (3, 19) for size in ((1, 24, 3), (31, 24, 3), (33, 24, 3))]
# Our product of many tokens: sums and columns on both sides of a vector, a panel, all panels of a group and the lanes
# of a panel; the fewest tokens; whole tiles and others; more rows than are packed together.
MANY = [
    (33, 16, 32, 16),
    (33, 1, 1, 1),
    (61, 70, 40, 8),
    (65, 31, 33, 17),
    (71, 1030, 40, 3),
    (72, 40, 1030, 40),
    (96, 2051, 15, 65),
    (97, 15, 300, 8),
    (1100, 33, 50, 9),
]
# num_tokens and in_features, and the layers' out_features and rank: one to eight layers, ranks that fill no vector
# alone or together, no rows, one row, odd tails, and sizes across every block boundary.
OF_SIBLINGS = [
    ((0, 5), ((3, 2), (4, 1))),
    ((1, 1), ((1, 1), (1, 1))),
    ((1, 64), ((48, 8), (48, 8), (48, 8))),
    ((2, 256), ((256, 16), (64, 16), (384, 5))),
    ((7, 5), ((3, 2), (1, 2), (130, 3))),
    ((33, 64), ((48, 17), (64, 16))),
    ((70, 97), ((131, 8), (64, 3), (5, 17))),
    ((70, 97), ((131, 40), (5, 30))),  # many ranks together, few in each layer
    ((100, 515), ((257, 100),)),
    ((40, 384), ((384, 16), (128, 16), (128, 16))),
    ((35, 300), tuple((40 + 30 * i, 1 + i) for i in range(8))),
    ((130, 70), ((40, 5), (1027, 20), (33, 1))),
]
EMPTY = [(*sizes, rank) for sizes in ((37, 72, 0), (2, 72, 0), (37, 0, 40), (2, 0, 40), (37, 0, 0)) for rank in (3, 40)]
EMPTY += [(0, 72, 40, 3), (0, 0, 0, 3)]
EMPTY_SIBLINGS = [((37, 72), sizes) for sizes in itertools.permutations(((0, 4), (40, 20), (33, 3)))]
EMPTY_SIBLINGS += [((37, 72), ((0, 4), (0, 40))), ((37, 0), ((40, 20), (33, 3))), ((37, 0), ((0, 4), (33, 3)))]
EMPTY_SIBLINGS += [((0, 72), ((40, 20), (33, 3))), ((0, 0), ((0, 20), (33, 3)))]

_GROUPS = {
    "one row": dict(tokens=1, entries=[4], groups=torch.tensor([0])),
    "matrices": dict(tokens=33, features=(63, 130), entries=[1, 8, 17, 3]),
    "a stack": dict(tokens=70, features=(97, 131), entries=[(5, 8)]),
    "ranks of a stack": dict(tokens=40, features=(64, 48), entries=[(6, 16)], ranks=True),
    "stacks and matrices": dict(tokens=50, features=(40, 24), entries=[(3, 8), 5, (2, 16), 1], ranks=True),
    "a large rank": dict(tokens=37, features=(320, 257), entries=[300, 2]),
    "panels and items": dict(tokens=700, features=(70, 40), entries=[5, 3], groups=(torch.arange(700) % 5 == 0) * 1),
    "empty groups": dict(tokens=20, entries=[3] * 9, groups=torch.tensor([7, 2] * 10)),
    "hundreds of groups": dict(tokens=600, features=(16, 24), entries=[(200, 4), *[2] * 150]),
    "a prompt each": dict(leading=(3, 30), features=(64, 48), entries=[3, 5], groups=torch.tensor([1, -1, 0])),
    "several rows each": dict(leading=(4, 3, 2), entries=[4, 3], groups=torch.arange(12).view(4, 3) % 3 - 1),
    "one group": dict(leading=(4, 3, 2), entries=[4, 3, 2], groups=torch.tensor(1)),
}
_NO_GROUPS = {
    "no rows": dict(tokens=0, entries=[4, 3]),
    "one row of none": dict(tokens=1, entries=[4], groups=torch.tensor([-1])),
    "all of none": dict(tokens=9, entries=[4, 3], groups=torch.full((9,), -1)),
    "no features come in": dict(tokens=9, features=(0, 20), entries=[4, 3]),
    "none go out": dict(tokens=9, features=(24, 0), entries=[4, 3]),
    "a stack of none": dict(tokens=50, features=(40, 24), entries=[(3, 8), (0, 2), 1]),
    "no groups": dict(tokens=5, entries=[(0, 8)], groups=torch.full((5,), -1)),
    "groups of no rows": dict(leading=(3, 0), entries=[4, 3], groups=torch.tensor([0, 1, -1])),
}
_TOKENS = [1, 2, 7, 8, 9, 31, 32, 33, 130, 1100]  # few and many: kernels of their own, and groups of few and many rows
_SOME_GROUPS = dict(features=(70, 37), entries=((5, 16), 3, 40))

_SAVED = {"x": ("lora_A", "weight"), "xa": ("lora_B",), "mask": ("x", "lora_A")}
_BOTTLENECK = ("x", "down_weight", "down_bias", "up_weight", "up_bias", "residual")
_SAVED_SIBLINGS = {"x": ("lora_As", "weights"), "xa": ("lora_Bs",), "mask": ("x", "lora_As")}

OPS = {
    op.name: op
    for op in (
        Op(
            "lora_linear",
            lambda **call: [functional.lora_linear(**call)],
            lambda **call: [reference.lora_linear(**call)],
            ("x", "lora_A", "lora_B"),
            partial(linear, bias=True),
            _of_sizes(linear, dict.fromkeys(SIZES + FEW + MANY)),
            _of_sizes(linear, EMPTY),
            ("weight", "bias"),
            _SAVED,
        ),
        Op(
            "lora_delta_",
            lambda y, **call: [functional.lora_delta_(y.clone(), **call)],
            lambda **call: [_plain_delta(**call)],
            ("y", "x", "lora_A", "lora_B"),
            delta,
            _of_sizes(delta, SIZES),
            _of_sizes(delta, EMPTY),
            keeps=_SAVED,
        ),
        Op(
            "lora_linear_siblings",
            lambda **call: functional.lora_linear_siblings(**call),
            lambda **call: reference.lora_linear_siblings(**call),
            ("x", "lora_As", "lora_Bs"),
            siblings,
            _of_sizes(siblings, OF_SIBLINGS),
            _of_sizes(siblings, EMPTY_SIBLINGS),
            ("weights", "biases"),
            _SAVED_SIBLINGS,
        ),
        Op(
            "lora_delta_siblings",
            lambda **call: functional.lora_delta_siblings(**call),
            lambda bases, x, lora_As, lora_Bs, scalings, **dropout: [
                _plain_delta(base, x, *layer, **dropout)
                for base, *layer in zip(bases, lora_As, lora_Bs, scalings, strict=True)
            ],
            ("bases", "x", "lora_As", "lora_Bs"),
            delta_siblings,
            _of_sizes(delta_siblings, OF_SIBLINGS),
            _of_sizes(delta_siblings, EMPTY_SIBLINGS),
            keeps=_SAVED_SIBLINGS,
        ),
        Op(
            "lora_grouped_",
            lambda y, **call: [functional.lora_grouped_(y.clone(), **call)],
            _plain_grouped,
            ("y", "x", "lora_As", "lora_Bs"),
            partial(grouped, ranks=True),
            {name: partial(grouped, **options) for name, options in _GROUPS.items()},
            {name: partial(grouped, **options) for name, options in _NO_GROUPS.items()},
            keeps=_SAVED_SIBLINGS,
        ),
        Op(
            "lora_grouped_linear",
            lambda **call: [functional.lora_grouped_linear(**call)],
            lambda x, weight, bias, **call: _plain_grouped(F.linear(x, weight, bias), x, **call),
            ("x", "lora_As", "lora_Bs"),
            partial(grouped_linear, ranks=True),
            {
                f"{n}, {bias}": partial(grouped_linear, tokens=n, bias=bias, ranks=n % 2 == 1, **_SOME_GROUPS)
                for n in _TOKENS
                for bias in (True, False)
            },
            {name: partial(grouped_linear, **options) for name, options in _NO_GROUPS.items()},
            ("weight", "bias"),
            has_dropout=False,
        ),
        Op(
            "bottleneck",
            lambda **call: [functional.bottleneck(**call)],
            lambda **call: [reference.bottleneck(**call)],
            _BOTTLENECK,
            bottleneck,
            {
                f"{size}, {residual}": partial(bottleneck, size=size, residual=residual, activation="gelu")
                for size in SIZES[2:8:2]  # its products are lora_shrink and lora_expand
                for residual in (True, False)
            }
            | {
                f"{activation}, {bias}": partial(bottleneck, size=(70, 97, 131, 8), activation=activation, bias=bias)
                for activation in ("relu", "silu", "identity")
                for bias in (True, False)
            },
            _of_sizes(bottleneck, EMPTY),
            keeps={"x": ("x", "down_weight"), "xa": _BOTTLENECK},
            has_dropout=False,
        ),
        Op(
            "lora_shrink",
            lambda **call: [torch.ops.lora_ext.lora_shrink(**call)],
            _plain_shrink,
            ("x", "lora_A"),
            shrink,
            _of_sizes(shrink, SIZES),
            _of_sizes(shrink, EMPTY),
            keeps={"x": ("x", "lora_A")},
            has_dropout=False,
        ),
        Op(
            "lora_expand",
            lambda **call: [torch.ops.lora_ext.lora_expand(**call)],
            _plain_expand,
            ("base", "xa", "lora_B", "bias"),
            expand,
            _of_sizes(expand, SIZES),
            _of_sizes(expand, EMPTY),
            keeps={"xa": ("lora_B",)},
            has_dropout=False,
        ),
    )
}
FUNCTIONS = [name for name in OPS if hasattr(functional, name)]


# --- a call of every registered op ------------------------------------------------------------------------------------

HERE = torch.get_default_device()
REGISTERED = sorted(
    name.removeprefix("lora_ext::") for name in torch._C._dispatch_get_all_op_names() if name.startswith("lora_ext::")
)
# lora_merge_check has kernels on CUDA only.
HAVE_KERNELS = [
    name
    for name in REGISTERED
    if torch._C._dispatch_has_kernel_for_dispatch_key(f"lora_ext::{name}", HERE.type.upper())
]
# Suffixes of an op's name for two other ways to call it: merges that round stochastically, and ops that get the outputs
# of base layers in place of their weights.
WITH_DRAWS, OF_BASES = " with draws", " of bases"
HAVE_KERNELS += [f"{name}{WITH_DRAWS}" for name in HAVE_KERNELS if "merge" in name]
HAVE_KERNELS += [
    f"{name}{OF_BASES}" for name in ("lora_linear_backward", "lora_linear_siblings", "lora_linear_siblings_backward")
]


def op_named(name: str) -> torch._ops.OpOverload:
    """Returns a registered op; of :data:`HAVE_KERNELS` also by the name of a form."""
    return _load.op_named(name.partition(" ")[0])


def good_function_call(name: str, **options: Any) -> dict[str, Any]:
    """Returns the arguments of a function of lora_ext.functional by name, with every optional tensor.

    ``options``: of its sample's maker: dtypes, leading, sizes.
    """
    call = _layer_call(name, **options)
    return {argument: call[argument] for argument in inspect.signature(getattr(functional, name)).parameters}


def op_of_function(name: str, call: dict[str, Any]) -> tuple[torch._ops.OpOverload, dict[str, Any]]:
    """Returns the op that a function of lora_ext.functional calls, and its arguments."""
    if name == "lora_delta_siblings":
        return op_named("lora_linear_siblings"), call | {"weights": [], "biases": []}
    return op_named(name), call | ({"bases": []} if name == "lora_linear_siblings" else {})


def good_call(name: str, **options: Any) -> dict[str, Any]:
    """Returns the op's arguments by name, with every optional tensor: 6 tokens, 24 -> 20 (and 12), rank 4 (and 3).

    ``options``: of its sample's maker.
    """
    if name.endswith(WITH_DRAWS):
        call = good_call(name.removesuffix(WITH_DRAWS), **{"dtype": torch.bfloat16} | options)
        return call | {"seeds": [3, -7], "first_rows": [0, 2]}
    if name.endswith(OF_BASES):
        call = good_call(name.removesuffix(OF_BASES), **options)
        bases = delta_siblings(**{"leading": (2, 3)} | options).call["bases"] if "bases" in call else []
        bases = {"weight": None, "weights": [], "biases": [], "bases": bases}
        return call | {argument: value for argument, value in bases.items() if argument in call}
    call = (_merge_call if "merge" in name else _layer_call)(name, **options)
    missing = [argument.name for argument in op_named(name)._schema.arguments if argument.name not in call]
    assert not missing, f"give good_call in tests/support/op_table.py the arguments {missing} of {name}"
    return {argument.name: call[argument.name] for argument in op_named(name)._schema.arguments}


def _layer_call(name: str, **options: Any) -> dict[str, Any]:
    forward = name.removesuffix("_backward")
    if forward == "lora_dropout_mask":
        return {"dropout_p": 0.3, "seed": SEED.clone(), "num_tokens": 5, "in_features": 20}
    groups = {"entries": [(2, 4)], "groups": torch.tensor([[0, -1, 1], [1, 0, -1]]), "ranks": [3, 4]}
    groups = groups if "grouped" in name else {}
    op = OPS[forward if forward in OPS else f"{forward}_"]
    sample = op.small(**{"leading": (2, 3)} | groups | options)
    call = {"ranks": None} | sample.call | {"dropout_p": 0.3, "seed": SEED.clone()}
    if "siblings" in name and "weights" in call:
        call |= {"biases": [_random(W.dtype, len(W)) for W in call["weights"]], "bases": []}
    if forward == name:
        return call
    x = call.get("x", call.get("base"))
    tokens, acc = x.shape[:-1].numel(), accumulation_dtype(x.dtype)
    grads = {"grad_y": sample.grads[0], "grad_ys": sample.grads, "grad_xa": sample.grads[0]}
    ranks = [A.shape[-2] for A in call.get("lora_As", [call.get("lora_A", x)])]
    xa = call.get("xa", torch.randn(tokens, max(ranks) if groups else sum(ranks), dtype=acc))
    base = {"base": x.clone()} if "shrink" in name else {}
    number = 2 if "shrink" in name or "expand" in name else 1 + 2 * len(ranks) if groups else 3
    mask = ops.lora_dropout_mask(SEED, tokens, x.shape[-1], 0.3)
    return call | grads | base | {"xa": xa, "mask": mask, "output_mask": (True,) * number}


def _merge_call(
    name: str, dtype: torch.dtype = torch.float32, shapes: Sequence[tuple[int, int, int]] = ((5, 300, 2), (3, 20, 2))
) -> dict[str, Any]:
    """Makes a call for weights of these rows, columns and ranks."""
    call = packed_layers(dtype, shapes) | {"seeds": [], "first_rows": []}
    if name != "lora_unmerge_":
        return call
    records = merge_all_("test", [weight.clone() for weight in call["weights"]], call["lora_As"], call["lora_Bs"])
    return call | {"words": [record.words for record in records], "corrections": [r.corrections for r in records]}


def all_places() -> list[tuple[str, str, int | None]]:
    """Returns every tensor argument of every op, as parameters of tests."""
    return [(op, name, i) for op in REGISTERED for name, i, _ in tensors_of(good_call(op))]


def subsets(places: list) -> Iterator[list]:
    """Yields every part of the list, except none."""
    for bits in range(1, 1 << len(places)):
        yield [place for i, place in enumerate(places) if bits >> i & 1]
