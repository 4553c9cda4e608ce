"""Tests the CUDA kernels on the CPU, through their bindings: errors at most as large as plain PyTorch's, every output
written, no report of tests/simt, and the same bits in every order of threads.

Layers of base outputs read what they add to; for those of weights, the binding adds the base product afterwards, except
for few tokens, whose kernel reads the weights.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable
from dataclasses import replace
from functools import partial

import pytest
import torch
from support import op_table
from support.layers import DTYPES, dtypes_id, misaligned
from support.op_table import LAYOUTS, OPS, SEED, Dtypes, Sample, assert_bits, good_call, with_entry
from torch import Tensor

from simt.driver import FEW_SMS, SMS, Emulated, check, run

pytestmark = [pytest.mark.cpu_only("emulates the CUDA kernels on the CPU"), pytest.mark.full]

BF16, F16, F32, F64 = torch.bfloat16, torch.float16, torch.float32, torch.float64
PAIRS = [pair for pair in DTYPES if pair[0].itemsize == 2]  # of x and of the factors
MAIN, DEFAULT = [(BF16, BF16), (F16, F16)], (BF16, F32)
OF_WEIGHTS, OF_BASES = "lora_linear_siblings", "lora_delta_siblings"
# The other ops call the kernels of these.
HAVE_KERNELS = (OF_WEIGHTS, OF_BASES, "lora_grouped_", "lora_shrink", "lora_expand")
with_pairs = pytest.mark.pairs
each_count = pytest.mark.parametrize("count", [1, 3])
main_dtypes = pytest.mark.parametrize("dtypes", MAIN, ids=dtypes_id)
all_dtypes = pytest.mark.parametrize("dtypes", [*MAIN, DEFAULT], ids=dtypes_id)


def layers(count: int, shape) -> Callable[[Dtypes], Sample]:
    """Returns a maker of layers: one of (num_tokens, in_features, out_features, rank), a smaller and a larger one."""
    num_tokens, in_features, out_features, rank = shape
    sizes = [(out_features, rank), (out_features // 2 + 1, rank // 2 + 1), (out_features + 9, rank + 3)]
    return partial(op_table.delta_siblings, size=((num_tokens, in_features), sizes[:count]))


def changed(make: Callable[[Dtypes], Sample], change: Callable[[Tensor], Tensor], names: tuple[str, ...] = ("x",)):
    """Returns a maker of samples with other strides of the arguments and of the results' gradients."""

    def made(dtypes: Dtypes) -> Sample:
        sample = make(dtypes)
        call = sample.call | {n: change(sample.call[n]) for n in names if sample.call.get(n) is not None}
        return Sample(call, [change(grad) for grad in sample.grads])

    return made


# --- values and gradients ---------------------------------------------------------------------------------------------


@with_pairs
@pytest.mark.parametrize("dropout_p", [0.0, 0.3])
@main_dtypes
@pytest.mark.parametrize(
    ("name", "sample"),
    [
        (name, sample)
        for name in HAVE_KERNELS
        for sample in OPS[name].samples
        if not sample.endswith(("(130, 3)))", "hundreds of groups"))  # take seconds
    ],
)
def test_values_and_gradients(name, sample, dtypes, dropout_p):
    check(name, OPS[name].samples[sample], dtypes, dropout_p)


@with_pairs
@each_count
@pytest.mark.parametrize("rank", [1, 3, 8, 16, 17, 64, 100, 129])
@pytest.mark.parametrize("dtypes", PAIRS, ids=dtypes_id)
def test_dtypes_and_ranks(dtypes, rank, count):
    """Odd ranks with dropout, even ones without."""
    check(OF_BASES, layers(count, (21, 72, 40, rank)), dtypes, 0.3 * (rank % 2))


@pytest.mark.parametrize(("rank", "dtypes"), [(1, DEFAULT), (35, (F16, F16))], ids=str)
def test_as_many_layers_as_a_call_takes(rank, dtypes):
    """Layers whose ranks begin at an odd column of xa, and one that is larger: it has more partial sums of grad_xa."""
    sizes = [(24 + 600 * (i == 1), rank + i % 2) for i in range(8)]
    check(OF_BASES, partial(op_table.delta_siblings, size=((21, 520), sizes)), dtypes, 0.1)


@pytest.mark.parametrize(
    ("shape", "dropout_p"),
    [
        ((150, 424, 296, 20), 0.1),  # several tiles in every direction
        ((5, 1800, 1300, 16), 0.1),  # few tokens: the sums over features are split
        ((600, 40, 24, 4), 0.0),  # many tokens: the sums over tokens are split
        ((65, 63, 130, 16), 0.5),  # one more or less than a tile
        ((40, 136, 72, 12), 0.1),  # multiples of 8, not of a tile
        ((9, 70, 33, 4), 2.0**-16),  # the smallest threshold
    ],
    ids=str,
)
@all_dtypes
def test_more_shapes(dtypes, shape, dropout_p):
    check(OF_BASES, layers(1, shape), dtypes, dropout_p)


@with_pairs
@pytest.mark.parametrize("is_aligned", [True, False], ids=["aligned", "misaligned"])
@pytest.mark.parametrize("rank", [12, 40, 140])
@all_dtypes
def test_pipelines_go_round(dtypes, rank, is_aligned):
    """Every block has more steps than its pipeline has stages; the last step has a tail."""
    make = partial(op_table.delta, size=(400, 840, 600, rank))
    check("lora_delta_", make if is_aligned else changed(make, misaligned), dtypes, 0.1, sms=FEW_SMS)


@pytest.mark.parametrize("in_features", [840, 71], ids=["aligned", "misaligned"])
@pytest.mark.parametrize("rank", [8, 20, 40, 130])
@pytest.mark.parametrize("dtypes", [(BF16, F32), (F16, F32), (BF16, F64), (F16, BF16)], ids=dtypes_id)
def test_factors_of_another_dtype_are_rounded_as_they_are_read(dtypes, rank, in_features):
    """The results are those of factors that were rounded before, halfway cases included, to the bit."""
    sample = layers(2, (37, in_features, 136, rank))(dtypes).with_dropout(0.1)
    for factor in sample.call["lora_As"] + sample.call["lora_Bs"]:
        factor[0] = 1 + torch.finfo(dtypes[0]).eps * (torch.arange(factor.shape[1]) % 4 + 0.5)
    found = run(OF_BASES, sample, sms=FEW_SMS)
    with Emulated():
        rounded = sample.as_read(dtypes[0])
    for name, expected in run(OF_BASES, rounded, sms=FEW_SMS).items():
        if "lora_" in name and dtypes[1].itemsize == 2:
            continue  # the gradient is rounded to another dtype
        assert torch.equal(found[name].to(expected.dtype), expected), name


@pytest.mark.parametrize("name", OPS)
@main_dtypes
def test_sizes_of_zero(dtypes, name):
    """Empty tensors have null addresses, as in torch; kernels decide nothing by them."""
    for number, make in enumerate(OPS[name].empty.values()):
        for names in (None, *((trained,) for trained in OPS[name].trained)):
            check(name, make, dtypes, 0.3 * (number % 2), names)


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
@main_dtypes
def test_x_and_grad_y_of_any_strides(dtypes, view):
    shape = tuple(view(torch.empty(80, 88)).shape)
    make = partial(op_table.delta, size=(*shape, shape[1], 9))
    check("lora_delta_", changed(make, lambda tensor: view(torch.randn(80, 88).to(tensor.dtype))), dtypes, 0.3)


@all_dtypes
@pytest.mark.parametrize("name", HAVE_KERNELS)
def test_only_wanted_gradients(name, dtypes):
    """Arguments that only unwanted gradients read are null."""
    make = OPS[name].samples["a prompt each"] if "grouped" in name else list(OPS[name].samples.values())[5]
    wanted = [trained for trained in OPS[name].trained if trained not in ("y", "bases", "base", "bias")]
    for names in itertools.chain(*(itertools.combinations(wanted, n) for n in (1, 2))):
        check(name, make, dtypes, 0.3, names)


IN_EVERY_ORDER: dict[str, tuple[str, Callable[[Dtypes], Sample]]] = {
    "three layers": (OF_BASES, layers(3, (70, 264, 136, 20))),
    "few rows of many": (OF_BASES, layers(1, (3, 900, 130, 5))),
    "many tokens": (OF_BASES, layers(1, (300, 24, 16, 17))),
    "few tokens": (OF_WEIGHTS, partial(op_table.siblings, size=((5, 600), [(40, 8), (70, 3)]))),
} | {
    f"{n} rows of groups": (
        "lora_grouped_",
        partial(
            op_table.grouped, tokens=n, features=(140, 70), entries=[8, (2, 3)], groups=(torch.arange(n) > 514) * 2
        ),
    )
    for n in (20, 530)
}


@with_pairs
@pytest.mark.parametrize("sms", [SMS, FEW_SMS])
@pytest.mark.parametrize("what", IN_EVERY_ORDER)
@main_dtypes
def test_same_bits_in_every_order_of_threads(dtypes, what, sms):
    name, make = IN_EVERY_ORDER[what]
    sample = make(dtypes).with_dropout(0.1)
    first = run(name, sample, sms=sms)
    for schedule in (1, 2):
        assert_bits(run(name, sample, sms=sms, schedule=schedule), first)


@with_pairs
@pytest.mark.parametrize("dtypes", PAIRS, ids=dtypes_id)
@pytest.mark.parametrize(
    "shape", [(1, 64, 8), (7, 5, 3), (33, 130, 17), (70, 515, 8), (40, 257, 100), (20, 136, 40)], ids=str
)
@pytest.mark.parametrize("name", ["lora_shrink", "lora_expand"])
def test_shrink_and_expand_of_misaligned_tensors(name, shape, dtypes):
    """They add to tensors that they do not write."""
    tokens, features, rank = shape
    make = partial(getattr(op_table, name.removeprefix("lora_")), size=(tokens, features, features, rank))
    change = misaligned if name == "lora_shrink" else LAYOUTS["unaligned"]
    for names in [("x",)] if name == "lora_shrink" else [("base",), ("bias",)]:
        check(name, changed(make, change, names), dtypes)


@pytest.mark.parametrize(("num_tokens", "rank"), [(3, 5), (20, 35), (3, 71)])
def test_infinite_factors_of_one_layer_leave_the_others_as_they_are(num_tokens, rank):
    sample = layers(3, (num_tokens, 600, 40, rank))((BF16, BF16))
    expected = run(OF_BASES, sample)
    for name in ("lora_As", "lora_Bs"):
        infinite = torch.full_like(sample.call[name][1], torch.inf)
        sample = replace(sample, call=with_entry(sample.call, name, 1, infinite))
    found = run(OF_BASES, sample)
    others = {name for name in found if "1" not in name and name != "grad of x"}
    assert len(others) == 8 and all(torch.equal(found[name], expected[name]) for name in others)
    assert not found["result 1"].isfinite().any()


@pytest.mark.parametrize("schedule", [0, 1])
@pytest.mark.parametrize(("num_tokens", "in_features"), [(0, 8), (1, 1), (37, 200), (3, 1000)])
def test_dropout_mask(num_tokens, in_features, schedule):
    arguments = SEED, num_tokens, in_features, 0.25
    with Emulated(schedule=schedule):
        mask = torch.ops.lora_ext.lora_dropout_mask(*arguments)
    assert torch.equal(mask, torch.ops.lora_ext.lora_dropout_mask(*arguments))


# --- few tokens: base layers and adapters in one read of the weights --------------------------------------------------


def last_launch(gpu: Emulated, number: int = 0):
    return gpu.calls[number][1][-1]


@with_pairs
@pytest.mark.parametrize("sizes", [[(40, 8)], [(33, 5), (16, 64), (130, 1)]], ids=["one", "three"])
@pytest.mark.parametrize(
    ("tokens", "in_features", "dropout_p"),
    [(1, 64, 0.0), (3, 72, 0.3), (8, 520, 0.0), (9, 8, 0.0), (16, 840, 0.3), (17, 136, 0.0), (32, 64, 0.0)],
)
@all_dtypes
def test_few_tokens(dtypes, tokens, in_features, dropout_p, sizes):
    make = partial(op_table.siblings, size=((tokens, in_features), sizes))
    gpu = check(OF_WEIGHTS, make, dtypes, dropout_p)
    assert last_launch(gpu).kernel == "few_tokens"
    if dtypes[0] != dtypes[1]:
        with gpu:
            sample = make(dtypes)
            rounded = sample.as_read(dtypes[0])
        assert_bits(run(OF_WEIGHTS, sample, ()), run(OF_WEIGHTS, rounded, ()))


@main_dtypes
@pytest.mark.parametrize("sizes", [[(96, 8)], [(30, 5), (50, 64)]], ids=["one", "two"])
@pytest.mark.parametrize("tokens", [3, 9, 20])
def test_larger_blocks_that_save_a_wave(tokens, sizes, dtypes):
    gpu = check(OF_WEIGHTS, partial(op_table.siblings, size=((tokens, 600), sizes)), dtypes, sms=FEW_SMS)
    rows = 32 if tokens <= 8 else 48
    assert last_launch(gpu).blocks == sum(-(-out_features // rows) for out_features, _ in sizes)


@pytest.mark.parametrize("tokens", [1, 20])
def test_weights_and_x_with_gaps_between_rows(tokens):
    def with_gaps(tensor: Tensor) -> Tensor:
        return torch.cat([tensor[:, :8], tensor, tensor[:, :8]], dim=1)[:, 8:-8]

    make = changed(partial(op_table.linear, size=(tokens, 72, 40, 8)), with_gaps, ("x", "weight"))
    assert last_launch(check("lora_linear", make, (BF16, BF16))).kernel == "few_tokens"


@pytest.mark.parametrize(
    ("what", "shape"),
    [("tokens", (33, 64, 40, 8)), ("columns", (4, 60, 40, 8)), ("rank", (4, 64, 40, 65)), ("rows", (4, 64, 0, 8))],
)
def test_other_shapes_go_to_the_library(what, shape):
    gpu = check("lora_linear", partial(op_table.linear, size=shape), (BF16, BF16))
    assert all(launch.kernel != "few_tokens" for _, launches in gpu.calls for launch in launches)


# --- bindings ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [F32, F64, BF16, F16], ids=str)
@pytest.mark.parametrize(
    "op", [op for op in op_table.HAVE_KERNELS if "merge" not in op and op != "lora_grouped_linear"]
)
def test_every_op_does_what_it_does_on_the_cpu(op, dtype):
    """Wide dtypes take plain PyTorch, others a launch. Also a changed argument is the same."""
    call, found = good_call(op, **({} if "mask" in op else {"dtypes": (dtype, dtype)})), []
    for device in (gpu := Emulated(), torch.no_grad()):
        given = {name: value.clone() if name == "y" else value for name, value in call.items()}
        with device:
            found.append((op_table.op_named(op)(**given), given.get("y")))
    assert bool(gpu.calls[-1][1]) == (dtype.itemsize == 2 or "mask" in op)
    torch.testing.assert_close(*found, rtol=0, atol=200 * torch.finfo(dtype).eps if dtype.itemsize > 2 else 0.05)
