"""The checks in Python (of fake kernels) and those of the compiled ops agree: both refuse a bad call in the same words,
and for a good one they agree on the results' shapes and dtypes.
"""

from __future__ import annotations

import math
from collections.abc import Iterator

import pytest
import torch
from support.op_calls import HAVE_KERNELS, good_call, label, op_named, tensors_of, with_entry
from torch import Tensor
from torch.utils import _pytree as pytree

DTYPES = [torch.float64, torch.bfloat16, torch.float16, torch.int32, torch.uint8, torch.int64, torch.complex64]


def other_tensors(tensor: Tensor) -> Iterator[tuple[str, Tensor | None]]:
    """Yields right and wrong values for a tensor argument."""
    yield "None", None
    for dtype in DTYPES:
        yield str(dtype), tensor.to(dtype)
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
    "num_tokens": [-1, 0, 2**40],
    "in_features": [-1, 0, 2**62],
}


def other_calls(op: str) -> Iterator[tuple[str, dict]]:
    call = good_call(op)
    yield "good", call
    for name, i, tensor in list(tensors_of(call)):
        for what, other in other_tensors(tensor):
            yield f"{label(name, i)}: {what}", with_entry(call, name, i, other)
    for name, value in call.items():
        for other in OTHER_NUMBERS.get(name.removesuffix("s"), []):
            yield f"{name}: {other}", call | {name: [other, *value[1:]] if isinstance(value, list) else other}
        if isinstance(value, list):
            yield f"{name}: one more", call | {name: [*value, value[0]]}
            yield f"{name}: one less", call | {name: value[:-1]}
            yield f"{name}: empty", call | {name: []}


def on_meta(tensor: Tensor) -> Tensor:
    return torch.empty_strided(tensor.shape, tensor.stride(), dtype=tensor.dtype, device="meta")


def outcome(op: str, call: dict) -> tuple[str, list]:
    """Returns the text of the refusal, or "", and what is known of the results."""
    try:
        results = op_named(op)(**call)
    except (RuntimeError, ValueError, TypeError) as error:
        return str(error), []
    return "", [(tuple(t.shape), t.dtype) if isinstance(t, Tensor) else t for t in pytree.tree_leaves(results)]


@pytest.mark.parametrize("op", HAVE_KERNELS)
def test_both_refuse_or_agree(op):
    refused = accepted = 0
    for what, call in other_calls(op):
        refusal, results = outcome(op, call)
        fake = {name: pytree.tree_map_only(Tensor, on_meta, value) for name, value in call.items()}
        fake_refusal, fake_results = outcome(op, fake)
        if "out of memory" in refusal:  # a fake kernel needs no memory
            continue
        if op == "lora_merge_record_" and not refusal:  # a meta tensor cannot tell the length of a record
            accepted += 1
            continue
        assert bool(refusal) == bool(fake_refusal), f"{what}:\n{refusal or 'accepted'}\n{fake_refusal or 'accepted'}"
        assert results == fake_results, what
        if f"lora_ext::{op}" not in refusal:  # otherwise the message is PyTorch's
            assert refusal == fake_refusal, what
            assert not refusal or refusal.startswith(f"{op}: "), refusal
        refused, accepted = refused + bool(refusal), accepted + (not refusal)
    assert refused >= 10 and accepted > 1
