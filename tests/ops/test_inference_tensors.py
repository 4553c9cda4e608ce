"""Inference tensors that a backward would need are refused by name; PyTorch's own message names none."""

from __future__ import annotations

import pytest
import torch
from support.op_calls import good_call
from torch import Tensor

from lora_ext import functional


def inference(tensor: Tensor) -> Tensor:
    with torch.inference_mode():
        return tensor.clone()


def bottleneck() -> dict[str, object]:
    return {
        "x": torch.randn(3, 6),
        "down_weight": torch.randn(2, 6),
        "down_bias": None,
        "up_weight": torch.randn(6, 2),
        "up_bias": None,
    }


FUNCTIONS = {
    "lora_linear": lambda: good_call("lora_linear"),
    "lora_linear_siblings": lambda: good_call("lora_linear_siblings"),
    "lora_delta_siblings": lambda: good_call("lora_delta_siblings"),
    "bottleneck": bottleneck,
}
OPS = {name: getattr(torch.ops.lora_ext, name).default for name in ("lora_shrink", "lora_expand")}
CASES = [
    ("lora_linear", "x", "lora_A"),
    ("lora_linear", "lora_B", "x"),
    ("lora_linear_siblings", "lora_As", "x"),
    ("lora_delta_siblings", "lora_Bs", "x"),
    ("bottleneck", "down_weight", "up_weight"),
    ("bottleneck", "x", "down_weight"),
    ("lora_shrink", "x", "lora_A"),
    ("lora_expand", "xa", "lora_B"),
]


@pytest.mark.parametrize(("name", "held", "trained"), CASES)
def test_the_argument_is_named(name, held, trained):
    call = FUNCTIONS[name]() if name in FUNCTIONS else good_call(name)
    if isinstance(call[held], list):
        call[held] = [inference(call[held][0]), *call[held][1:]]
    else:
        call[held] = inference(call[held])
    call[trained] = call[trained].detach().requires_grad_()
    label = rf"{held}\[0\]" if isinstance(call[held], list) else held
    text = rf"^{name}: {label} is an inference tensor, which autograd cannot keep for the backward; pass {label}\.clone"
    with pytest.raises(RuntimeError, match=text):
        getattr(functional, name)(**call) if name in FUNCTIONS else OPS[name](*call.values())


def test_all_of_them_are_named():
    call = bottleneck()
    call |= {"x": inference(call["x"]), "up_weight": inference(call["up_weight"])}
    call["down_weight"].requires_grad_()
    with pytest.raises(
        RuntimeError, match=r"^bottleneck: x, up_weight are inference tensors, .*pass x\.clone\(\), up_w"
    ):
        functional.bottleneck(**call)
