"""Tensors whose storage was freed or shrunk: the compiled ops refuse them in every argument."""

from __future__ import annotations

import re

import pytest
import torch
from support.op_calls import HAVE_KERNELS, all_places, good_call, label, op_named, with_entry

PLACES = [place for place in all_places() if place[0] in HAVE_KERNELS]


@pytest.mark.parametrize("nbytes", [0, 1], ids=["freed", "cut"])
@pytest.mark.parametrize(("op", "name", "i"), PLACES)
def test_a_tensor_without_all_of_its_memory(op, name, i, nbytes):
    call = good_call(op)
    tensor = (call[name] if i is None else call[name][i]).detach().clone()
    if tensor.numel() == 0:
        pytest.skip("needs no memory")
    tensor.untyped_storage().resize_(nbytes)
    kinds = rf"^{op}: {re.escape(label(name, i))} is \[[\d, ]*\], but its storage has been freed or made smaller"
    with pytest.raises(RuntimeError, match=kinds):
        op_named(op)(**with_entry(call, name, i, tensor))


def test_views_to_the_last_byte_are_taken():
    x, A = torch.randn(5, 8), torch.randn(2, 3)
    rows = x[3:, 5:]
    assert torch.equal(torch.ops.lora_ext.lora_shrink(rows, A), torch.ops.lora_ext.lora_shrink(rows.clone(), A))
    expanded = torch.randn(1).expand(4, 3)
    assert torch.allclose(torch.ops.lora_ext.lora_shrink(expanded, A), expanded @ A.T)
