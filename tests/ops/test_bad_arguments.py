"""Bad arguments, made from a good call of each op: the compiled op, its fake kernel and its function refuse them.

All three do in the same words, which name the argument, and change nothing; what they accept has the same shapes and
dtypes. test_wrong_types.py has values of types that no argument has.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from support import op_table
from support.op_table import (
    HAVE_KERNELS,
    good_call,
    good_function_call,
    label,
    op_named,
    op_of_function,
    tensors_of,
    with_entry,
)
from torch import Tensor
from torch.utils import _pytree as pytree

from lora_ext import functional

HERE = torch.get_default_device()
DTYPES = [torch.float64, torch.bfloat16, torch.float16, torch.int32, torch.uint8, torch.int64, torch.complex64]


def other_tensors(tensor: Tensor) -> Iterator[tuple[str, Tensor | None]]:
    """Yields right and wrong values for a tensor argument."""
    yield "None", None
    for dtype in DTYPES:
        yield str(dtype).removeprefix("torch."), tensor.to(dtype)
    yield "one dimension more", tensor[None]
    yield "one dimension less", tensor.flatten(0, 1) if tensor.dim() > 1 else tensor.sum()
    yield "no dimension", tensor.flatten()[0]
    yield "every other element", torch.stack([tensor, tensor], -1)[..., 0]
    for dim in range(tensor.dim()):
        yield f"longer in {dim}", torch.cat([tensor, tensor.narrow(dim, 0, 1)], dim)
        yield f"shorter in {dim}", tensor.narrow(dim, 0, tensor.shape[dim] - 1)
        yield f"nothing in {dim}", tensor.narrow(dim, 0, 0)
    if tensor.dim() > 1:
        yield "turned", tensor.mT
        yield "rows that are one", tensor[:1].expand(tensor.shape)


OTHER_NUMBERS = {
    "scaling": [math.nan, math.inf, -1.0, 0.0],
    "dropout_p": [math.nan, 1.0, -0.1, 0.0, 1e-9],
    "output_mask": [(False,) * 3, (True,) * 2, (True,) * 3, (False, True, False)],
    "first_row": [-1, 2**62],
    "seed": [-(2**63), 2**64],
    "num_tokens": [-1, 0, 2**40],
    "in_features": [-1, 0, 2**62],
}


def other_calls(op: str, call: dict) -> Iterator[tuple[str, dict]]:
    yield "good", call
    for name, i, tensor in list(tensors_of(call)):
        for what, other in other_tensors(tensor):
            yield f"{label(name, i)}: {what}", with_entry(call, name, i, other)
    for name, value in call.items():
        for other in OTHER_NUMBERS.get(name.removesuffix("s"), []):
            yield f"{name}: {other}", call | {name: [other, *value[1:]] if isinstance(value, list) else other}
        if isinstance(value, list):
            yield f"{name}: one more", call | {name: [*value, *(value[:1] or [torch.randn(5)])]}
            yield f"{name}: one less", call | {name: value[:-1]}
            yield f"{name}: empty", call | {name: []}
    many = {name: [*value, *value[:1] * 9][:9] for name, value in call.items() if isinstance(value, list)}
    if "scalings" in many:
        yield "nine layers", call | many


def outcome(function: Callable, call: dict) -> tuple[str, list]:
    """Returns the text of the refusal, or "", and what is known of the results."""
    try:
        results = function(**call)
    except (RuntimeError, ValueError, TypeError) as error:
        return str(error), []
    return "", [(tuple(t.shape), t.dtype) if isinstance(t, Tensor) else t for t in pytree.tree_leaves(results)]


def on_meta(tensor: Tensor) -> Tensor:
    return torch.empty_strided(tensor.shape, tensor.stride(), dtype=tensor.dtype, device="meta")


@pytest.mark.full(but=3)
@pytest.mark.parametrize("op", HAVE_KERNELS)
def test_the_op_and_its_fake_refuse_or_agree(op):
    refused = accepted = 0
    for what, call in other_calls(op, good_call(op)):
        refusal, results = outcome(op_named(op), call)
        fake = {name: pytree.tree_map_only(Tensor, on_meta, value) for name, value in call.items()}
        fake_refusal, fake_results = outcome(op_named(op), fake)
        if "out of memory" in refusal:  # a fake kernel needs no memory
            continue
        if op.startswith("lora_merge_record_") and not refusal:  # a meta tensor cannot tell the length of a record
            accepted += 1
            continue
        assert bool(refusal) == bool(fake_refusal), f"{what}:\n{refusal or 'accepted'}\n{fake_refusal or 'accepted'}"
        assert results == fake_results, what
        if "lora_ext::" not in refusal:  # otherwise the message is PyTorch's
            assert refusal == fake_refusal, what
            assert not refusal or refusal.startswith(f"{op.partition(' ')[0]}: "), refusal
            assert str(Path(__file__).parents[2]) not in refusal  # no build paths
        refused, accepted = refused + bool(refusal), accepted + (not refusal)
    assert refused >= 10 and accepted > 1


def test_the_op_of_rows_that_choose_refuses_with_gradients_what_it_refuses_without():
    good = good_call("lora_grouped_linear")
    for what, call in other_calls("lora_grouped_linear", good):
        refusal, _ = outcome(op_named("lora_grouped_linear"), call)
        leaf = call["x"].detach().requires_grad_() if call["x"] is not None and call["x"].is_floating_point() else None
        if not refusal or leaf is None:
            continue
        with pytest.raises((ValueError, TypeError, RuntimeError)) as error:
            op_named("lora_grouped_linear")(**call | {"x": leaf})
        assert "lora_grouped_linear" in str(error.value), what


@pytest.mark.parametrize("requires_grad", [False, True])
@pytest.mark.parametrize("name", [name for name in op_table.FUNCTIONS if name != "bottleneck"])
def test_the_function_refuses_what_the_op_refuses(name, requires_grad):
    good = good_function_call(name)
    good["x"].requires_grad_(requires_grad)
    for what, call in other_calls(name, good):
        if what == "seed: None":
            continue  # it is drawn
        op, arguments = op_of_function(name, pytree.tree_map_only(Tensor, lambda t: t.detach().clone(), call))
        refusal, _ = outcome(op, arguments)
        tensors = [tensor for _, _, tensor in tensors_of(call)]
        before = [tensor.detach().clone() for tensor in tensors]
        if not refusal:
            getattr(functional, name)(**pytree.tree_map_only(Tensor, torch.clone, call))
            continue
        with pytest.raises((ValueError, TypeError), match=rf"^{name}: ") as error:
            getattr(functional, name)(**call)
        if "lora_ext::" not in refusal and " is None, " not in refusal:
            expected = refusal.partition(": ")[2]
            assert str(error.value) == f"{name}: {expected}" or (what, name) == ("bases: empty", "lora_delta_siblings")
        said = str(error.value)
        of_types = any(words in said for words in (" has dtype ", " of type ", " is None, "))
        assert isinstance(error.value, TypeError) == of_types, what
        argument = what.partition(":")[0].partition("[")[0]
        assert argument in said or what == "nine layers" or "group_of_row" in said, what
        assert all(map(torch.equal, tensors, before)), what


# The words of one refusal of each kind, for a call with [2, 3, 24] tokens, layers of 20 and 12, ranks 4 and 3.
TEXTS = [
    ("lora_linear", "x: longer in 2", "weight has in_features=24 but x has 25"),
    ("lora_linear", "x: no dimension", "x has no dimension"),
    ("lora_linear", "weight: one dimension less", r"weight has shape \[480\], want 2 dimensions"),
    ("lora_linear", "lora_A: shorter in 1", "lora_A has in_features=23 but weight has 24"),
    ("lora_linear", "lora_B: shorter in 0", "lora_B has out_features=19 but weight has 20"),
    ("lora_linear", "lora_B: shorter in 1", "lora_B has rank 3 but lora_A has 4"),
    ("lora_linear", "lora_A: nothing in 0", "lora_A has rank 0, want at least 1"),
    ("lora_linear", "bias: one dimension more", r"bias has shape \[1, 20\], want \[20\]"),
    ("lora_linear", "x: bfloat16", "weight has dtype float32 but x has bfloat16"),
    ("lora_linear", "lora_B: float64", "lora_B has dtype float64 but lora_A has float32"),
    ("lora_linear", "lora_A: int32", "lora_A has dtype int32, want one of"),
    ("lora_linear", "scaling: nan", "scaling is nan, want a finite number"),
    ("lora_linear", "scaling: -1.0", "scaling is -1.0, want at least 0"),
    ("lora_linear", "dropout_p: 1.0", "dropout_p is 1.0, want 0 <= dropout_p < 1"),
    ("lora_linear", "seed: float64", r"seed is float64 \[\], want an int64"),
    ("lora_linear", "seed: None", "dropout_p is 0.3 but seed is None"),
    ("lora_delta_", "x: longer in 0", r"x has shape \[3, 3, 24\] but y has \[2, 3, 20\]"),
    ("lora_delta_", "y: rows that are one", r"y has strides \[0, 20, 1\], want a contiguous tensor"),
    ("lora_linear_siblings", "weights[1]: float16", r"weights\[1\] has dtype float16 but x has float32"),
    ("lora_linear_siblings", "biases: one less", "biases has 1 entries but weights has 2"),
    ("lora_linear_siblings", "nine layers", "weights has 9 entries, want 1 to 8"),
    ("lora_grouped_", "lora_Bs[0]: shorter in 0", r"lora_Bs\[0\] has 1 slots but lora_As\[0\] has 2"),
    ("lora_grouped_", "lora_As[0]: one dimension less", r"lora_Bs\[0\] has shape \[2, 20, 4\] but lora_As\[0\] "),
    ("lora_grouped_", "lora_As: empty", "lora_As is empty, want at least one"),
    ("lora_grouped_", "group_of_row: int32", "group_of_row has dtype int32, want int64"),
    ("lora_grouped_", "scalings: shorter in 0", r"scalings has shape \[1\], want \[2\]: a number for each group"),
    ("lora_grouped_", "ranks: longer in 0", r"ranks has shape \[3\], want \[2\]"),
    ("lora_linear_backward", "x: None", "grad_lora_A is wanted but x is None"),
    ("lora_linear_backward", "xa: None", "grad_lora_B is wanted but xa is None"),
    ("lora_linear_backward", "mask: None", "dropout_p is 0.3 but mask is None"),
    ("lora_linear_backward", "x: shorter in 0", "x has 3 tokens but grad_y has 6"),
    ("lora_linear_backward", "grad_y: shorter in 2", "weight has out_features=20 but grad_y has 19"),
    ("lora_linear_backward", "xa: float16", "xa has dtype float16, want the accumulation dtype float32"),
    ("lora_linear_backward", "mask: shorter in 1", r"mask must be uint8 \[6, 8\]"),
    ("lora_linear_siblings_backward", "xa: shorter in 1", r"xa must be \[num_tokens, total_rank\] = \[6, 7\]"),
    ("lora_linear_siblings_backward", "grad_ys[1]: longer in 0", r"grad_ys\[1\] has 9 tokens but grad_ys\[0\] has 6"),
    ("lora_shrink", "lora_A: longer in 1", "lora_A has in_features=25 but x has 24"),
    ("lora_expand", "xa: shorter in 2", "lora_B has rank 4 but xa has 3"),
    ("lora_expand", "xa: shorter in 0", "xa has 3 tokens but base has 6"),
    ("lora_shrink_backward", "base: longer in 1", "base has 8 tokens but x has 6"),
    ("lora_shrink_backward", "output_mask: (True, True, True)", "output_mask has 3 entries, want 2"),
    # Weights of [5, 300] and [3, 20], rank 2.
    ("lora_merge_", "weights[1]: shorter in 1", r"lora_As\[1\] has in_features=20 but weights\[1\] has 19"),
    ("lora_merge_", "lora_Bs[1]: longer in 0", r"lora_Bs\[1\] has out_features=4 but weights\[1\] has 3"),
    ("lora_merge_", "weights[0]: every other element", r"weights\[0\] has column stride 2, want 1"),
    ("lora_merge_ with draws", "seeds: one more", "seeds has 3 entries and first_rows has 2, want 2 for 2 weights"),
    ("lora_merge_ with draws", "first_rows: -1", "first_rows is -1, want at least 0"),
    ("lora_unmerge_ with draws", "seeds: empty", "seeds has 0 entries"),
    ("lora_merge_record_", "weights[0]: rows that are one", r"weights\[0\] has row stride 0 but 300 columns"),
    ("lora_unmerge_", "words[0]: turned", r"words\[0\] must be int16 \[5, 2\], contiguous"),
    ("lora_unmerge_", "words: empty", "words has 0 entries but corrections has 2"),
    ("lora_unmerge_", "corrections[0]: int32", r"corrections\[0\] must be an int16 vector"),
]


@pytest.mark.parametrize(("op", "what", "text"), TEXTS)
def test_the_words(op, what, text):
    call = dict(other_calls(op, good_call(op)))[what]
    with pytest.raises(RuntimeError, match=f"{op.partition(' ')[0]}: {text}"):
        op_named(op)(**call)


# --- functions that are no ops, and lists -----------------------------------------------------------------------------


def test_numbers_and_lists_of_other_forms():
    call = op_table.siblings().call
    with pytest.raises(TypeError, match="^lora_linear_siblings: scalings is 0.5 of type float, want a list of numbers"):
        functional.lora_linear_siblings(**call | {"scalings": 0.5})
    call = op_table.grouped().call
    with pytest.raises(ValueError, match=r"^lora_grouped_: scalings has shape \[1\], want \[4\]: a number for each"):
        functional.lora_grouped_(**call | {"scalings": [1.0]})


@pytest.mark.parametrize("op", ["lora_linear", "lora_linear_siblings"])
def test_under_compile_the_message_survives(op):
    call = dict(other_calls(op, good_function_call(op)))["x: longer in 2"]
    with pytest.raises(Exception, match=r"has in_features=24 but x has 25"):
        torch.compile(getattr(functional, op), backend="eager", fullgraph=True)(**call)


BAD_BOTTLENECK = {
    "x: longer in 1": "down_weight has in_features=24 but x has 25",
    "x: no dimension": "x has no dimension",
    "down_weight: one dimension less": r"down_weight has shape \[96\], want 2 dimensions",
    "up_weight: shorter in 1": "up_weight has size 3 but down_weight has 4",
    "up_weight: shorter in 0": "up_weight has out_features=19 but residual has 20",
    "residual: None": "up_weight has out_features=20 but x has 24",
    "residual: longer in 0": r"residual has shape \[7, 20\] but x has \[6, 24\]",
    "down_bias: longer in 0": r"down_bias has shape \[5\], want \[4\]",
    "up_bias: shorter in 0": r"up_bias has shape \[19\], want \[20\]",
    "x: int64": "x has dtype int64, want one of",
    "residual: float64": "residual has dtype float64 but x has float32",
    "activation: tanh": "activation is 'tanh', want one of relu, gelu, silu, identity",
    **{
        f"{name}: meta": f"{name} is on meta but x is on {HERE}"  # PyTorch's += takes a bias and does nothing
        for name in ("down_weight", "down_bias", "up_weight", "up_bias", "residual")
    },
}


@pytest.mark.parametrize("requires_grad", [False, True])
@pytest.mark.parametrize("what", BAD_BOTTLENECK)
def test_a_bottleneck_refuses(what, requires_grad):
    good = op_table.bottleneck().call
    calls = dict(other_calls("bottleneck", good)) | {"activation: tanh": good | {"activation": "tanh"}}
    calls |= {f"{name}: meta": with_entry(good, name, None, t.to("meta")) for name, _, t in tensors_of(good)}
    call = calls[what]
    if call["x"].is_floating_point():
        call["x"] = call["x"].detach().requires_grad_(requires_grad)
    with pytest.raises(TypeError if " dtype " in BAD_BOTTLENECK[what] else ValueError) as error:
        functional.bottleneck(**call)
    assert error.match(f"^bottleneck: {BAD_BOTTLENECK[what]}")


BAD_MERGE = {
    "lora_A: longer in 1": "lora_A has in_features=25 but weight has 24",
    "lora_B: shorter in 0": "lora_B has out_features=19 but weight has 20",
    "scaling: nan": "scaling is nan, want a finite number",
    "weight: int32": "weight has dtype int32, want one of",
    "weight: rows that are one": "weight has row stride 0 but 24 columns",
}


@pytest.mark.parametrize("what", BAD_MERGE)
def test_lora_merge_refuses_and_changes_nothing(what):
    good = {key: value for key, value in op_table.linear().call.items() if key not in ("x", "bias")}
    call = dict(other_calls("lora_merge_", good))[what]
    before = call["weight"].clone()
    with pytest.raises(TypeError if " dtype " in BAD_MERGE[what] else ValueError) as error:
        functional.lora_merge_(**call)
    assert error.match(f"^lora_merge_: {BAD_MERGE[what]}") and torch.equal(call["weight"], before)
