"""Values and gradients of all ops against float64 and plain PyTorch, over the samples of support.op_table.

New tensors and the kernels' scratch memory hold NaN before each call, and so does all memory around the arguments. So
memory which is read before it is written, or beside an argument, and results that are not written, show.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator
from functools import partial

import pytest
import torch
from fuzz.worker import is_sanitized
from support import op_table
from support.layers import DTYPES, QUICK, dtypes_id, of_dtypes, rounds_factors, with_threads
from support.op_table import (
    DOUBLE,
    FLOAT,
    FUNCTIONS,
    LAYOUTS,
    OPS,
    SEED,
    Op,
    Sample,
    assert_as_good_as_plain,
    assert_bits,
    entry_of,
    every_second,
    one_by_one,
    results,
    subsets,
    tensors_of,
    with_entry,
)
from support.properties import given, settings, st
from torch import Tensor, nn

each_op = pytest.mark.parametrize("op", OPS.values(), ids=OPS)
with_dropout = pytest.mark.parametrize("dropout_p", [0.0, 0.3])
BFLOAT16 = (torch.bfloat16, torch.bfloat16)
MIDDLE = 6  # of an op's samples: some sizes beyond a block, for tests of one
# Not in make test-quick: the ops, and the samples of any op.
SOMETIMES = ("lora_delta_", "lora_linear_siblings", "lora_delta_siblings", "bottleneck", "hundreds of groups")


@functools.cache
def of_nan() -> Sample:
    sample = op_table.siblings(size=((64, 200), ((300, 20), (300, 20), (300, 20)))).with_dropout(0.3)
    sample.call["x"].fill_(torch.nan)
    return sample


@pytest.fixture
def _poisoned() -> Iterator[None]:
    torch.use_deterministic_algorithms(True)  # fills new tensors with NaN
    try:
        OPS["lora_linear_siblings"].results(of_nan())
        yield
    finally:
        torch.use_deterministic_algorithms(False)


def amid_nan(sample: Sample) -> Sample:
    """Places each tensor in the middle of NaN."""

    def placed(tensor: Tensor) -> Tensor:
        memory = tensor.new_full((tensor.numel() + 128,), torch.nan if tensor.is_floating_point() else -7)
        return memory[64:-64].view(tensor.shape).copy_(tensor)

    return sample.mapped(placed)


@pytest.mark.full(but=3)
@pytest.mark.pairs
@pytest.mark.usefixtures("_poisoned")
@with_dropout
@of_dtypes
@pytest.mark.parametrize(
    ("name", "sample"),
    [
        pytest.param(name, sample, marks=[pytest.mark.full] * (name in SOMETIMES or sample in SOMETIMES))
        for name, op in OPS.items()
        for sample in op.samples
    ],
)
def test_values_and_gradients(name, sample, dtypes, dropout_p):
    make = OPS[name].samples[sample]
    amid = (lambda sample: sample) if is_sanitized() else amid_nan  # a sanitizer sees the memory around by itself
    assert_as_good_as_plain(OPS[name], lambda dtypes: amid(make(dtypes)), dtypes, dropout_p)


@pytest.mark.usefixtures("_poisoned")
@pytest.mark.full
@pytest.mark.parametrize("dtypes", QUICK, ids=dtypes_id)
@each_op
def test_sizes_of_zero(op, dtypes):
    """An empty tensor has a null pointer, which must not mean "no tensor", whichever gradients are wanted."""
    for make in op.empty.values():
        for dropout_p in (0.0, 0.3) if op.has_dropout else (0.0,):
            for names in (op.trained, *((name,) for name in op.trained)):
                assert_as_good_as_plain(op, make, dtypes, dropout_p, names=names)


@pytest.mark.full
@pytest.mark.pairs
@with_dropout
@pytest.mark.parametrize("dtypes", [FLOAT, BFLOAT16], ids=["float32-float32", "bfloat16-bfloat16"])
@pytest.mark.parametrize("rank", [1, 2, 3, 15, 16, 17, 31, 32, 33, 48, 63, 64, 65, 100, 128, 129, 255, 256])
@pytest.mark.parametrize("name", ["lora_linear", "lora_grouped_"])
def test_ranks(name, rank, dtypes, dropout_p):
    """Ranks on both sides of whole vectors, tiles and panels; more rows than a panel, and columns than a piece."""
    if name == "lora_linear":
        make = partial(op_table.linear, size=(300, 97, 300, rank))
    else:
        make = partial(op_table.grouped, tokens=300, features=(97, 300), entries=[rank, 1])
    assert_as_good_as_plain(OPS[name], make, dtypes, dropout_p)


@pytest.mark.full
@settings(max_examples=60, deadline=None)
@given(
    name=st.sampled_from(["lora_linear", "lora_linear_siblings"]),
    tokens=st.tuples(st.integers(1, 70), st.integers(1, 300)),
    layers=st.lists(st.tuples(st.integers(1, 200), st.integers(1, 40)), min_size=1, max_size=8),
    dtypes=st.sampled_from(DTYPES),
    dropout_p=st.sampled_from([0.0, 0.1, 0.5]),
    seed=st.integers(0, 2**63 - 1),
)
def test_any_size(name, tokens, layers, dtypes, dropout_p, seed):
    torch.manual_seed(seed)

    def make(dtypes):
        if name == "lora_linear":
            return op_table.linear(dtypes, size=(*tokens, *layers[0]))
        return op_table.siblings(dtypes, size=(tokens, tuple(layers)))

    assert_as_good_as_plain(OPS[name], make, dtypes, dropout_p, torch.tensor(seed))


# --- bits -------------------------------------------------------------------------------------------------------------


@pytest.mark.pairs
@with_dropout
@of_dtypes
@pytest.mark.parametrize("size", op_table.OF_SIBLINGS, ids=str)
@pytest.mark.parametrize("name", ["lora_linear_siblings", "lora_delta_siblings"])
def test_layers_together_have_the_bits_of_one_by_one(name, size, dtypes, dropout_p):
    """Except the gradient of x, whose sum over the layers is rounded less often; of one layer, it too."""
    op = OPS[name]
    sample = op.samples[str(size)](dtypes).with_dropout(dropout_p)
    leaves = op.leaves(sample)
    but = "" if len(size[1]) == 1 else "grad of x"
    assert_bits(results(op.run, sample, leaves), results(one_by_one, sample, leaves), but)


@each_op
def test_runs_repeat_to_the_bit(op):
    sample = list(op.samples.values())[MIDDLE](FLOAT).with_dropout(0.1 if op.has_dropout else 0.0)
    assert_bits(op.results(sample), op.results(sample))


@each_op
def test_wider_factors_have_the_bits_of_rounded_ones(op):
    """Where kernels round them. With dropout a product of few tokens, which keeps float32 of lora_B, is not taken."""
    sample = op.small((torch.bfloat16, torch.float32)).with_dropout(0.3 if op.has_dropout else 0.0)
    rounded = sample.as_read(torch.bfloat16)
    if not rounds_factors(sample.grads[0].device, torch.bfloat16):
        pytest.skip("the CPU's kernels keep float32 factors on this instruction set")
    found, expected = map(op.results, (sample, rounded))
    assert_bits({name: value.to(expected[name].dtype) for name, value in found.items()}, expected)


@each_op
def test_any_number_of_threads(op):
    """Sums over the threads' tokens differ in rounding. Layers together keep the bits of one by one."""
    make = list(op.samples.values())[MIDDLE]
    sample = make(FLOAT).with_dropout(0.3 if op.has_dropout else 0.0)
    with_threads((2, 3, 5), lambda: assert_as_good_as_plain(op, make, FLOAT, 0.3))
    expected, *others = with_threads((1, 2, 3, 5), lambda: op.results(sample))
    for found in others:
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)
    if "siblings" in op.name:
        alone = with_threads((1, 2, 3, 5), lambda: results(one_by_one, sample, op.leaves(sample)))
        for found, wanted in zip([expected, *others], alone, strict=True):
            assert_bits(found, wanted, "grad of x")


# --- forms of the arguments -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("leading", [(), (2, 3), (1, 5), (2, 1, 4), (2, 0, 3)], ids=str)
@each_op
def test_leading_dimensions(op, leading):
    """Also one token without a dimension of tokens."""
    sample = op.small(FLOAT, leading or (1,)).with_dropout(0.3 if op.has_dropout else 0.0)
    if leading == ():
        of_tokens = {"x", "y", "base", "bases", "xa", "residual", "group_of_row"}
        for name, i, tensor in list(tensors_of(sample.call)):
            sample.call = with_entry(sample.call, name, i, tensor[0] if name in of_tokens else tensor)
        sample.grads = [grad[0] for grad in sample.grads]
    leaves = op.leaves(sample)
    ours = results(op.run, sample, leaves)
    assert ours["result 0"].shape == sample.grads[0].shape
    torch.testing.assert_close(ours, results(op.plain, sample, leaves))


VIEWS = LAYOUTS | {
    "expanded": lambda t: t.nan_to_num()[:1].expand_as(t),  # NaN is what no row reads of its own factors
}


@pytest.mark.full(but=3)
@pytest.mark.parametrize("view", VIEWS)
@pytest.mark.parametrize("tokens", [1, 2, 30, 80])
@each_op
def test_tensors_of_any_strides(op, tokens, view):
    """Every argument is a view, one after the other and then all; what lies between is not read."""
    sample = op.small(FLOAT, (tokens,)).with_dropout(0.3 if op.has_dropout else 0.0)
    whole = ("y", "seed") + ("ranks",) * (view == "expanded")  # y changes, and a rank is at most that of its group
    places = [(name, i) for name, i, t in tensors_of(sample.call) if name not in whole and t.numel()]
    for some in [*([place] for place in places), places]:
        call = sample.call
        for name, i in some:
            tensor = entry_of(call, name, i)
            is_vector = tensor.dim() == 1 and view != "expanded"
            call = with_entry(call, name, i, every_second(tensor) if is_vector else VIEWS[view](tensor))
        grads = [VIEWS[view](grad) for grad in sample.grads] if some is places else sample.grads
        leaves = op.leaves(sample)
        torch.testing.assert_close(
            results(op.run, Sample(call, grads), leaves),
            results(op.plain, Sample(call, grads), leaves),
            rtol=1e-4,
            atol=1e-4,
        )


# --- only what is wanted ----------------------------------------------------------------------------------------------


def saved_beside(op: Op, sample: Sample, names: list) -> list[tuple[int, ...]]:
    """Returns the shapes of what autograd keeps, without parameters and arguments other than x."""
    call, kept = sample.call, []
    for place in op.leaves(sample, with_frozen=True):
        tensor = entry_of(call, *place).detach().requires_grad_(place in names)
        call = with_entry(call, *place, tensor)
    own = {t.data_ptr() for name, _, t in tensors_of(call) if name not in ("x", "xa")}

    def pack(tensor: Tensor) -> Tensor:
        if not isinstance(tensor, nn.Parameter) and tensor.data_ptr() not in own:
            kept.append(tuple(tensor.shape))
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        op.run(**call)
    return kept


@pytest.mark.full(but=3)
@pytest.mark.parametrize("name", OPS)
def test_only_wanted_gradients_are_computed_and_kept(name):
    op = OPS[name]
    sample = op.small(DOUBLE).with_dropout(0.3 if op.has_dropout else 0.0)
    x = sample.call.get("x", sample.call.get("base"))
    ranks = sum(len(A) for A in sample.call.get("lora_As", [])) if "siblings" in name else 4
    shapes = {"x": tuple(x.shape), "xa": (6, ranks), "mask": (6, 8)}
    for places in subsets(op.leaves(sample, with_frozen=True)):
        torch.testing.assert_close(results(op.run, sample, places), results(op.plain, sample, places))
        if name == "lora_grouped_linear":
            continue  # it is F.linear and lora_grouped_ where gradients are wanted
        wanted = {place[0].replace("weights", "weight") for place in places} | {place[0] for place in places}
        expected = [shapes[what] for what, by in op.keeps.items() if wanted & set(by)]
        assert sorted(saved_beside(op, sample, places)) == sorted(expected), places


@pytest.mark.parametrize("name", [name for name in FUNCTIONS if OPS[name].has_dropout])
def test_the_same_seed_gives_the_same_mask(name):
    op = OPS[name]
    sample, ys = op.small(), []
    for seed in (1, 1, 2):
        torch.manual_seed(seed)
        ys.append(op.run(**sample.call, dropout_p=0.5)[0])
    assert torch.equal(ys[0], ys[1]) and not torch.equal(ys[0], ys[2])
    torch.manual_seed(1)
    assert not torch.equal(*(op.run(**sample.call, dropout_p=0.5)[0] for _ in range(2)))
    assert torch.equal(*(op.run(**sample.call, dropout_p=0.5, seed=SEED)[0] for _ in range(2)))
