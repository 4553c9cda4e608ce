"""Tests of lora_grouped_ that need a GPU: sizes of real layers, graphs, synchronisation, numbers that do not exist.

``pytest --device cuda`` runs test_grouped.py on the GPU, too.
"""

from __future__ import annotations

import pytest
import torch
from support.groups import Grouped, random_groups
from support.layers import DTYPES, assert_errors_as_plain, in_dtypes_of
from torch import Tensor

from lora_ext import functional, reference

SEED = 0x0123_4567_89AB_CDEF
BF16 = (torch.bfloat16, torch.bfloat16)

pytestmark = pytest.mark.usefixtures("on_gpu")


def seed_tensor() -> Tensor:
    return torch.tensor(SEED)


def step(case: Grouped, dropout_p: float = 0.0) -> list[Tensor]:
    """Returns y, grad_x and the gradients of the factors."""
    n = len(case.lora_As)
    x, *factors = (t.detach().requires_grad_() for t in (case.x, *case.lora_As, *case.lora_Bs))
    y = functional.lora_grouped_(
        case.y.clone(), x, factors[:n], factors[n:], *case.choice(), dropout_p, seed_tensor() if dropout_p else None
    )
    return [y.detach(), *torch.autograd.grad(y, (x, *factors), case.grad_y)]


def plain(case: Grouped, dropout_p: float) -> list[Tensor]:
    """The same in PyTorch, a group at a time."""
    x, *factors = (t.detach().requires_grad_() for t in (case.x, *case.lora_As, *case.lora_Bs))
    n, update = len(case.lora_As), torch.zeros_like(case.y)
    held = Grouped(**vars(case) | {"lora_As": factors[:n], "lora_Bs": factors[n:]})
    rows = x
    if dropout_p:
        rows = x * reference.dropout_keep(SEED, *x.shape, dropout_p).to(x.device)
        rows = rows * (65536.0 / (65536.0 - reference.dropout_threshold(dropout_p)))
    for g, (A, B) in enumerate(held.pairs()):
        chosen = (case.group_of_row == g).nonzero().squeeze(1)
        part = reference.lora_delta(rows[chosen], A, B, float(case.scalings[g]))
        update = update.index_copy(0, chosen, part.to(update.dtype))
    y = (case.y + update).to(case.y.dtype)
    return [y.detach(), *torch.autograd.grad(y, (x, *factors), case.grad_y, materialize_grads=True)]


def named(results: list[Tensor], n: int) -> dict[str, Tensor]:
    y, grad_x, *grads = results
    A, B = (torch.cat([grad.flatten() for grad in part]) for part in (grads[:n], grads[n:]))
    return {"y": y, "grad_x": grad_x, "grad_A": A, "grad_B": B}


@pytest.mark.parametrize("dropout_p", [0.0, 0.1])
@pytest.mark.parametrize("dtypes", DTYPES, ids=lambda d: f"{d[0]}-{d[1]}".replace("torch.", ""))
@pytest.mark.parametrize(
    ("num_tokens", "features", "entries"),
    [
        (1, (4096, 4096), [(8, 16)]),
        (64, (4096, 1024), [(100, 16)]),
        (65, (1030, 777), [8, 4, (3, 17)]),
        (2048, (2048, 1024), [(32, 16)]),
        (5000, (512, 640), [16, (2, 40), 8]),
        (1500, (300, 200), [2] * 100),
    ],
    ids=str,
)
def test_as_good_as_pytorch_against_float64(num_tokens, features, entries, dtypes, dropout_p):
    case, n = random_groups(num_tokens, features, entries, dtypes, ranks=True), len(entries)
    ours = named(step(case, dropout_p), n)
    case = case.as_cuda_reads()
    exact, expected = named(plain(case.to(torch.float64), dropout_p), n), named(plain(case, dropout_p), n)
    assert_errors_as_plain([(ours, exact, in_dtypes_of(expected, ours))], case.x.dtype, case.lora_As[0].dtype)


@pytest.mark.parametrize("dtypes", [BF16, (torch.float32,) * 2, (torch.float16,) * 2], ids=str)
@pytest.mark.parametrize("num_tokens", [33, 4000])
def test_the_same_bits_every_run(num_tokens, dtypes):
    case = random_groups(num_tokens, (1024, 768), [(20, 16), 8], dtypes)
    first, other = step(case, 0.1), torch.randn(4096, 4096)
    for _ in range(5):
        other = (other @ other).clamp(-1, 1)  # different work on the GPU every time
        for again, before in zip(step(case, 0.1), first, strict=True):
            assert torch.equal(again, before)


@pytest.mark.parametrize("num_tokens", [1, 64, 65, 3000])
def test_the_mask_is_that_of_the_cpu(num_tokens):
    case = random_groups(num_tokens, (100, 40), [4, 8])
    mask = torch.ops.lora_ext.lora_grouped_(*case.args(), 0.1, seed_tensor())[1]
    on_cpu = torch.ops.lora_ext.lora_dropout_mask(seed_tensor().cpu(), num_tokens, 100, 0.1)
    assert torch.equal(reference.unpack_mask(mask.cpu(), 100), reference.unpack_mask(on_cpu, 100))


@pytest.mark.parametrize("num_tokens", [40, 300])
@pytest.mark.parametrize("entries", [[(6, 8)], [8] * 50])
def test_a_graph_follows_what_rows_choose(num_tokens, entries):
    """A captured call reads groups, ranks, scalings and factors at every replay. Nothing waits for the GPU."""
    case = random_groups(num_tokens, (256, 192), entries, BF16, ranks=True)
    y, before = case.y.clone(), case.y.clone()
    add = lambda: functional.lora_grouped_(y, case.x, case.lora_As, case.lora_Bs, *case.choice())  # noqa: E731
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        add()
    side.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            add()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    for _ in range(3):
        case.group_of_row.copy_(torch.randint(-1, len(case.scalings), case.group_of_row.shape))
        case.scalings.uniform_()
        case.ranks.copy_(torch.randint(0, 9, case.ranks.shape))
        case.lora_As[0].normal_(std=0.1)
        y.copy_(before)
        graph.replay()
        expected = functional.lora_grouped_(before.clone(), case.x, case.lora_As, case.lora_Bs, *case.choice())
        assert torch.equal(y, expected)


@pytest.mark.parametrize("num_tokens", [20, 200])
def test_a_backward_does_not_wait_for_the_gpu(num_tokens):
    case = random_groups(num_tokens, (256, 192), [(6, 8), 4], BF16)
    step(case)
    torch.cuda.set_sync_debug_mode("error")
    try:
        step(case)
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.parametrize("num_tokens", [20, 200])
def test_numbers_that_do_not_exist_give_nan_to_their_rows_only(num_tokens):
    case = random_groups(num_tokens, (256, 192), [(3, 8)], BF16)
    expected = step(case)
    bad = torch.tensor([0, 7])
    case.group_of_row[bad] = torch.tensor([3, -2])
    y, grad_x, *grads = step(case)
    others = torch.ones(num_tokens, dtype=torch.bool).index_fill_(0, bad, False)
    for found, before in ((y, expected[0]), (grad_x, expected[1])):
        assert found[bad].isnan().all() and torch.equal(found[others], before[others])
    assert not any(grad.isnan().any() for grad in grads)


@pytest.mark.full
def test_compiled_with_cuda_graphs():
    case = random_groups(8, (256, 192), [(6, 8)], BF16)
    base = torch.nn.Linear(256, 192, dtype=torch.bfloat16).requires_grad_(False)

    @torch.no_grad()
    def layer(x, group_of_row):
        return functional.lora_grouped_(base(x), x, case.lora_As, case.lora_Bs, group_of_row, case.scalings)

    compiled = torch.compile(layer, fullgraph=True, mode="reduce-overhead")
    for _ in range(4):
        groups = torch.randint(-1, 6, (8,))
        torch.testing.assert_close(compiled(case.x, groups), layer(case.x, groups))
