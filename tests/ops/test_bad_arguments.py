"""Refusals by functions and ops: they name the argument and the values, and change nothing."""

import re
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from support.layers import random_layer, random_siblings
from support.op_calls import good_call as good_op_call
from support.op_calls import tensors_of

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


NAMES = ("x", "weight", "bias", "lora_A", "lora_B", "scaling")
LISTS = ("x", "weights", "biases", "lora_As", "lora_Bs", "scalings")
PLURALS = dict(zip(NAMES, LISTS, strict=True))
# Changes of the second of two siblings. Its other refusals are those above, by the names of lists.
BAD_SIBLING = {
    "in_features of one": (
        {"weight": torch.randn(20, 9), "lora_A": torch.randn(4, 9)},
        ValueError,
        "weight has in_fea",
    ),
    "weight dtype": ({"weight": torch.randn(20, 24).half()}, TypeError, "weight has dtype float16 but x has float32"),
    "factors of two dtypes": (
        {"lora_A": torch.randn(4, 24).double(), "lora_B": torch.randn(20, 4).double()},
        TypeError,
        r"lora_A has dtype float64 but lora_As\[0\] has float32",
    ),
}
BAD_LISTS = {
    "no layer": ({name: [] for name in LISTS[1:]}, ValueError, "weights has 0 entries, want 1 to 8"),
    "nine layers": (
        {name: [torch.randn(2, 2)] * 9 for name in LISTS[1:5]} | {"scalings": [0.5] * 9},
        ValueError,
        "weights has 9 entries, want 1 to 8",
    ),
    "biases": ({"biases": [None]}, ValueError, "biases has 1 entries but weights has 2"),
    "lora_As": ({"lora_As": [torch.randn(4, 24)]}, ValueError, "lora_As has 1 entries but weights has 2"),
    "lora_Bs": ({"lora_Bs": [torch.randn(20, 4)] * 3}, ValueError, "lora_Bs has 3 entries but weights has 2"),
    "scalings": ({"scalings": [0.5]}, ValueError, "scalings has 1 entries but weights has 2"),
}
CASES = [("lora_linear", case) for case in BAD_LINEAR]
CASES += [("lora_linear_siblings", case) for case in (*BAD_LINEAR, *BAD_SIBLING, *BAD_LISTS)]


def good_call() -> dict:
    return dict(zip(NAMES, random_layer((3, 24, 20, 4)).args(), strict=True))


def bad_call(op: str, case: str) -> tuple[dict, type[Exception], str]:
    """Returns arguments, the exception, and its text. Of siblings the second is the layer of ``good_call``."""
    if op == "lora_linear":
        change, exception, text = BAD_LINEAR[case]
        return good_call() | change, exception, text
    siblings = random_siblings(((3, 24), ((12, 3), (20, 4))))
    change, exception, text = (BAD_LINEAR | BAD_SIBLING | BAD_LISTS)[case]
    of_layer = {name: value for name, value in change.items() if name in NAMES[1:]}
    index = 1 if of_layer else 0  # x is compared with the first layer
    text = re.sub(r"\b(weight|bias|lora_A|lora_B|scaling)\b", lambda m: rf"{PLURALS[m[1]]}\[{index}\]", text)
    siblings.layers[1] = replace(siblings.layers[1], **of_layer)
    others = {name: value for name, value in change.items() if name not in of_layer}
    return dict(zip(LISTS, siblings.args(), strict=True)) | others, exception, text


@pytest.mark.parametrize(("op", "case"), CASES)
@pytest.mark.parametrize("requires_grad", [False, True])
def test_refuses_and_changes_nothing(op, case, requires_grad):
    arguments, exception, text = bad_call(op, case)
    if requires_grad:
        arguments["x"].requires_grad_()
    tensors = [tensor for _, _, tensor in tensors_of(arguments) if not tensor.is_meta]
    before = [tensor.clone() for tensor in tensors]
    with pytest.raises(exception, match=f"^{op}: {text}"):
        getattr(functional, op)(**arguments)
    assert all(torch.equal(a, b) for a, b in zip(tensors, before, strict=True))


@pytest.mark.parametrize(("op", "case"), [(op, case) for op, case in CASES if case != "device"])
def test_the_compiled_op_refuses_by_itself(op, case):
    """The last guard names the same argument: bad ones that pass Python's checks must not reach a pointer."""
    arguments, _, text = bad_call(op, case)
    with pytest.raises(RuntimeError, match=f"{op}: .*{text.split()[0]}") as error:
        getattr(torch.ops.lora_ext, op)(**arguments)
    assert str(Path(__file__).parents[2]) not in str(error.value)  # no build paths


def test_seed_is_required_by_the_op():
    with pytest.raises(RuntimeError, match="dropout_p is 0.1 but seed is None"):
        torch.ops.lora_ext.lora_linear(**good_call(), dropout_p=0.1)


def test_a_number_in_place_of_a_list():
    arguments, _, _ = bad_call("lora_linear_siblings", "scalings")
    with pytest.raises(TypeError, match="^lora_linear_siblings: scalings is 0.5 of type float, want a list of numbers"):
        functional.lora_linear_siblings(**arguments | {"scalings": 0.5})


@pytest.mark.parametrize("op", ["lora_linear", "lora_linear_siblings"])
def test_under_compile_the_message_survives(op):
    arguments, _, text = bad_call(op, "A in_features")
    with pytest.raises(Exception, match=text):
        torch.compile(getattr(functional, op), backend="eager", fullgraph=True)(**arguments)


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


# Changes of a good call of a backward of 6 tokens, and the text. {rank}, {total}: its name and size.
BAD_BACKWARD = {
    "x missing": (lambda call: {"x": None}, "grad_lora_A is wanted but x is None"),
    "xa missing": (lambda call: {"xa": None}, "grad_lora_B is wanted but xa is None"),
    "mask missing": (lambda call: {"mask": None}, "dropout_p is 0.3 but mask is None"),
    "xa shape": (lambda call: {"xa": call["xa"][:, 1:]}, r"xa must be \[num_tokens, {rank}\] = \[6, {total}\]"),
    "xa dtype": (lambda call: {"xa": call["xa"].half()}, "xa has dtype float16, want the accumulation dtype float32"),
    "mask shape": (lambda call: {"mask": call["mask"][:, 1:]}, r"mask must be uint8 \[6, 8\]"),
    "mask length": (lambda call: {"output_mask": (True, True)}, "output_mask has 2 entries, want 3|expected|bool"),
}
BAD_BACKWARDS = {
    "lora_linear_backward": {
        "x tokens": (lambda call: {"x": torch.randn(5, 24)}, "x has 5 tokens but grad_y has 6"),
        "grad_y": (lambda call: {"grad_y": torch.randn(6, 7)}, "weight has out_features=20 but grad_y has 7"),
    },
    "lora_linear_siblings_backward": {
        "x tokens": (lambda call: {"x": torch.randn(5, 24)}, r"x has 5 tokens but grad_ys\[0\] has 6"),
        "tokens": (
            lambda call: {"grad_ys": [torch.randn(6, 20), torch.randn(4, 12)]},
            r"grad_ys\[1\] has 4 tokens but grad_ys\[0\] has 6",
        ),
        "grad_y": (
            lambda call: {"grad_ys": [torch.randn(6, 20), torch.randn(6, 7)]},
            r"weights\[1\] has out_features=12 but grad_ys\[1\] has 7",
        ),
        "lengths": (lambda call: {"grad_ys": call["grad_ys"][:1]}, "grad_ys has 1 entries but weights has 2"),
    },
    "lora_delta_backward": {
        "grad_y": (lambda call: {"grad_y": torch.randn(6, 7)}, "lora_B has out_features=20 but grad_y has 7"),
    },
}


@pytest.mark.parametrize(
    ("op", "case"), [(op, case) for op, own in BAD_BACKWARDS.items() for case in BAD_BACKWARD | own]
)
def test_backward_refuses(op, case):
    call = good_op_call(op)
    change, text = (BAD_BACKWARD | BAD_BACKWARDS[op])[case]
    names = {"rank": "total_rank" if "siblings" in op else "rank", "total": call["xa"].shape[1]}
    start = "" if case == "mask length" else f"{op}: "  # PyTorch refuses some lengths before the op does
    with pytest.raises(RuntimeError, match=start + text.format(**names)):
        getattr(torch.ops.lora_ext, op)(**call | change(call))
