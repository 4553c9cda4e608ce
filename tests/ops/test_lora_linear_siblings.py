"""torch.ops.lora_ext.lora_linear_siblings and its backward: layers that read one x, compared with single layers.

What must hold of ``lora_linear`` too is tested for both.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from support.layers import (
    DTYPES,
    Siblings,
    assert_errors_as_plain,
    forward_backward_siblings,
    number_of_layers,
    random_siblings,
    saved_bytes,
)
from support.properties import given, settings, st
from torch import Tensor, nn

from lora_ext import functional, reference

SEED = torch.tensor(0x1234_5678_9ABC_DEF0 >> 1)

# (num_tokens, in_features) and the layers' (out_features, rank): one to eight layers, ranks that fill no vector alone
# or together, no rows, one row, odd tails, and sizes across every block boundary of the kernels.
SIBLINGS = [
    ((0, 5), ((3, 2), (4, 1))),
    ((1, 1), ((1, 1), (1, 1))),
    ((1, 64), ((48, 8), (48, 8), (48, 8))),
    ((7, 5), ((3, 2), (130, 3), (1, 1))),
    ((33, 64), ((48, 17), (64, 16))),
    ((70, 97), ((131, 8), (64, 3), (5, 17))),
    ((100, 515), ((257, 100),)),
    ((40, 384), ((384, 16), (128, 16), (128, 16))),
    ((35, 300), tuple((40 + 30 * i, 1 + i) for i in range(8))),
]


def one_by_one(x, weights, biases, lora_As, lora_Bs, scalings, dropout_p=0.0, seed=None) -> list[Tensor]:
    layers = zip(weights, biases, lora_As, lora_Bs, scalings, strict=True)
    return [functional.lora_linear(x, *layer, dropout_p, seed) for layer in layers]


each = pytest.mark.parametrize("function", [one_by_one, functional.lora_linear_siblings], ids=["alone", "together"])


def some(function: Callable, shape: tuple[int, int], sizes: tuple, **options) -> Siblings:
    """Makes random siblings, or for ``one_by_one`` only the first of them."""
    return random_siblings((shape, sizes[:1] if function is one_by_one else sizes), **options)


# --- numbers ----------------------------------------------------------------------------------------------------------


def assert_as_good_as_torch(
    siblings: list[Siblings],
    dropout_p: float = 0.0,
    seed: Tensor | None = None,
    function: Callable = functional.lora_linear_siblings,
) -> None:
    results = []
    for group in siblings:
        ours = forward_backward_siblings(function, group, dropout_p, seed)
        exact = forward_backward_siblings(reference.lora_linear_siblings, group.to(torch.float64), dropout_p, seed)
        plain = forward_backward_siblings(reference.lora_linear_siblings, group, dropout_p, seed)
        results.append((ours, exact, plain))
    assert_errors_as_plain(results, siblings[0].x.dtype, siblings[0].layers[0].lora_A.dtype)


@pytest.mark.pairs
@pytest.mark.full
@pytest.mark.parametrize("dropout_p", [0.0, 0.3])
@pytest.mark.parametrize("dtypes", DTYPES, ids=lambda d: f"{d[0]}-{d[1]}".replace("torch.", ""))
@pytest.mark.parametrize("shape", SIBLINGS, ids=str)
def test_values_and_gradients(shape, dtypes, dropout_p):
    (num_tokens, in_features), sizes = shape
    smallest = min(min(num_tokens, rank) * min(in_features, out_features) for out_features, rank in sizes)
    copies = number_of_layers(smallest)
    assert_as_good_as_torch([random_siblings(shape, dtypes) for _ in range(copies)], dropout_p, SEED)


@settings(max_examples=40, deadline=None)
@given(
    tokens=st.tuples(st.integers(1, 70), st.integers(1, 300)),
    sizes=st.lists(st.tuples(st.integers(1, 200), st.integers(1, 40)), min_size=1, max_size=8),
    dtypes=st.sampled_from(DTYPES),
    dropout_p=st.sampled_from([0.0, 0.1, 0.5]),
    seed=st.integers(0, 2**63 - 1),
)
def test_any_shape_equals_the_layers_one_by_one(tokens, sizes, dtypes, dropout_p, seed):
    torch.manual_seed(seed)
    groups = [random_siblings((tokens, tuple(sizes)), dtypes) for _ in range(number_of_layers(math.prod(tokens)))]
    assert_equals_one_by_one(groups, dropout_p, torch.tensor(seed))


def assert_equals_one_by_one(siblings: Siblings | list[Siblings], dropout_p: float, seed: Tensor) -> None:
    """Requires equal bits, except in grad_x: its sum over the layers is rounded less often.

    Several siblings are judged by the joint error of grad_x, because either side can be exact by chance.
    """
    groups = [siblings] if isinstance(siblings, Siblings) else siblings
    grads: list[tuple[Tensor, ...]] = []
    for group in groups:
        together = forward_backward_siblings(functional.lora_linear_siblings, group, dropout_p, seed)
        separate = forward_backward_siblings(one_by_one, group, dropout_p, seed)
        exact = forward_backward_siblings(reference.lora_linear_siblings, group.to(torch.float64), dropout_p, seed)
        grads.append(tuple(results.pop("grad_x").double().flatten() for results in (together, separate, exact)))
        for name in separate:
            assert torch.equal(together[name], separate[name]), name
    grad_x, separate_grad_x, exact_grad_x = map(torch.cat, zip(*grads, strict=True))
    error, separate_error = ((value - exact_grad_x).norm() for value in (grad_x, separate_grad_x))
    x_dtype, factor_dtype = groups[0].x.dtype, groups[0].layers[0].lora_A.dtype
    floor = 1e-14 if x_dtype == torch.float64 else 1e-6
    if factor_dtype != x_dtype:
        floor = max(floor, torch.finfo(factor_dtype).eps)
    assert error <= 2 * separate_error + floor * exact_grad_x.norm()


@pytest.mark.pairs
@pytest.mark.parametrize("dropout_p", [0.0, 0.3])
@pytest.mark.parametrize("dtypes", DTYPES, ids=lambda d: f"{d[0]}-{d[1]}".replace("torch.", ""))
@pytest.mark.parametrize("shape", SIBLINGS, ids=str)
def test_equals_the_layers_one_by_one(shape, dtypes, dropout_p):
    assert_equals_one_by_one(random_siblings(shape, dtypes), dropout_p, SEED)


def test_one_layer_is_lora_linear_to_the_bit():
    siblings = random_siblings(((70, 97), ((131, 8),)))
    together, alone = (
        forward_backward_siblings(function, siblings, 0.3, SEED)
        for function in (functional.lora_linear_siblings, one_by_one)
    )
    for name in alone:
        assert torch.equal(together[name], alone[name]), name


@each
def test_memory_is_poisoned_yet_nothing_of_it_shows(function):
    """Outputs and scratch memory are written before they are read, also after a larger call left garbage there."""
    torch.use_deterministic_algorithms(True)  # fills new tensors with NaN
    try:
        poison = some(function, (64, 200), ((300, 20), (300, 20), (300, 20)))
        poison.x.fill_(float("nan"))
        forward_backward_siblings(function, poison, 0.3, SEED)
        for dtypes in DTYPES:
            assert_equals_one_by_one(some(function, (33, 97), ((131, 3), (64, 5))), 0.3, SEED)
            siblings = some(function, (33, 97), ((131, 3), (64, 5)), dtypes=dtypes)
            assert_as_good_as_torch([siblings], 0.3, SEED, function)
    finally:
        torch.use_deterministic_algorithms(False)


@each
@pytest.mark.parametrize("leading", [(2, 3), (1, 5), (2, 1, 4), (2, 0, 3)])
def test_leading_dimensions(leading, function):
    siblings = some(function, (0, 20), ((12, 4), (9, 2)), leading=leading)
    result = forward_backward_siblings(function, siblings)
    for i, layer in enumerate(siblings.layers):
        assert result[f"y[{i}]"].shape == (*leading, len(layer.weight))
    assert result["grad_x"].shape == (*leading, 20)
    assert_as_good_as_torch([siblings], function=function)


def test_one_dimension():
    siblings = random_siblings(((1, 20), ((12, 4), (9, 2))))
    siblings = Siblings(siblings.x[0], [replace(layer, grad_y=layer.grad_y[0]) for layer in siblings.layers])
    assert_equals_one_by_one(siblings, 0.3, SEED)


VIEWS = {
    "swapped": lambda x: x.transpose(0, 1),
    "every-other-token": lambda x: x[:, ::2],
    "column-slice": lambda x: x[..., 3:23],
    "every-other-column": lambda x: x[..., ::2],
    "features-strided": lambda x: x.transpose(1, 2),
    "expanded": lambda x: x[:1].expand(6, -1, -1),
    "one-row": lambda x: x[0, 0].expand(2, 3, -1),
}


@each
@pytest.mark.parametrize("view", VIEWS)
def test_x_and_grad_ys_of_any_strides(view, function):
    """One grad_y is contiguous: siblings may have different strides."""
    x, first, second = (VIEWS[view](torch.randn(6, 30, 40)) for _ in range(3))
    sizes = ((first.shape[-1], 4), (second.shape[-1], 3), (7, 2))
    siblings = some(function, (0, x.shape[-1]), sizes, leading=tuple(x.shape[:-1]))
    for layer, grad_y in zip(siblings.layers, (first, second), strict=False):
        layer.grad_y = grad_y
    leaf = x.detach().requires_grad_()  # the same view, not a copy of it
    ys = function(leaf, *siblings.args()[1:], 0.3, SEED)
    (grad_x,) = torch.autograd.grad(ys, leaf, siblings.grad_ys())
    expected = forward_backward_siblings(reference.lora_linear_siblings, Siblings(x, siblings.layers), 0.3, SEED)
    for i, y in enumerate(ys):
        torch.testing.assert_close(y, expected[f"y[{i}]"])
    torch.testing.assert_close(grad_x, expected["grad_x"])


@each
def test_noncontiguous_parameters(function):
    siblings = some(function, (5, 20), ((12, 4), (9, 3)))
    expected = forward_backward_siblings(function, siblings)
    for layer in siblings.layers:
        layer.weight = layer.weight.T.contiguous().T
        layer.lora_A, layer.lora_B = layer.lora_A.T.contiguous().T, layer.lora_B.T.contiguous().T
    siblings.layers[0].bias = torch.stack([siblings.layers[0].bias] * 2, 1)[:, 0]
    result = forward_backward_siblings(function, siblings)
    for name in expected:
        torch.testing.assert_close(result[name], expected[name])


def test_q_k_v_may_be_rows_of_one_weight():
    """Packed projections stack the layers' weights and biases: views of one tensor."""
    siblings = random_siblings(((40, 64), ((48, 8), (16, 8), (16, 8))))
    fused, bias = torch.cat([layer.weight for layer in siblings.layers]), torch.randn(80)
    expected = forward_backward_siblings(
        functional.lora_linear_siblings,
        Siblings(
            siblings.x, [replace(s, bias=b) for s, b in zip(siblings.layers, bias.split([48, 16, 16]), strict=True)]
        ),
        0.3,
        SEED,
    )
    rows = zip(siblings.layers, fused.split([48, 16, 16]), bias.split([48, 16, 16]), strict=True)
    views = Siblings(siblings.x, [replace(s, weight=w, bias=b) for s, w, b in rows])
    result = forward_backward_siblings(functional.lora_linear_siblings, views, 0.3, SEED)
    assert all(torch.equal(result[name], expected[name]) for name in expected)


# --- only what is needed ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("used", [(0,), (1,), (2,), (0, 2), (1, 2)], ids=str)
@pytest.mark.parametrize("dtypes", [(torch.float32, torch.float32), (torch.bfloat16, torch.bfloat16)], ids=str)
def test_unused_outputs(used, dtypes):
    """A loss of some outputs gives gradients for their layers, and None for the others' factors."""
    siblings = random_siblings(((40, 33), ((50, 5), (20, 3), (31, 8))), dtypes)
    x, weights, biases, As, Bs, scalings = siblings.args()
    x, As, Bs = x.requires_grad_(), *([t.requires_grad_() for t in ts] for ts in (As, Bs))
    ys = functional.lora_linear_siblings(x, weights, biases, As, Bs, scalings, 0.3, SEED)
    grads = torch.autograd.grad(
        [ys[i] for i in used], (x, *As, *Bs), [siblings.layers[i].grad_y for i in used], allow_unused=True
    )
    of_used = Siblings(siblings.x, [siblings.layers[i] for i in used])
    expected = forward_backward_siblings(functional.lora_linear_siblings, of_used, 0.3, SEED)
    assert torch.equal(grads[0], expected["grad_x"])
    for name, of_layers in (("grad_A", grads[1:4]), ("grad_B", grads[4:])):
        assert [i for i, grad in enumerate(of_layers) if grad is not None] == list(used)
        for place, i in enumerate(used):
            assert torch.equal(of_layers[i], expected[f"{name}[{place}]"])


def test_no_output_used():
    siblings = random_siblings(((4, 8), ((5, 2), (6, 3))))
    x = siblings.x.requires_grad_()
    ys = functional.lora_linear_siblings(*siblings.args())
    assert torch.autograd.grad(x.sum() + 0 * ys[0].detach().sum(), x)[0].eq(1).all()


@pytest.mark.parametrize("what", ["x", "A0", "B1", "A1 B1", "x A0", "W0", "b0", "x W1 B0", "x W0 W1 b0 A0 A1 B0 B1"])
def test_each_gradient_alone_equals_its_part_of_all(what):
    siblings = random_siblings(((40, 33), ((50, 5), (20, 3))))
    wanted = what.split()

    def gradients(names):
        x, weights, biases, As, Bs, scalings = siblings.args()
        leaves = {"x": x, "W0": weights[0], "W1": weights[1], "b0": biases[0]}
        leaves |= {"A0": As[0], "A1": As[1], "B0": Bs[0], "B1": Bs[1]}
        t = {name: leaf.clone().requires_grad_(name in names) for name, leaf in leaves.items()}
        ys = functional.lora_linear_siblings(
            t["x"], [t["W0"], t["W1"]], [t["b0"], None], [t["A0"], t["A1"]], [t["B0"], t["B1"]], scalings, 0.3, SEED
        )
        outputs = [(y, layer.grad_y) for y, layer in zip(ys, siblings.layers, strict=True) if y.requires_grad]
        torch.autograd.backward(*zip(*outputs, strict=True))
        return {name: tensor.grad for name, tensor in t.items()}

    every, some = gradients(["x", "W0", "W1", "b0", "A0", "A1", "B0", "B1"]), gradients(wanted)
    assert [name for name in some if some[name] is not None] == [name for name in every if name in wanted]
    for name in wanted:
        torch.testing.assert_close(some[name], every[name], rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize(
    "output_mask", [(False, False, False), (True, False, False), (False, True, False), (False, False, True)], ids=str
)
def test_backward_returns_only_what_is_asked(output_mask):
    siblings = random_siblings(((5, 20), ((12, 4), (7, 3))))
    x, weights, _, As, Bs, scalings = siblings.args()
    _, xa, mask = torch.ops.lora_ext.lora_linear_siblings(*siblings.args(), 0.3, SEED)
    want_x, want_A, want_B = output_mask
    grad_x, grad_As, grad_Bs = torch.ops.lora_ext.lora_linear_siblings_backward(
        siblings.grad_ys(),
        x if want_A else None,
        weights,
        As,
        Bs,
        xa if want_B else None,
        mask if want_x or want_A else None,
        scalings,
        0.3,
        output_mask,
    )
    assert (grad_x is not None, len(grad_As), len(grad_Bs)) == (want_x, 2 * want_A, 2 * want_B)


@each
@pytest.mark.parametrize("frozen", ["", "A", "B", "x"])
def test_saves_x_xa_and_the_mask_once(frozen, function):
    siblings = some(function, (64, 128), ((96, 4), (32, 4), (32, 8)))
    x, weights, biases, As, Bs, scalings = siblings.args()
    x = x.requires_grad_("x" not in frozen)
    weights = [nn.Parameter(t, requires_grad=False) for t in weights]
    As = [nn.Parameter(t, requires_grad="A" not in frozen) for t in As]
    Bs = [nn.Parameter(t, requires_grad="B" not in frozen) for t in Bs]
    saved = saved_bytes(lambda: function(x, weights, biases, As, Bs, scalings, 0.1, SEED))
    expected = [((64, 16), 64 * 16)]  # the mask: 128 bits a row
    if frozen != "A":
        expected.append(((64, 128), x.nbytes))  # shared with the op that made x
    if frozen != "B":
        ranks = sum(map(len, As))
        expected.append(((64, ranks), 64 * ranks * 4))
    assert sorted(saved) == sorted(expected)


@each
def test_without_gradients_nothing_is_kept(function):
    siblings = some(function, (64, 128), ((96, 4), (32, 4)))
    siblings.layers[-1].lora_A.requires_grad_()
    with torch.no_grad():
        assert not any(y.requires_grad for y in function(*siblings.args()))
    siblings.layers[-1].lora_A.requires_grad_(False)
    assert all(y.grad_fn is None for y in function(*siblings.args()))


# --- dropout, determinism, threads ------------------------------------------------------------------------------------


def test_the_layers_share_the_mask_of_a_single_layer():
    siblings = random_siblings(((40, 100), ((12, 4), (9, 3))))
    ys, xa, mask = torch.ops.lora_ext.lora_linear_siblings(*siblings.args(), 0.3, SEED)
    standalone = torch.ops.lora_ext.lora_dropout_mask(SEED, 40, 100, 0.3)
    assert torch.equal(reference.unpack_mask(mask, 100), reference.unpack_mask(standalone, 100))
    assert len(ys) == 2 and xa.shape == (40, 7)


@each
def test_manual_seed_reproduces_and_advances(function):
    siblings = some(function, (40, 100), ((12, 4), (9, 3)))
    torch.manual_seed(3)
    first, second = (function(*siblings.args(), 0.5) for _ in range(2))
    torch.manual_seed(3)
    again = function(*siblings.args(), 0.5)
    assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))
    assert not torch.equal(first[0], second[0])


@each
@pytest.mark.parametrize("threads", [1, 3, 5])
def test_any_number_of_threads(threads, function):
    siblings = some(function, (100, 97), ((131, 8), (64, 3), (7, 5)))
    torch.set_num_threads(threads)
    try:
        assert_equals_one_by_one(siblings, 0.3, SEED)
        assert_as_good_as_torch([siblings], 0.3, SEED, function)
    finally:
        torch.set_num_threads(2)


@each
def test_repeated_runs_are_bit_identical(function):
    siblings = some(function, (500, 300), ((200, 8), (100, 16)))
    first = forward_backward_siblings(function, siblings, 0.1, SEED)
    for _ in range(3):
        again = forward_backward_siblings(function, siblings, 0.1, SEED)
        assert all(torch.equal(first[name], again[name]) for name in first)
