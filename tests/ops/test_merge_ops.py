"""The merge ops: garbage records, shared memory, sizes beyond what they count. test_bad_arguments.py has the rest."""

from __future__ import annotations

import pytest
import torch
from support.merging import same_bits
from support.op_table import good_call, with_entry


def test_a_garbage_record_stays_inside_its_memory():
    """With any words and corrections, only the weights are written (run under a sanitizer to see more)."""
    call, whole = good_call("lora_unmerge_"), torch.randn(5, 400)
    call["weights"][0], before, words = whole[:, 50:350], whole.clone(), call["words"]
    for spoil in (lambda w: w * 0, lambda w: w * 7, lambda w: -w, lambda w: w + 1, lambda w: w * 0 + 2**15 - 1):
        numbers = [torch.randint(-(2**15), 2**15, c.shape, dtype=torch.int16) for c in call["corrections"]]
        torch.ops.lora_ext.lora_unmerge_(**call | {"words": list(map(spoil, words)), "corrections": numbers})
    assert same_bits(whole[:, :50], before[:, :50]) and same_bits(whole[:, 350:], before[:, 350:])


def whole(*shape: int) -> torch.Tensor:
    return torch.randn(shape)


SHARING = {
    "one weight twice": lambda w: {"weights": [w, w]},
    "rows of another": lambda w: {"weights": [w, w[2:], w[:2]]},
    "overlapping rows": lambda w: (lambda v: {"weights": [v[:4], v[3:7]]})(whole(7, 20)),
    "overlapping columns": lambda w: (lambda v: {"weights": [v[:, :12], v[:, 11:30]]})(whole(4, 30)),
    "lora_A in the weight": lambda w: {"weights": [w], "lora_As": [w[:2]]},
    "lora_B in the weight": lambda w: {"weights": [w], "lora_Bs": [w[:, :2]]},
    "lora_A of one in another": lambda w: (lambda v: {"weights": [w, v], "lora_As": [v[1:3], None]})(whole(4, 20)),
    "expanded": lambda w: {"weights": [w[:1].expand(4, 20)]},
    "overlapping rows of its own": lambda w: {"weights": [w.as_strided((4, 20), (5, 1))]},
}


@pytest.mark.parametrize("case", SHARING)
def test_weights_and_factors_that_share_memory_are_refused(case):
    """An update would be read while another is written, or counted twice."""
    for op, record in {"lora_merge_": (), "lora_unmerge_": ([], []), "lora_merge_record_": ()}.items():
        lists = SHARING[case](torch.randn(4, 20))
        weights = lists["weights"]
        As, Bs = lists.get("lora_As", [None] * len(weights)), lists.get("lora_Bs", [None] * len(weights))
        As = [torch.randn(2, w.shape[1]) if A is None else A for A, w in zip(As, weights, strict=True)]
        Bs = [torch.randn(w.shape[0], 2) if B is None else B for B, w in zip(Bs, weights, strict=True)]
        before = [tensor.clone() for tensor in (*weights, *As, *Bs)]
        with pytest.raises(RuntimeError, match=rf"{op}: weights\[\d\] (shares memory with|has row stride \d+ but)"):
            getattr(torch.ops.lora_ext, op)(weights, As, Bs, *record)
        assert all(map(same_bits, before, (*weights, *As, *Bs)))


def test_neighbours_in_memory_are_merged():
    """Adjacent rows and columns, factors that two layers share, and factors next to a weight."""
    memory = torch.randn(9, 40)
    weights = [memory[:4, :20], memory[:4, 20:], memory[4:8]]
    A, B = torch.randn(2, 20), memory[8].view(10, 4)[:4, :2]  # behind the last weight
    As, Bs = [A, A, torch.randn(2, 40)], [B, B, torch.randn(4, 2)]
    before = memory.clone()
    torch.ops.lora_ext.lora_merge_(weights, As, Bs)
    for weight, own_A, own_B, old in zip(weights, As, Bs, (before[:4, :20], before[:4, 20:], before[4:8]), strict=True):
        torch.testing.assert_close(weight, old + own_B @ own_A)
    assert same_bits(memory[8], before[8])


def test_a_record_that_shares_memory_with_a_weight_is_refused():
    call = good_call("lora_unmerge_")
    before = [weight.clone() for weight in call["weights"]]
    inside = call["weights"][0].view(torch.int16).flatten()
    for name, part in (("words", inside[:10].view(5, 2)), ("corrections", inside[:7])):
        with pytest.raises(RuntimeError, match=rf"lora_unmerge_: weights\[0\] shares memory with {name}\[0\]"):
            torch.ops.lora_ext.lora_unmerge_(**with_entry(call, name, 0, part))
    assert all(map(same_bits, call["weights"], before))


def test_more_rows_or_columns_than_the_kernels_count():
    """Uses tensors on the meta device, since real ones would take gigabytes."""
    for rows, columns in ((2**30 + 1, 0), (0, 2**30 + 1)):
        layer = [[torch.empty(shape, device="meta")] for shape in ((rows, columns), (2, columns), (rows, 2))]
        with pytest.raises(ValueError, match=r"weights\[0\] has shape .*, want at most 2\*\*30 rows and columns"):
            torch.ops.lora_ext.lora_merge_(*layer)
