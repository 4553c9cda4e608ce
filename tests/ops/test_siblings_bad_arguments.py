"""Refusals of lora_linear_siblings: they name layer, argument and values, and change nothing."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from support.layers import random_siblings
from torch import Tensor

from lora_ext import functional

SEED = torch.tensor(1)

# case -> (changes of the second of two layers, exception, text)
BAD_LAYERS = {
    "in_features": (
        {"weight": torch.randn(12, 9), "lora_A": torch.randn(3, 9)},
        ValueError,
        r"weights\[1\] has in_features=9 but x has 24",
    ),
    "weight 1-D": ({"weight": torch.randn(24)}, ValueError, r"weights\[1\] has shape \[24\], want 2 dimensions"),
    "A": ({"lora_A": torch.randn(3, 5)}, ValueError, r"lora_As\[1\] has in_features=5 but weights\[1\] has 24"),
    "B": ({"lora_B": torch.randn(7, 3)}, ValueError, r"lora_Bs\[1\] has out_features=7 but weights\[1\] has 12"),
    "ranks": ({"lora_B": torch.randn(12, 4)}, ValueError, r"lora_Bs\[1\] has rank 4 but lora_As\[1\] has 3"),
    "rank 0": (
        {"lora_A": torch.randn(0, 24), "lora_B": torch.randn(12, 0)},
        ValueError,
        r"lora_As\[1\] has rank 0, want at least 1",
    ),
    "bias": ({"bias": torch.randn(3)}, ValueError, r"biases\[1\] has shape \[3\], want \[12\]"),
    "bias 2-D": ({"bias": torch.randn(2, 12)}, ValueError, r"biases\[1\] has shape \[2, 12\], want \[12\]"),
    "weight dtype": (
        {"weight": torch.randn(12, 24).half()},
        TypeError,
        r"weights\[1\] has dtype float16 but x has float32",
    ),
    "bias dtype": ({"bias": torch.randn(12).half()}, TypeError, r"biases\[1\] has dtype float16 but x has float32"),
    "factor dtypes": (
        {"lora_B": torch.randn(12, 3).double()},
        TypeError,
        r"lora_Bs\[1\] has dtype float64 but lora_As\[1\] has float32",
    ),
    "factors of two dtypes": (
        {"lora_A": torch.randn(3, 24).double(), "lora_B": torch.randn(12, 3).double()},
        TypeError,
        r"lora_As\[1\] has dtype float64 but lora_As\[0\] has float32",
    ),
    "integers": (
        {"lora_A": torch.ones(3, 24, dtype=torch.int32)},
        TypeError,
        r"lora_As\[1\] has dtype int32, want one of float64",
    ),
    "device": (
        {"lora_A": torch.randn(3, 24, device="meta")},
        ValueError,
        r"lora_As\[1\] is on meta but x is on cpu",
    ),
    "scaling nan": ({"scaling": float("nan")}, ValueError, r"scalings\[1\] is nan, want a finite number"),
    "scaling < 0": ({"scaling": -0.5}, ValueError, r"scalings\[1\] is -0.5, want at least 0"),
}

# case -> (changes of the whole call, exception, text)
TENSORS = ("weights", "biases", "lora_As", "lora_Bs")
BAD_CALLS = {
    "no layer": (
        {name: [] for name in (*TENSORS, "scalings")},
        ValueError,
        "weights has 0 entries, want 1 to 8",
    ),
    "nine layers": (
        {name: [torch.randn(2, 2)] * 9 for name in TENSORS} | {"scalings": [0.5] * 9},
        ValueError,
        "weights has 9 entries, want 1 to 8",
    ),
    "biases": ({"biases": [None]}, ValueError, "biases has 1 entries but weights has 2"),
    "lora_As": ({"lora_As": [torch.randn(4, 24)]}, ValueError, "lora_As has 1 entries but weights has 2"),
    "lora_Bs": ({"lora_Bs": [torch.randn(20, 4)] * 3}, ValueError, "lora_Bs has 3 entries but weights has 2"),
    "scalings": ({"scalings": [0.5]}, ValueError, "scalings has 1 entries but weights has 2"),
    "x": ({"x": torch.randn(3, 9)}, ValueError, r"weights\[0\] has in_features=24 but x has 9"),
    "no dimension": ({"x": torch.tensor(1.0)}, ValueError, "x has no dimension"),
    "x dtype": (
        {"x": torch.randn(3, 24).bfloat16()},
        TypeError,
        r"weights\[0\] has dtype float32 but x has bfloat16",
    ),
    "dropout 1": ({"dropout_p": 1.0, "seed": SEED}, ValueError, "dropout_p is 1.0, want 0 <= dropout_p < 1"),
    "dropout nan": ({"dropout_p": float("nan")}, ValueError, "dropout_p is nan, want 0 <= dropout_p < 1"),
    "seed dtype": ({"dropout_p": 0.1, "seed": torch.tensor(1.0)}, ValueError, r"seed is float32 \[\], want an int64"),
    "seed size": ({"dropout_p": 0.1, "seed": torch.tensor([1, 2])}, ValueError, r"seed is int64 \[2\], want an int64"),
}

ARGUMENTS = ("x", *TENSORS, "scalings")
BAD = [*BAD_LAYERS, *BAD_CALLS]


def bad_call(case: str) -> tuple[dict, type, str]:
    siblings = random_siblings(((3, 24), ((20, 4), (12, 3))))
    if case in BAD_CALLS:
        change, exception, text = BAD_CALLS[case]
    else:
        change, exception, text = BAD_LAYERS[case]
        siblings.layers[1] = replace(siblings.layers[1], **change)
        change = {}
    return dict(zip(ARGUMENTS, siblings.args(), strict=True)) | change, exception, text


def tensors_of(arguments: dict) -> list[Tensor]:
    flat = [entry for value in arguments.values() for entry in (value if isinstance(value, list) else [value])]
    return [entry for entry in flat if isinstance(entry, Tensor) and not entry.is_meta]


@pytest.mark.parametrize("case", BAD)
@pytest.mark.parametrize("requires_grad", [False, True])
def test_refuses_and_changes_nothing(case, requires_grad):
    arguments, exception, text = bad_call(case)
    if requires_grad:
        arguments["x"].requires_grad_()
    before = [tensor.clone() for tensor in tensors_of(arguments)]
    with pytest.raises(exception, match=f"^lora_linear_siblings: {text}"):
        functional.lora_linear_siblings(**arguments)
    assert all(torch.equal(a, b) for a, b in zip(tensors_of(arguments), before, strict=True))


@pytest.mark.parametrize("case", [case for case in BAD if case != "device"])
def test_the_compiled_op_refuses_by_itself(case):
    """The last guard names the same argument."""
    arguments, _, text = bad_call(case)
    argument = text.split()[0]
    with pytest.raises(RuntimeError, match=f"lora_linear_siblings: .*{argument}") as error:
        torch.ops.lora_ext.lora_linear_siblings(**arguments)
    assert str(Path(__file__).parents[2]) not in str(error.value)  # no build paths


def test_a_tensor_in_place_of_a_list():
    arguments, _, _ = bad_call("x")
    arguments |= {"x": torch.randn(3, 24), "scalings": 0.5}
    with pytest.raises(TypeError, match="^lora_linear_siblings: scalings is 0.5 of type float, want a list of numbers"):
        functional.lora_linear_siblings(**arguments)


def test_under_compile_the_message_survives():
    arguments, _, text = bad_call("A")
    with pytest.raises(Exception, match=text):
        torch.compile(functional.lora_linear_siblings, backend="eager", fullgraph=True)(**arguments)


BAD_BACKWARD = {
    "x missing": ({"x": None}, "grad_lora_A is wanted but x is None"),
    "xa missing": ({"xa": None}, "grad_lora_B is wanted but xa is None"),
    "mask missing": ({"mask": None}, "dropout_p is 0.3 but mask is None"),
    "x tokens": ({"x": torch.randn(5, 24)}, r"x has 5 tokens but grad_ys\[0\] has 3"),
    "tokens": ({"grad_ys": [torch.randn(3, 20), torch.randn(4, 12)]}, r"grad_ys\[1\] has 4 tokens but grad_ys\[0\] ha"),
    "xa shape": ({"xa": torch.randn(3, 4)}, r"xa must be \[num_tokens, total_rank\] = \[3, 7\]"),
    "xa dtype": ({"xa": torch.randn(3, 7).half()}, "xa has dtype float16, want the accumulation dtype float32"),
    "mask shape": ({"mask": torch.zeros(3, 3, dtype=torch.uint8)}, r"mask must be uint8 \[3, 8\]"),
    "grad_y": (
        {"grad_ys": [torch.randn(3, 20), torch.randn(3, 7)]},
        r"weights\[1\] has out_features=12 but grad_ys\[1",
    ),
    "lengths": ({"grad_ys": [torch.randn(3, 20)]}, "grad_ys has 1 entries but weights has 2"),
}


@pytest.mark.parametrize("case", BAD_BACKWARD)
def test_backward_refuses(case):
    change, text = BAD_BACKWARD[case]
    siblings = random_siblings(((3, 24), ((20, 4), (12, 3))))
    x, weights, _, As, Bs, scalings = siblings.args()
    _, xa, mask = torch.ops.lora_ext.lora_linear_siblings(*siblings.args(), 0.3, SEED)
    arguments = dict(grad_ys=siblings.grad_ys(), x=x, weights=weights, lora_As=As, lora_Bs=Bs, xa=xa, mask=mask)
    arguments |= dict(scalings=scalings, dropout_p=0.3, output_mask=(True, True, True)) | change
    with pytest.raises(RuntimeError, match=f"lora_linear_siblings_backward: {text}"):
        torch.ops.lora_ext.lora_linear_siblings_backward(**arguments)
