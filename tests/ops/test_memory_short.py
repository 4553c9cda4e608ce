"""Sizes beyond any memory: an error that names the size, and no loop over empty rows."""

from __future__ import annotations

import pytest
import torch

from lora_ext import functional

MANY = 2**40  # tokens: without features they take no memory
ops = torch.ops.lora_ext
SEED = torch.tensor(1)


def test_a_mask_of_rows_of_nothing():
    assert ops.lora_dropout_mask(SEED, 2**62, 0, 0.5).shape == (2**62, 0)
    assert ops.lora_dropout_mask(SEED, 0, 2**62, 0.5).shape[0] == 0


@pytest.mark.parametrize(
    ("num_tokens", "in_features", "text"),
    [
        (MANY, 3, r"out of memory\. It wanted 8796093022208 bytes on \S+ for a tensor of \[1099511627776, 8\]"),
        (1, 2**63 - 1, r"out of memory\. It wanted 1152921504606846976 bytes on"),
        (2**62, 2**62, "sizes are too large: num_tokens=4611686018427387904, in_features=4611686018427387904"),
        (-1, 3, "num_tokens is -1, want at least 0"),
    ],
)
def test_masks_that_nothing_could_hold(num_tokens, in_features, text):
    with pytest.raises(RuntimeError, match=f"lora_dropout_mask: {text}"):
        ops.lora_dropout_mask(SEED, num_tokens, in_features, 0.5)


def many_tokens(features: int) -> torch.Tensor:
    return torch.empty(MANY, 0) if features == 0 else torch.zeros(1, 1).expand(MANY, features)


@pytest.mark.parametrize("features", [0, 24])
def test_public_functions_say_that_memory_is_short(features):
    """The failing allocation is xa, float32 for every token, or the copy of expanded rows."""
    A, weight = torch.zeros(4, features), torch.zeros(20, features)
    x, B = many_tokens(features), torch.zeros(20, 4)
    bytes_wanted = MANY * (4 if features == 0 else features) * 4
    text = rf"out of memory\. It wanted {bytes_wanted} bytes on {x.device.type}"
    for call in (
        lambda: functional.lora_linear(x, weight, None, A, B, 1.0),
        lambda: functional.lora_linear_siblings(x, [weight], [None], [A], [B], [1.0]),
        lambda: functional.lora_linear(x, weight, None, A.requires_grad_(), B, 1.0),
    ):
        with pytest.raises(torch.OutOfMemoryError, match=f"^lora_linear(_siblings)?: {text}"):
            call()
    y = torch.empty(MANY, 0)
    with pytest.raises(torch.OutOfMemoryError, match=f"^lora_delta_: {text}"):
        functional.lora_delta_(y, x, A.detach(), B[:0], 1.0)
    with pytest.raises(torch.OutOfMemoryError, match=r"^lora_shrink: out of memory\. It wanted \d+ bytes"):
        functional.bottleneck(x, A.detach(), None, torch.zeros(features, 4), None)


def test_a_backward_that_has_nothing_to_write_ends():
    """Tokens without features have a gradient without elements."""
    grad_y, A, B, weight = torch.empty(MANY, 0), torch.empty(1, 0), torch.empty(0, 1), torch.empty(0, 0)
    only_x = True, False, False
    lists = [grad_y], None, [weight], [A], [B], None, None, [1.0]
    for grad_x, *_ in (
        ops.lora_linear_backward(grad_y, None, weight, A, B, None, None, 1.0, 0.0, only_x),
        ops.lora_linear_siblings_backward(*lists, 0.0, only_x),
        ops.lora_linear_backward(grad_y, None, None, A, B, None, None, 1.0, 0.0, only_x),
        ops.lora_linear_siblings_backward([grad_y], None, [], [A], [B], None, None, [1.0], 0.0, only_x),
    ):
        assert grad_x.shape == (MANY, 0)
