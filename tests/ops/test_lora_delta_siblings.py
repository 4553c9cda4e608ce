"""lora_delta_siblings: adapters of layers that read one x, added to what the base layers returned."""

from __future__ import annotations

import pytest
import torch
from support.layers import DTYPES, Siblings, assert_errors_as_plain, random_siblings
from torch import Tensor

from lora_ext import functional, reference

SEED = torch.tensor(1234)
SHAPES = [
    ((1, 3), ((5, 1),)),
    ((70, 97), ((131, 8), (64, 3), (5, 17))),
    ((35, 300), tuple((40 + 30 * i, 1 + i) for i in range(8))),
]


def one_by_one(bases, x, lora_As, lora_Bs, scalings, dropout_p=0.0, seed=None) -> list[Tensor]:
    layers = zip(bases, lora_As, lora_Bs, scalings, strict=True)
    return [functional.lora_delta_(base.clone(), x, *layer, dropout_p, seed) for base, *layer in layers]


def in_plain_torch(bases, x, lora_As, lora_Bs, scalings, dropout_p=0.0, seed=None) -> list[Tensor]:
    layers = zip(bases, lora_As, lora_Bs, scalings, strict=True)
    return [(base + reference.lora_delta(x, *layer, dropout_p, seed)).to(base.dtype) for base, *layer in layers]


def arguments(siblings: Siblings) -> tuple:
    x, _, _, As, Bs, scalings = siblings.args()
    return siblings.grad_ys(), x, As, Bs, scalings


def forward_backward(function, siblings: Siblings, dropout_p: float) -> dict[str, Tensor]:
    bases, x, As, Bs, scalings = arguments(siblings)
    bases, As, Bs = ([t.detach().clone().requires_grad_() for t in tensors] for tensors in (bases, As, Bs))
    x = x.detach().clone().requires_grad_()
    ys = function(bases, x, As, Bs, scalings, dropout_p, SEED)
    grads = torch.autograd.grad(ys, (x, *bases, *As, *Bs), siblings.grad_ys())
    names = [f"{name}[{i}]" for name in ("y", "grad_base", "grad_A", "grad_B") for i in range(len(ys))]
    return dict(zip(names, (*(y.detach() for y in ys), *grads[1:]), strict=True)) | {"grad_x": grads[0]}


@pytest.mark.pairs
@pytest.mark.parametrize("dropout_p", [0.0, 0.3])
@pytest.mark.parametrize("dtypes", DTYPES, ids=lambda d: f"{d[0]}-{d[1]}".replace("torch.", ""))
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_has_the_bits_of_the_layers_one_by_one(shape, dtypes, dropout_p):
    """Except grad_x, whose sum over the layers is rounded less often."""
    groups = [random_siblings(shape, dtypes) for _ in range(40 if shape[0][0] == 1 else 1)]
    results = []
    for siblings in groups:
        ours = forward_backward(functional.lora_delta_siblings, siblings, dropout_p)
        separate = forward_backward(one_by_one, siblings, dropout_p)
        exact = forward_backward(in_plain_torch, siblings.to(torch.float64), dropout_p)
        for name in separate:
            assert name == "grad_x" or torch.equal(ours[name], separate[name]), name
        results.append(tuple({"grad_x": values["grad_x"]} for values in (ours, exact, separate)))
    assert_errors_as_plain(results, *dtypes)


@pytest.mark.pairs
@pytest.mark.parametrize("num_tokens", [3, 70])
@pytest.mark.parametrize("scaling", [0.0, 1.0])
@pytest.mark.parametrize("dtypes", DTYPES, ids=lambda d: f"{d[0]}-{d[1]}".replace("torch.", ""))
def test_an_overflow_stays_in_its_layer_and_is_nan_at_scaling_zero(dtypes, scaling, num_tokens):
    """As in the layers one by one and in plain PyTorch: zero times infinity."""
    bases, x, As, Bs, scalings = arguments(random_siblings(((num_tokens, 97), ((131, 8), (64, 3), (5, 17))), dtypes))
    As[1] = torch.full_like(As[1], torch.finfo(As[1].dtype).max)
    x[1] = 8.0
    call = bases, x, As, Bs, [scalings[0], scaling, scalings[2]]
    ys, expected = functional.lora_delta_siblings(*call), one_by_one(*call)
    for y, want in zip(ys, expected, strict=True):
        torch.testing.assert_close(y, want, rtol=0, atol=0, equal_nan=True)
    sums = torch.float64 if x.dtype == torch.float64 else torch.float32
    if scaling == 0.0 and 97 * 8.0 * torch.finfo(As[1].dtype).max > torch.finfo(sums).max:
        assert ys[1][1].isnan().all()
    assert ys[0].isfinite().all() and ys[2].isfinite().all()


def test_bases_stay_as_they_are_and_need_not_be_contiguous():
    bases, x, As, Bs, scalings = arguments(random_siblings(((7, 24), ((20, 4), (12, 3)))))
    views = [base.T.contiguous().T for base in bases]
    before = [base.clone() for base in bases]
    expected = functional.lora_delta_siblings(bases, x, As, Bs, scalings)
    actual = functional.lora_delta_siblings(views, x, As, Bs, scalings)
    for i in range(2):
        assert torch.equal(actual[i], expected[i]) and torch.equal(bases[i], before[i])
        assert torch.equal(views[i], before[i]) and actual[i].is_contiguous()


def test_only_what_a_gradient_reads_is_kept_and_unused_outputs_cost_nothing():
    bases, x, As, Bs, scalings = arguments(random_siblings(((7, 24), ((20, 4), (12, 3)))))
    tensors = [t.requires_grad_() for t in (x, *bases, *As, *Bs)]
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        ys = functional.lora_delta_siblings(bases, x, As, Bs, scalings, 0.3, SEED)
    shapes = sorted(tuple(t.shape) for t in kept if t is not x and not any(t is factor for factor in (*As, *Bs)))
    assert shapes == [(7, 7), (7, 8)]  # xa of both ranks and one mask
    grads = torch.autograd.grad(ys[1].sum(), tensors, allow_unused=True)
    assert [grad is None for grad in grads] == [False, True, False, True, False, True, False]


def bad(**change) -> dict:
    bases, x, As, Bs, scalings = arguments(random_siblings(((6, 24), ((20, 4), (12, 3)))))
    return {"bases": bases, "x": x, "lora_As": As, "lora_Bs": Bs, "scalings": scalings} | change


REFUSALS = {
    "none": ({name: [] for name in ("bases", "lora_As", "lora_Bs", "scalings")}, "bases has 0 entries, want 1 to 8"),
    "lengths": ({"lora_As": [torch.randn(4, 24)]}, "lora_As has 1 entries but bases has 2"),
    "tokens": ({"x": torch.randn(5, 24)}, r"x has shape \[5, 24\] but bases\[0\] has \[6, 20\]: want the same tokens"),
    "in_features": ({"x": torch.randn(6, 9)}, r"lora_As\[0\] has in_features=24 but x has 9"),
    "dtype": (
        {"bases": [torch.randn(6, 20), torch.randn(6, 12).half()]},
        r"x has dtype float32 but bases\[1\] has float16",
    ),
    "out_features": (
        {"bases": [torch.randn(6, 20), torch.randn(6, 13)]},
        r"lora_Bs\[1\] has out_features=12 but bases\[1\] has 13",
    ),
    "factor dtypes": (
        {
            "lora_As": [torch.randn(4, 24), torch.randn(3, 24).double()],
            "lora_Bs": [torch.randn(20, 4), torch.randn(12, 3).double()],
        },
        r"lora_As\[1\] has dtype float64 but lora_As\[0\] has float32",
    ),
    "scaling": ({"scalings": [1.0, float("nan")]}, r"scalings\[1\] is nan, want a finite number"),
    "dropout": ({"dropout_p": 1.0}, "dropout_p is 1.0, want 0 <= dropout_p < 1"),
}


@pytest.mark.parametrize("case", REFUSALS)
def test_refuses_by_name(case):
    change, text = REFUSALS[case]
    with pytest.raises((ValueError, TypeError), match=f"^lora_delta_siblings: {text}"):
        functional.lora_delta_siblings(**bad(**change))
    with pytest.raises(RuntimeError, match=f"lora_delta_siblings: .*{text.split()[0]}"):
        torch.ops.lora_ext.lora_delta_siblings(**bad(**change))


def test_under_autocast_x_is_cast_to_what_the_base_layers_returned():
    call = bad(bases=[torch.randn(6, 20).bfloat16(), torch.randn(6, 12).bfloat16()])
    with torch.autocast(call["x"].device.type, torch.bfloat16):
        ys = functional.lora_delta_siblings(**call)
    expected = functional.lora_delta_siblings(**call | {"x": call["x"].bfloat16()})
    assert all(torch.equal(y, want) for y, want in zip(ys, expected, strict=True))


def test_compiles_whole():
    call = bad()
    compiled = torch.compile(functional.lora_delta_siblings, fullgraph=True, backend="aot_eager")
    for y, want in zip(compiled(**call), functional.lora_delta_siblings(**call), strict=True):
        torch.testing.assert_close(y, want)
