"""Refusals by functions and ops: they name the argument and the values, and change nothing."""

from pathlib import Path

import pytest
import torch
from support.layers import random_layer

from lora_ext import functional

SEED = torch.tensor(1)
HERE = torch.get_default_device()

# case -> (changes of a good call, exception, text)
BAD_LINEAR = {
    "in_features": ({"x": torch.randn(3, 9)}, ValueError, "weight has in_features=24 but x has 9"),
    "no dimension": ({"x": torch.tensor(1.0)}, ValueError, "x has no dimension"),
    "weight 1-D": ({"weight": torch.randn(24)}, ValueError, r"weight has shape \[24\], want 2 dimensions"),
    "A in_features": ({"lora_A": torch.randn(4, 5)}, ValueError, "lora_A has in_features=5 but weight has 24"),
    "B out_features": ({"lora_B": torch.randn(7, 4)}, ValueError, "lora_B has out_features=7 but weight has 20"),
    "ranks": ({"lora_B": torch.randn(20, 3)}, ValueError, "lora_B has rank 3 but lora_A has 4"),
    "rank 0": (
        {"lora_A": torch.randn(0, 24), "lora_B": torch.randn(20, 0)},
        ValueError,
        "lora_A has rank 0, want at least 1",
    ),
    "bias": ({"bias": torch.randn(3)}, ValueError, r"bias has shape \[3\], want \[20\]"),
    "bias 2-D": ({"bias": torch.randn(2, 20)}, ValueError, r"bias has shape \[2, 20\], want \[20\]"),
    "x dtype": ({"x": torch.randn(3, 24).bfloat16()}, TypeError, "weight has dtype float32 but x has bfloat16"),
    "bias dtype": ({"bias": torch.randn(20).half()}, TypeError, "bias has dtype float16 but x has float32"),
    "factor dtypes": ({"lora_B": torch.randn(20, 4).double()}, TypeError, "lora_B has dtype float64 but lora_A has fl"),
    "integers": ({"lora_A": torch.ones(4, 24, dtype=torch.int32)}, TypeError, "lora_A has dtype int32, want one of"),
    "device": ({"lora_A": torch.randn(4, 24, device="meta")}, ValueError, f"lora_A is on meta but x is on {HERE}"),
    "scaling nan": ({"scaling": float("nan")}, ValueError, "scaling is nan, want a finite number"),
    "scaling < 0": ({"scaling": -0.5}, ValueError, "scaling is -0.5, want at least 0"),
    "scaling inf": ({"scaling": float("inf")}, ValueError, "scaling is inf, want a finite number"),
    "dropout 1": ({"dropout_p": 1.0, "seed": SEED}, ValueError, "dropout_p is 1.0, want 0 <= dropout_p < 1"),
    "dropout < 0": ({"dropout_p": -0.1}, ValueError, "dropout_p is -0.1, want 0 <= dropout_p < 1"),
    "dropout nan": ({"dropout_p": float("nan")}, ValueError, "dropout_p is nan, want 0 <= dropout_p < 1"),
    "seed dtype": ({"dropout_p": 0.1, "seed": torch.tensor(1.0)}, ValueError, r"seed is float32 \[\], want an int64"),
    "seed size": ({"dropout_p": 0.1, "seed": torch.tensor([1, 2])}, ValueError, r"seed is int64 \[2\], want an int64"),
}


def good_call() -> dict:
    layer = random_layer((3, 24, 20, 4))
    names = ("x", "weight", "bias", "lora_A", "lora_B", "scaling")
    return dict(zip(names, layer.args(), strict=True))


@pytest.mark.parametrize("case", BAD_LINEAR)
@pytest.mark.parametrize("requires_grad", [False, True])
def test_lora_linear_refuses(case, requires_grad):
    change, exception, text = BAD_LINEAR[case]
    arguments = good_call()
    if requires_grad:
        arguments["x"].requires_grad_()
    with pytest.raises(exception, match=f"^lora_linear: {text}"):
        functional.lora_linear(**(arguments | change))


@pytest.mark.parametrize("case", [case for case in BAD_LINEAR if case != "device"])
def test_the_compiled_op_refuses_by_itself(case):
    """The last guard: bad arguments that pass Python's checks must not reach a pointer."""
    change, _, _ = BAD_LINEAR[case]
    with pytest.raises(RuntimeError, match="lora_linear: ") as error:
        torch.ops.lora_ext.lora_linear(**(good_call() | change))
    assert str(Path(__file__).parents[2]) not in str(error.value)  # no build paths


def test_seed_is_required_by_the_op():
    with pytest.raises(RuntimeError, match="dropout_p is 0.1 but seed is None"):
        torch.ops.lora_ext.lora_linear(**good_call(), dropout_p=0.1)


def test_under_compile_the_message_survives():
    arguments = good_call() | {"lora_A": torch.randn(4, 5)}
    with pytest.raises(Exception, match="lora_A has in_features=5 but weight has 24"):
        torch.compile(functional.lora_linear, backend="eager", fullgraph=True)(**arguments)


BAD_MERGE = {
    "A": ({"lora_A": torch.randn(4, 5)}, ValueError, "lora_A has in_features=5 but weight has 24"),
    "B": ({"lora_B": torch.randn(7, 4)}, ValueError, "lora_B has out_features=7 but weight has 20"),
    "nan": ({"scaling": float("nan")}, ValueError, "scaling is nan, want a finite number"),
    "integers": ({"weight": torch.ones(20, 24, dtype=torch.int8)}, TypeError, "weight has dtype int8, want one of"),
    "columns": ({"weight": torch.randn(24, 20).T}, ValueError, "weight has column stride 20, want 1"),
    "overlap": ({"weight": torch.randn(1, 24).expand(20, 24)}, ValueError, "weight has row stride 0 but 24 columns"),
}


@pytest.mark.parametrize("case", BAD_MERGE)
def test_lora_merge_refuses_and_changes_nothing(case):
    change, exception, text = BAD_MERGE[case]
    arguments = {key: value for key, value in good_call().items() if key not in ("x", "bias")} | change
    before = arguments["weight"].clone()
    with pytest.raises(exception, match=f"^lora_merge_: {text}"):
        functional.lora_merge_(**arguments)
    if "scaling" not in change:  # the op's lora_B is already multiplied by it
        lists = [arguments["weight"]], [arguments["lora_A"]], [arguments["lora_B"]]
        for op, record in {"lora_merge_": (), "lora_merge_record_": (), "lora_unmerge_": ([], [])}.items():
            with pytest.raises(RuntimeError, match=rf"{op}: (weight|lora_[AB])s\[0\] "):
                getattr(torch.ops.lora_ext, op)(*lists, *record)
    assert torch.equal(arguments["weight"], before)


BAD_BACKWARD = {
    "x missing": ({"x": None}, "grad_lora_A is wanted but x is None"),
    "xa missing": ({"xa": None}, "grad_lora_B is wanted but xa is None"),
    "mask missing": ({"mask": None}, "dropout_p is 0.3 but mask is None"),
    "x tokens": ({"x": torch.randn(5, 24)}, "x has 5 tokens but grad_y has 3"),
    "xa shape": ({"xa": torch.randn(3, 5)}, r"xa must be \[num_tokens, rank\] = \[3, 4\]"),
    "xa dtype": ({"xa": torch.randn(3, 4).half()}, "xa has dtype float16, want the accumulation dtype float32"),
    "mask shape": ({"mask": torch.zeros(3, 3, dtype=torch.uint8)}, r"mask must be uint8 \[3, 8\]"),
    "grad_y": ({"grad_y": torch.randn(3, 7)}, "weight has out_features=20 but grad_y has 7"),
    "mask length": ({"output_mask": (True, True)}, "output_mask has 2 entries, want 3|expected|bool"),
}


@pytest.mark.parametrize("case", BAD_BACKWARD)
def test_backward_refuses(case):
    change, text = BAD_BACKWARD[case]
    layer = random_layer((3, 24, 20, 4))
    _, xa, mask = torch.ops.lora_ext.lora_linear(*layer.args(), 0.3, SEED)
    arguments = dict(
        grad_y=layer.grad_y, x=layer.x, weight=layer.weight, lora_A=layer.lora_A, lora_B=layer.lora_B, xa=xa, mask=mask
    )
    arguments |= dict(scaling=0.5, dropout_p=0.3, output_mask=(True, True, True)) | change
    with pytest.raises(RuntimeError, match=text):
        torch.ops.lora_ext.lora_linear_backward(**arguments)
