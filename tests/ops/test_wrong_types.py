"""Wrong types for every argument of every public function of the ops: the error names the argument."""

from __future__ import annotations

import inspect
import warnings
from collections.abc import Iterator, Sequence
from typing import get_args, get_origin, get_type_hints

import numpy as np
import pytest
import torch
from support import op_table
from support.op_table import good_function_call
from torch import Tensor

from lora_ext import functional
from lora_ext._common.arguments import rule


def good_calls() -> dict[str, dict]:
    """Returns a call of each public function with every argument, in their order."""
    calls = {name: good_function_call(name) for name in op_table.FUNCTIONS if name != "bottleneck"}
    calls["bottleneck"] = op_table.bottleneck(activation="relu").call
    call = {name: value for name, value in op_table.linear().call.items() if name not in ("x", "bias")}
    calls["lora_merge_"] = call | {"record": True, "seed": None}
    merged = call["weight"].clone()
    calls["lora_unmerge_"] = {"weight": merged, "record": functional.lora_merge_(**call | {"weight": merged})}
    return calls


# draw_seed takes a device, as torch.empty does.
FUNCTIONS = [
    name for name in functional.__all__ if inspect.isfunction(getattr(functional, name)) and name != "draw_seed"
]
PLACES = [
    (name, argument) for name in FUNCTIONS for argument in inspect.signature(getattr(functional, name)).parameters
]

NO_TENSORS = {
    "None": None,
    "int": 3,
    "str": "a",
    "list": [1.0, 2.0],
    "dict": {1: 2},
    "array": np.ones((6, 24), dtype=np.float32),
    "bytes": b"a",
    "class": Tensor,
}
ODD_TENSORS = {
    "sparse": torch.eye(24).to_sparse(),
    "sparse rows": torch.eye(24).to_sparse_csr(),
    "nested": torch.nested.nested_tensor([torch.ones(2, 24), torch.ones(3, 24)], layout=torch.jagged),
    "complex": torch.ones(6, 24, dtype=torch.complex64),
    "conjugate": torch.ones(6, 24, dtype=torch.complex64).conj(),
    "bool": torch.ones(6, 24, dtype=torch.bool),
    "float8": torch.ones(6, 24).to(torch.float8_e4m3fn),
    "bits": torch.empty(6, 24, dtype=torch.bits8),
    "meta": torch.empty(6, 24, device="meta"),
}
if hasattr(torch, "quantize_per_tensor"):  # deprecated in 2.13
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "torch.quantize_per_tensor", UserWarning)
        ODD_TENSORS["quantised"] = torch.quantize_per_tensor(torch.ones(6, 24), 0.1, 0, torch.qint8)


def wrong_values(hint: object) -> Iterator[tuple[str, object]]:
    """Yields values that the annotation excludes, and tensors of a wrong layout, device or dtype."""
    for what, value in NO_TENSORS.items():
        if not rule(hint).test(value):
            yield what, value
        if get_origin(hint) is Sequence and not rule(hint).test([value]):
            yield what, [value]
    if get_origin(hint) is Sequence:
        yield "tensor without dimensions", torch.tensor(0.5)
    if Tensor in (hint, *get_args(hint)):
        yield from ODD_TENSORS.items()
    elif get_origin(hint) is Sequence and hint != Sequence[float]:
        yield from ((what, [value]) for what, value in ODD_TENSORS.items())


@pytest.mark.parametrize(("name", "argument"), PLACES)
@pytest.mark.parametrize("requires_grad", [False, True])
def test_the_error_names_the_argument(name, argument, requires_grad):
    function, call = getattr(functional, name), good_calls()[name]
    if requires_grad and "merge" not in name:
        call["x"].requires_grad_()
    tensors = [value for value in call.values() if isinstance(value, Tensor)]
    before = [tensor.detach().clone() for tensor in tensors]
    for what, value in wrong_values(get_type_hints(function)[argument]):
        if (name, argument, what) == ("lora_linear", "x", "nested"):
            continue  # test_transforms.py: it is computed
        bad = [*value, *call[argument][1:]] if isinstance(call[argument], list) and isinstance(value, list) else value
        with pytest.raises((TypeError, ValueError), match=rf"^{name}: .*\b{argument}\b") as error:
            function(**call | {argument: bad})
        assert isinstance(error.value, TypeError) or what not in NO_TENSORS, what
        assert all(map(torch.equal, tensors, before)), what


@pytest.mark.parametrize("name", FUNCTIONS)
def test_no_argument_is_forgotten(name):
    """Every public function has a call above and annotated arguments."""
    assert list(good_calls()[name]) == list(inspect.signature(getattr(functional, name)).parameters)
    getattr(functional, name)(**good_calls()[name])


def test_numbers_of_other_types():
    call = good_calls()["lora_linear"] | {"scaling": 0.5}
    expected = functional.lora_linear(**call)
    for scaling in (np.float64(0.5), np.float32(0.5), torch.tensor(0.5)):
        assert torch.equal(functional.lora_linear(**call | {"scaling": scaling}), expected)
    with pytest.raises(ValueError, match="^lora_linear: scaling is 1000.*, want a finite number"):
        functional.lora_linear(**call | {"scaling": 10**400})
    with pytest.raises(TypeError, match="lora_grouped_: scalings is of type bytes, want a torch.Tensor or a list"):
        functional.lora_grouped_(**good_calls()["lora_grouped_"] | {"scalings": b"\x01"})


class Named(Tensor):
    """A subclass without overrides."""


def test_subclasses_go_on_working():
    call = good_calls()["lora_linear"]
    expected = functional.lora_linear(**call)
    for name in ("x", "weight", "lora_A"):
        result = functional.lora_linear(**call | {name: call[name].as_subclass(Named)})
        assert isinstance(result, Named) and torch.equal(result.as_subclass(Tensor), expected)
