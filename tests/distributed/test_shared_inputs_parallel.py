"""DistributedDataParallel around a model whose layers share inputs."""

from __future__ import annotations

import pytest
import torch
from support.models import token_ids
from support.shared_llama import assert_shares, shared_and_alone
from torch.nn.parallel import DistributedDataParallel

pytestmark = [pytest.mark.cpu_only("processes with gloo"), pytest.mark.full]


def _compare(rank: int) -> int:
    """Compares gradients of halves of a batch with those of the whole; returns the number compared."""
    shared, alone = shared_and_alone()
    ids = token_ids(4)
    parallel = DistributedDataParallel(shared)
    for _ in range(2):
        shared.zero_grad(set_to_none=True)
        half = ids[2 * rank : 2 * rank + 2]
        parallel(input_ids=half, labels=half).loss.backward()
    alone(input_ids=ids, labels=ids).loss.backward()
    assert_shares(shared)
    compared = 0
    for (name, ours), theirs in zip(shared.named_parameters(), alone.parameters(), strict=True):
        if theirs.grad is not None:
            torch.testing.assert_close(ours.grad, theirs.grad, msg=lambda text, name=name: f"{name}: {text}")
            compared += 1
    return compared


def test_gradients_are_those_of_the_whole_batch(ranks):
    assert ranks(2, _compare) == [28, 28]  # two factors of seven layers in two blocks
