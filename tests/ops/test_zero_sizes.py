"""Sizes of zero in every place: an empty tensor has a null pointer, which must not mean "no tensor".

New tensors and the kernels' scratch memory are filled with NaN, so that unwritten memory shows.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from itertools import product

import pytest
import torch
from support.layers import DTYPES, Siblings, assert_errors_as_plain, random_layer, random_siblings
from torch import Tensor

from lora_ext import functional, reference

SEED = torch.tensor(0x1234_5678_9ABC_DEF0 >> 1)
WANTED = [wanted for wanted in product([False, True], repeat=3) if any(wanted)]  # gradients of x, lora_A and lora_B


@pytest.fixture(autouse=True)
def _poisoned() -> Iterator[None]:
    torch.use_deterministic_algorithms(True)  # fills new tensors with NaN
    try:
        spoiled = random_siblings(((64, 200), ((300, 20), (300, 20), (300, 20))))
        spoiled.x.fill_(float("nan"))
        gradients(functional.lora_linear_siblings, spoiled, 0.3, (True, True, True))
        yield
    finally:
        torch.use_deterministic_algorithms(False)


def gradients(function: Callable, siblings: Siblings, dropout_p: float, wanted: tuple) -> dict[str, Tensor]:
    """Returns the outputs and the wanted gradients of x, lora_As and lora_Bs."""
    x, weights, biases, As, Bs, scalings = siblings.args()
    x, As, Bs = x.detach().clone(), [A.detach().clone() for A in As], [B.detach().clone() for B in Bs]
    leaves = {}
    for name, tensors, want in zip(("x", "A", "B"), ([x], As, Bs), wanted, strict=True):
        if want:
            leaves |= {f"grad_{name}[{i}]": tensor.requires_grad_() for i, tensor in enumerate(tensors)}
    ys = function(x, weights, biases, As, Bs, scalings, dropout_p, SEED)
    grads = torch.autograd.grad(ys, list(leaves.values()), siblings.grad_ys())
    return {f"y[{i}]": y.detach() for i, y in enumerate(ys)} | dict(zip(leaves, grads, strict=True))


def assert_right(function: Callable, siblings: Siblings, dropout_p: float, wanted: tuple) -> None:
    """Compares ``function``, which has the arguments of lora_linear_siblings, with the reference."""
    ours = gradients(function, siblings, dropout_p, wanted)
    exact = gradients(reference.lora_linear_siblings, siblings.to(torch.float64), dropout_p, wanted)
    plain = gradients(reference.lora_linear_siblings, siblings, dropout_p, wanted)
    for name, value in ours.items():
        assert value.isfinite().all(), name
    assert_errors_as_plain([(ours, exact, plain)], siblings.x.dtype, siblings.layers[0].lora_A.dtype)


# (num_tokens, in_features) and the layers' (out_features, rank)
SHAPES = {
    "first layer": ((37, 72), ((0, 4), (40, 20), (33, 3))),
    "middle layer": ((37, 72), ((40, 20), (0, 4), (33, 3))),
    "last layer": ((37, 72), ((40, 20), (33, 3), (0, 40))),
    "all but one layer": ((37, 72), ((0, 4), (0, 40), (33, 3))),
    "all layers": ((37, 72), ((0, 4), (0, 40))),
    "no features come in": ((37, 0), ((40, 20), (33, 3))),
    "none come in, none go out": ((37, 0), ((0, 4), (33, 3))),
    "no tokens": ((0, 72), ((40, 20), (33, 3))),
    "no tokens, no features": ((0, 0), ((0, 20), (33, 3))),
}


@pytest.mark.pairs
@pytest.mark.full
@pytest.mark.parametrize("dropout_p", [0.0, 0.3])
@pytest.mark.parametrize("dtypes", DTYPES, ids=lambda d: f"{d[0]}-{d[1]}".replace("torch.", ""))
@pytest.mark.parametrize("shape", SHAPES)
def test_siblings(shape, dtypes, dropout_p):
    siblings = random_siblings(SHAPES[shape], dtypes)
    for wanted in WANTED:
        assert_right(functional.lora_linear_siblings, siblings, dropout_p, wanted)


def one_layer(x, weights, biases, lora_As, lora_Bs, scalings, dropout_p, seed) -> list[Tensor]:
    return [functional.lora_linear(x, weights[0], biases[0], lora_As[0], lora_Bs[0], scalings[0], dropout_p, seed)]


def a_delta(x, weights, biases, lora_As, lora_Bs, scalings, dropout_p, seed) -> list[Tensor]:
    base = torch.nn.functional.linear(x, weights[0], biases[0])
    return [functional.lora_delta_(base, x, lora_As[0], lora_Bs[0], scalings[0], dropout_p, seed)]


# num_tokens, in_features, out_features; few tokens are computed by other kernels
SIZES = [(37, 72, 0), (2, 72, 0), (37, 0, 40), (2, 0, 40), (37, 0, 0), (0, 72, 40), (0, 0, 0)]


@pytest.mark.full
@pytest.mark.parametrize("dtypes", DTYPES, ids=lambda d: f"{d[0]}-{d[1]}".replace("torch.", ""))
@pytest.mark.parametrize("function", [one_layer, a_delta], ids=["lora_linear", "lora_delta_"])
def test_one_layer(function, dtypes):
    for (num_tokens, in_features, out_features), rank, dropout_p in product(SIZES, (3, 40), (0.0, 0.3)):
        siblings = random_siblings(((num_tokens, in_features), ((out_features, rank),)), dtypes)
        for wanted in WANTED:
            assert_right(function, siblings, dropout_p, wanted)


@pytest.mark.parametrize("dtypes", DTYPES, ids=lambda d: f"{d[0]}-{d[1]}".replace("torch.", ""))
def test_an_adapters_two_products(dtypes):
    """lora_shrink and lora_expand, with every choice of gradients."""
    for num_tokens, in_features, out_features in SIZES:
        layer = random_layer((num_tokens, in_features, out_features, 3), dtypes)
        exact = layer.to(torch.float64)
        x, A = layer.x.requires_grad_(), layer.lora_A.requires_grad_()
        xa = torch.ops.lora_ext.lora_shrink(x, A)
        torch.testing.assert_close(xa.double(), exact.x @ exact.lora_A.T, rtol=2e-2, atol=2e-2)
        grad_xa = torch.randn_like(xa)
        for leaves, expected in {
            (x, A): (grad_xa.double() @ exact.lora_A, grad_xa.double().T @ exact.x),
            (x,): (grad_xa.double() @ exact.lora_A,),
            (A,): (grad_xa.double().T @ exact.x,),
        }.items():
            grads = torch.autograd.grad(xa, leaves, grad_xa, retain_graph=True)
            for grad, value in zip(grads, expected, strict=True):
                torch.testing.assert_close(grad.double(), value, rtol=2e-2, atol=2e-2)

        xa, B = xa.detach().requires_grad_(), layer.lora_B.requires_grad_()
        y = torch.ops.lora_ext.lora_expand(layer.grad_y, xa, B, layer.bias)
        expected_y = exact.grad_y + xa.double() @ exact.lora_B.T + exact.bias
        torch.testing.assert_close(y.double(), expected_y, rtol=2e-2, atol=4e-2)
        for leaves, expected in {
            (xa, B): (exact.grad_y @ exact.lora_B, exact.grad_y.T @ xa.double()),
            (xa,): (exact.grad_y @ exact.lora_B,),
            (B,): (exact.grad_y.T @ xa.double(),),
        }.items():
            grads = torch.autograd.grad(y, leaves, layer.grad_y, retain_graph=True)
            for grad, value in zip(grads, expected, strict=True):
                torch.testing.assert_close(grad.double(), value, rtol=2e-2, atol=4e-2)


@pytest.mark.parametrize("shape", [(0, 300), (5, 0), (0, 0)], ids=str)
def test_merging(shape):
    weights = [torch.randn(4, 300), torch.randn(*shape), torch.randn(3, 20)]
    before = [weight.clone() for weight in weights]
    factors = [(torch.randn(2, weight.shape[1]), torch.randn(weight.shape[0], 2)) for weight in weights]
    records = [functional.lora_merge_(w, A, B, 0.5) for w, (A, B) in zip(weights, factors, strict=True)]
    for weight, old, (A, B) in zip(weights, before, factors, strict=True):
        torch.testing.assert_close(weight, old + 0.5 * B @ A)
    for weight, old, record in zip(weights, before, records, strict=True):
        assert torch.equal(functional.lora_unmerge_(weight, record), old)


@pytest.mark.parametrize("layers", [((4, 72), (0, 40)), ((0, 40), (4, 72))], ids=["first layer", "second layer"])
def test_a_rank_of_zero_is_refused(layers):
    """An adapter needs a rank of at least 1, as in PEFT."""
    siblings = random_siblings(((5, 72), tuple((out_features, rank) for rank, out_features in layers)))
    with pytest.raises(ValueError, match=r"lora_As\[[01]\] has rank 0, want at least 1"):
        functional.lora_linear_siblings(*siblings.args())
