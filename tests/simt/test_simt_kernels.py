"""Tests the CUDA kernels on the CPU through their launch functions: errors at most as large as plain PyTorch's, every
output written, no report of tests/simt, and the same bits in every order of threads.

The kernels do not compute the base product: weights are zero here, or the outputs hold values to add to.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from itertools import product

import pytest
import torch
from support.layers import (
    Siblings,
    assert_errors_as_plain,
    in_dtypes_of,
    misaligned,
    random_siblings,
    with_rounded_factors,
)
from support.op_table import OPS, of_siblings, results
from torch import Tensor

from lora_ext import reference
from simt import ops
from simt.driver import Library, few_blocks, kernels

pytestmark = [pytest.mark.cpu_only("emulates the CUDA kernels on the CPU"), pytest.mark.full]

SIBLINGS = [1, 3]
SEED = 0x1234_5678_9ABC_DEF0 >> 1
BF16, F16, F32, F64 = torch.bfloat16, torch.float16, torch.float32, torch.float64
MAIN_DTYPES = [(BF16, BF16), (F16, F16)]
OP = OPS["lora_linear_siblings"]


def dtype_name(value) -> str | None:
    return f"{value[0]}-{value[1]}".replace("torch.", "") if isinstance(value, tuple) else None


def wanted_names(output_mask: tuple[bool, bool, bool]) -> str:
    return "".join(name for name, want in zip("xAB", output_mask, strict=True) if want)


def siblings_of(count: int, shape, dtypes) -> Siblings:
    """Returns siblings: one of shape (num_tokens, in_features, out_features, rank), a smaller one, a larger one."""
    num_tokens, in_features, out_features, rank = shape
    sizes = [(out_features, rank), (out_features // 2 + 1, rank // 2 + 1), (out_features + 9, rank + 3)]
    siblings = random_siblings(((num_tokens, in_features), sizes[:count]), dtypes)
    for layer in siblings.layers:
        layer.weight.zero_()
    return siblings


def named(
    ys: list[Tensor], grad_x: Tensor | None = None, grad_As: Sequence[Tensor] = (), grad_Bs: Sequence[Tensor] = ()
) -> dict[str, Tensor]:
    lists = ("result {}", ys), ("grad of lora_As[{}]", grad_As), ("grad of lora_Bs[{}]", grad_Bs)
    found = {name.format(i): tensor for name, tensors in lists for i, tensor in enumerate(tensors)}
    return found | ({} if grad_x is None else {"grad of x": grad_x})


def run_kernels(
    siblings: Siblings,
    dropout_p: float = 0.0,
    schedule: int = 0,
    output_mask: tuple[bool, bool, bool] = (True, True, True),
    add_to: tuple[list[Tensor], Tensor] | None = None,
    library: Library | None = None,
) -> dict[str, Tensor]:
    """Runs forward and backward. add_to: the initial contents of y and grad_x."""
    ys, grad_x = add_to or (None, None)
    forward = ops.lora_forward(siblings, dropout_p, SEED, ys, schedule, library)
    if dropout_p:
        keep = reference.dropout_keep(SEED, *siblings.x.shape, dropout_p)
        assert torch.equal(reference.unpack_mask(forward.mask, siblings.x.shape[1]), keep)
    saved = forward.xa, forward.mask, dropout_p
    backward = ops.lora_backward(siblings, *saved, output_mask, grad_x, schedule, library)
    return named(forward.ys, backward.grad_x, backward.grad_As, backward.grad_Bs)


def run_halves(siblings: Siblings, dropout_p: float, add_to: tuple[list[Tensor], Tensor]) -> dict[str, Tensor]:
    """Does the same by the launches of lora_shrink and lora_expand, and of their backwards."""
    ys, grad_x = add_to
    shrunk = ops.lora_forward(siblings, dropout_p, SEED, parts=["shrink"])
    expanded = ops.lora_forward(siblings, dropout_p, SEED, ys, parts=["expand"], xa=shrunk.xa)
    saved = shrunk.xa, shrunk.mask, dropout_p
    back = ops.lora_backward(siblings, *saved, parts=["expand"])
    rest = ops.lora_backward(siblings, *saved, grad_x=grad_x, parts=["shrink"], grad_xa=back.grad_xa)
    return named(expanded.ys, rest.grad_x, rest.grad_As, back.grad_Bs)


def plain(siblings: Siblings, dropout_p: float, add_to: tuple[list[Tensor], Tensor] | None) -> dict[str, Tensor]:
    sample = of_siblings(siblings).with_dropout(dropout_p, torch.tensor(SEED))
    found = results(OP.plain, sample, OP.leaves(sample))
    added = named(*add_to) if add_to else {}
    return found | {name: found[name] + base.to(found[name].dtype) for name, base in added.items()}


def assert_as_good_as_torch(
    siblings: Siblings, dropout_p: float = 0.0, run=run_kernels, **options
) -> dict[str, Tensor]:
    ours = run(siblings, dropout_p, **options)
    compare(ours, siblings, dropout_p, options.get("add_to"))
    return ours


def compare(ours: dict[str, Tensor], siblings: Siblings, dropout_p: float = 0.0, add_to=None) -> None:
    read, dtype = with_rounded_factors(siblings), siblings.x.dtype
    exact = plain(read.to(torch.float64), dropout_p, add_to)
    expected = in_dtypes_of(plain(read, dropout_p, add_to), ours)
    assert_errors_as_plain([(ours, exact, expected)], dtype, dtype)


@pytest.mark.pairs
@pytest.mark.parametrize("count", SIBLINGS)
@pytest.mark.parametrize("rank", [1, 3, 8, 16, 17, 64, 100, 129])
@pytest.mark.parametrize("dtypes", ops.PAIRS, ids=dtype_name)
def test_dtypes_and_ranks(dtypes, rank, count):
    """Odd ranks with dropout, even ones without."""
    assert_as_good_as_torch(siblings_of(count, (21, 72, 40, rank), dtypes), 0.3 * (rank % 2))


@pytest.mark.parametrize(("rank", "dtypes"), [(1, (BF16, F32)), (35, (F16, F16))], ids=str)
def test_as_many_layers_as_a_call_takes(rank, dtypes):
    """Layers whose ranks begin at an odd column of xa, and one that is larger: it has more partial sums of grad_xa."""
    sizes = [(24 + 600 * (i == 1), rank + i % 2) for i in range(8)]
    siblings = random_siblings(((21, 520), sizes), dtypes)
    for layer in siblings.layers:
        layer.weight.zero_()
    assert_as_good_as_torch(siblings, 0.1)


@pytest.mark.pairs
@pytest.mark.parametrize("count", SIBLINGS)
@pytest.mark.parametrize(
    ("shape", "dropout_p"),
    [
        ((1, 64, 48, 8), 0.3),  # one row
        ((1, 515, 257, 5), 0.0),
        ((7, 5, 3, 2), 0.3),  # less than a vector in every direction
        ((65, 63, 130, 16), 0.5),  # one more or less than a tile
        ((40, 136, 72, 12), 0.1),  # multiples of 8, not of a tile
        ((33, 64, 64, 16), 0.0),
        ((9, 70, 33, 4), 2.0**-16),  # the smallest threshold
    ],
    ids=str,
)
@pytest.mark.parametrize("dtypes", MAIN_DTYPES, ids=dtype_name)
def test_shapes_with_tails(dtypes, shape, dropout_p, count):
    assert_as_good_as_torch(siblings_of(count, shape, dtypes), dropout_p)


@pytest.mark.parametrize(
    ("shape", "dropout_p"),
    [
        ((150, 424, 296, 20), 0.1),  # several tiles in every direction
        ((5, 1800, 1300, 16), 0.1),  # few tokens: the sums over features are split
        ((600, 40, 24, 4), 0.0),  # many tokens: the sums over tokens are split
    ],
    ids=str,
)
@pytest.mark.parametrize("dtypes", [*MAIN_DTYPES, (BF16, F32)], ids=dtype_name)
def test_shapes_that_many_blocks_share(dtypes, shape, dropout_p):
    assert_as_good_as_torch(siblings_of(1, shape, dtypes), dropout_p)


@pytest.mark.pairs
@pytest.mark.parametrize("aligned", [True, False], ids=["aligned", "misaligned"])
@pytest.mark.parametrize("rank", [12, 40, 140])
@pytest.mark.parametrize("dtypes", [*MAIN_DTYPES, (BF16, F32)], ids=dtype_name)
def test_pipelines_go_round(dtypes, rank, aligned):
    """Every block has more steps than its pipeline has stages; the last step has a tail."""
    siblings = siblings_of(1, (400, 840, 600, rank), dtypes)
    if not aligned:
        (layer,) = siblings.layers
        layer = replace(layer, x=misaligned(layer.x), grad_y=misaligned(layer.grad_y))
        siblings = Siblings(layer.x, [layer])
    assert_as_good_as_torch(siblings, 0.1, library=few_blocks())


@pytest.mark.parametrize("in_features", [840, 71], ids=["aligned", "misaligned"])
@pytest.mark.parametrize("rank", [8, 20, 40, 130])
@pytest.mark.parametrize("dtypes", [(BF16, F32), (F16, F32), (BF16, F64), (F16, BF16)], ids=dtype_name)
def test_factors_of_another_dtype_are_rounded_as_they_are_read(dtypes, rank, in_features):
    """The results are those of factors that were rounded before, halfway cases included, to the bit."""
    siblings = siblings_of(2, (37, in_features, 136, rank), dtypes)
    for layer in siblings.layers:
        for factor in (layer.lora_A, layer.lora_B):
            steps = torch.arange(factor.shape[1]) % 4 + 0.5
            factor[0] = 1 + torch.finfo(dtypes[0]).eps * steps
    found = run_kernels(siblings, 0.1, library=few_blocks())
    for name, expected in run_kernels(with_rounded_factors(siblings), 0.1, library=few_blocks()).items():
        if "lora_" in name and dtypes[1].itemsize == 2:
            continue  # the gradient is rounded to another dtype
        assert torch.equal(found[name].to(expected.dtype), expected), name


ZEROS = {
    "first layer": ((21, 72), ((0, 4), (40, 20), (33, 3))),
    "middle layer": ((21, 72), ((40, 40), (0, 4), (33, 3))),
    "last layer": ((21, 72), ((40, 20), (33, 3), (0, 40))),
    "all layers": ((21, 72), ((0, 4), (0, 40))),
    "no features come in": ((21, 0), ((0, 4), (40, 20))),
    "no tokens": ((0, 72), ((40, 20), (33, 3))),
}


@pytest.mark.pairs
@pytest.mark.parametrize("output_mask", [m for m in product([True, False], repeat=3) if any(m)], ids=wanted_names)
@pytest.mark.parametrize("shape", ZEROS)
@pytest.mark.parametrize("dtypes", MAIN_DTYPES, ids=dtype_name)
def test_sizes_of_zero(dtypes, shape, output_mask):
    """Empty tensors have null addresses, as in torch; kernels decide nothing by them."""
    siblings = random_siblings(ZEROS[shape], dtypes)
    for layer in siblings.layers:
        layer.weight.zero_()
    for dropout_p in (0.0, 0.3):
        found = assert_as_good_as_torch(siblings, dropout_p, output_mask=output_mask)
        assert ("grad of lora_Bs[1]" in found) == output_mask[2]


@pytest.mark.parametrize(
    "view",
    [
        lambda wide: wide[:, :72],  # gaps between rows that are still aligned
        lambda wide: wide[:, 8:80],
        lambda wide: wide[:, 1:73],  # every row misaligned
        lambda wide: wide.flatten()[3 : 3 + 40 * 79].view(40, 79)[:, :71],  # an odd stride: rows differ in alignment
        lambda wide: wide[::2, :72],
        lambda wide: wide[:1].expand(40, 88)[:, :72],  # all rows are one
    ],
    ids=["aligned", "offset", "misaligned", "odd stride", "every other row", "one row"],
)
@pytest.mark.parametrize("dtypes", MAIN_DTYPES, ids=dtype_name)
def test_x_and_grad_y_of_any_strides(dtypes, view):
    x, grad_y = view(torch.randn(80, 88).to(dtypes[0])), view(torch.randn(80, 88).to(dtypes[0]))
    siblings = siblings_of(1, (x.shape[0], x.shape[1], grad_y.shape[1], 9), dtypes)
    siblings = Siblings(x, [replace(layer, x=x, grad_y=grad_y) for layer in siblings.layers])
    assert_as_good_as_torch(siblings, 0.3)


@pytest.mark.parametrize("count", SIBLINGS)
@pytest.mark.parametrize("dtypes", MAIN_DTYPES, ids=dtype_name)
def test_adds_to_what_is_there(dtypes, count):
    siblings = siblings_of(count, (37, 80, 50, 6), dtypes)
    ys = [torch.randn_like(layer.grad_y) for layer in siblings.layers]
    assert_as_good_as_torch(siblings, 0.3, add_to=(ys, torch.randn_like(siblings.x)))


@pytest.mark.pairs
@pytest.mark.parametrize("count", SIBLINGS)
@pytest.mark.parametrize("dtypes", [*MAIN_DTYPES, (BF16, F32)], ids=dtype_name)
@pytest.mark.parametrize(
    "output_mask",
    [(True, False, False), (False, True, False), (False, False, True), (True, True, False), (True, False, True)]
    + [(False, True, True)],
    ids=wanted_names,
)
def test_only_wanted_gradients(output_mask, dtypes, count):
    """Arguments that only unwanted gradients read are null."""
    siblings = siblings_of(count, (37, 80, 50, 6), dtypes)
    found = assert_as_good_as_torch(siblings, 0.3, output_mask=output_mask)
    names = zip(("grad of x", "grad of lora_As[0]", "grad of lora_Bs[0]"), output_mask, strict=True)
    assert all((name in found) == want for name, want in names)


@pytest.mark.pairs
@pytest.mark.parametrize("blocks", ["many blocks", "few blocks"])
@pytest.mark.parametrize(
    ("shape", "count"), [((70, 264, 136, 20), max(SIBLINGS)), ((3, 900, 130, 5), 1), ((300, 24, 16, 17), 1)], ids=str
)
@pytest.mark.parametrize("dtypes", MAIN_DTYPES, ids=dtype_name)
def test_same_bits_in_every_order_of_threads(dtypes, shape, count, blocks):
    library = few_blocks() if blocks == "few blocks" else kernels()
    siblings = siblings_of(count, shape, dtypes)
    first = run_kernels(siblings, 0.1, library=library)
    for schedule in (1, 2):
        for name, result in run_kernels(siblings, 0.1, schedule, library=library).items():
            assert torch.equal(result, first[name]), f"{name} in schedule {schedule}"


def offset(tensor: Tensor) -> Tensor:
    """Copies a tensor to a contiguous one that is not aligned to 16 bytes."""
    return torch.cat([tensor.new_empty(1), tensor.flatten()])[1:].view(tensor.shape)


@pytest.mark.pairs
@pytest.mark.parametrize("aligned", [True, False], ids=["aligned", "misaligned"])
@pytest.mark.parametrize("dtypes", ops.PAIRS, ids=dtype_name)
@pytest.mark.parametrize(
    "shape", [(1, 64, 8), (7, 5, 3), (33, 130, 17), (70, 515, 8), (40, 257, 100), (20, 136, 40)], ids=str
)
def test_shrink_and_expand_alone(shape, dtypes, aligned):
    """They add to tensors that they do not write."""
    tokens, features, rank = shape
    siblings = siblings_of(1, (tokens, features, features, rank), dtypes)
    (layer,) = siblings.layers
    base, grad_x = torch.randn_like(layer.x), torch.randn_like(layer.x)
    if not aligned:
        rows = dict(x=misaligned(layer.x), grad_y=misaligned(layer.grad_y), bias=offset(layer.bias))
        layer, base = replace(layer, **rows), offset(base)
    siblings = Siblings(layer.x, [layer])
    assert_as_good_as_torch(siblings, 0.1, run=run_halves, add_to=([base], grad_x))


@pytest.mark.parametrize("dtypes", MAIN_DTYPES, ids=dtype_name)
def test_only_wanted_gradients_of_shrink_and_expand(dtypes):
    """The others do not change, to the bit; those of an expand, which another kernel computes, up to rounding."""
    siblings, xa, grad_xa = siblings_of(1, (33, 130, 130, 17), dtypes), torch.randn(33, 17), torch.randn(33, 17)
    shrink = partial(ops.lora_backward, siblings, xa, parts=["shrink"], grad_xa=grad_xa)
    expand = partial(ops.lora_backward, siblings, xa, parts=["expand"])
    only_x, only_A, only_B = (True, False, False), (False, True, False), (False, False, True)
    for base in (torch.randn_like(siblings.x), torch.zeros_like(siblings.x)):
        both = shrink(grad_x=base)
        assert torch.equal(shrink(output_mask=only_x, grad_x=base).grad_x, both.grad_x)
        assert torch.equal(shrink(output_mask=only_A).grad_As[0], both.grad_As[0])
    assert torch.equal(shrink(output_mask=only_x).grad_x, both.grad_x)  # without a base, as with one of zeros
    both = expand()
    torch.testing.assert_close(expand(output_mask=only_x).grad_xa, both.grad_xa)
    torch.testing.assert_close(expand(output_mask=only_B).grad_Bs, both.grad_Bs)


@pytest.mark.parametrize(("num_tokens", "rank"), [(3, 5), (20, 35), (3, 71)])
def test_infinite_factors_of_one_layer_leave_the_others_as_they_are(num_tokens, rank):
    siblings = siblings_of(3, (num_tokens, 600, 40, rank), (BF16, BF16))
    expected = run_kernels(siblings)
    for factor in (siblings.layers[1].lora_A, siblings.layers[1].lora_B):
        factor.fill_(torch.inf)
    found = run_kernels(siblings)
    others = {name for name in found if "1" not in name and name != "grad of x"}
    assert len(others) == 6 and all(torch.equal(found[name], expected[name]) for name in others)
    assert not found["result 1"].isfinite().any()


@pytest.mark.parametrize("schedule", [0, 1])
@pytest.mark.parametrize(("num_tokens", "in_features"), [(0, 8), (1, 1), (37, 200), (3, 1000)])
def test_dropout_mask(num_tokens, in_features, schedule):
    mask = ops.dropout_mask(SEED, num_tokens, in_features, 0.25, schedule)
    keep = reference.dropout_keep(SEED, num_tokens, in_features, 0.25)
    assert torch.equal(reference.unpack_mask(mask, in_features), keep)


# --- few tokens: base layers and adapters in one read of the weights --------------------------------------------------


def run_few_tokens(siblings: Siblings, dropout_p: float = 0.0, **options) -> dict[str, Tensor]:
    forward = ops.lora_forward(siblings, dropout_p, SEED, streams=True, **options)
    alone = ops.lora_forward(siblings, dropout_p, SEED, **options)
    torch.testing.assert_close(forward.xa, alone.xa)  # what the backward reads
    assert (forward.mask is None) == (alone.mask is None)
    return named(forward.ys)


@pytest.mark.pairs
@pytest.mark.parametrize("sizes", [[(40, 8)], [(33, 5), (16, 64), (130, 1)]], ids=["one", "three"])
@pytest.mark.parametrize(
    ("tokens", "in_features", "dropout_p"),
    [(1, 64, 0.0), (3, 72, 0.3), (8, 520, 0.0), (9, 8, 0.0), (16, 840, 0.3), (17, 136, 0.0), (32, 64, 0.0)],
)
@pytest.mark.parametrize("dtypes", [*MAIN_DTYPES, (BF16, F32)], ids=dtype_name)
def test_few_tokens(dtypes, tokens, in_features, dropout_p, sizes):
    siblings = random_siblings(((tokens, in_features), sizes), dtypes)
    ours = run_few_tokens(siblings, dropout_p)
    compare(ours, siblings, dropout_p)
    if dtypes[0] != dtypes[1]:
        rounded_before = run_few_tokens(with_rounded_factors(siblings), dropout_p)
        assert all(torch.equal(ours[name], y) for name, y in rounded_before.items())


@pytest.mark.parametrize("dtypes", MAIN_DTYPES, ids=dtype_name)
@pytest.mark.parametrize("sizes", [[(96, 8)], [(30, 5), (50, 64)]], ids=["one", "two"])
@pytest.mark.parametrize("tokens", [3, 9, 20])
def test_larger_blocks_that_save_a_wave(tokens, sizes, dtypes):
    siblings = random_siblings(((tokens, 600), sizes), dtypes)
    ops.lora_forward(siblings, library=few_blocks(), streams=True)
    rows = 32 if tokens <= 8 else 48
    assert few_blocks().launches()[-1].blocks == sum(-(-out_features // rows) for out_features, _ in sizes)
    compare(run_few_tokens(siblings, library=few_blocks()), siblings)


@pytest.mark.parametrize("tokens", [1, 20])
def test_weights_and_x_with_gaps_between_rows(tokens):
    (layer,) = random_siblings(((tokens, 72), [(40, 8)]), (BF16, BF16)).layers
    wide, wide_x = torch.randn(40, 88).to(BF16), torch.randn(tokens, 80).to(BF16)
    layer = replace(layer, weight=wide[:, 8:80], x=wide_x[:, :72])
    siblings = Siblings(layer.x, [layer])
    compare(run_few_tokens(siblings), siblings)


@pytest.mark.parametrize("library", [kernels, few_blocks])
def test_same_bits_of_few_tokens_in_every_order_of_threads(library):
    siblings = random_siblings(((5, 600), [(40, 8), (70, 3)]), (BF16, BF16))
    first = run_few_tokens(siblings, 0.1, library=library())
    for schedule in (1, 2):
        again = run_few_tokens(siblings, 0.1, library=library(), schedule=schedule)
        assert all(torch.equal(first[name], y) for name, y in again.items())


@pytest.mark.parametrize(
    ("what", "shape"),
    [("tokens", (33, 64, 40, 8)), ("columns", (4, 60, 40, 8)), ("rank", (4, 64, 40, 65)), ("rows", (4, 64, 0, 8))],
)
def test_other_shapes_go_to_the_library(what, shape):
    tokens, in_features, *size = shape
    with pytest.raises(AssertionError, match="does not take this"):
        run_few_tokens(random_siblings(((tokens, in_features), [size]), (BF16, BF16)))
