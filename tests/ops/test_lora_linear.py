"""The dropout mask and its seed, which all ops share. test_values.py has the arithmetic of lora_linear."""

import pytest
import torch
from support.layers import with_threads
from support.op_table import SEED, grouped, linear
from support.processes import run_forked
from torch.profiler import ProfilerActivity, profile

from lora_ext import functional, reference
from lora_ext._ops import plain


@pytest.mark.parametrize("shape", [(1, 1), (3, 5), (7, 64), (33, 100), (40, 384), (5, 1000), (4097, 65)], ids=str)
@pytest.mark.parametrize("dropout_p", [2**-16, 0.1, 0.5, 1 - 2**-16])
def test_mask_is_the_reference_mask(shape, dropout_p):
    seed = torch.randint(2**63 - 1, ())
    mask = torch.ops.lora_ext.lora_dropout_mask(seed, *shape, dropout_p)
    assert torch.equal(reference.unpack_mask(mask, shape[1]), reference.dropout_keep(int(seed), *shape, dropout_p))


def test_mask_does_not_depend_on_op_threads_dtype_or_strides():
    expected = reference.dropout_keep(int(SEED), 200, 130, 0.3)
    _, mask = torch.ops.lora_ext.lora_grouped_(**grouped(tokens=200, features=(130, 12)).with_dropout(0.3).call)
    assert torch.equal(reference.unpack_mask(mask, 130), expected)
    for dtype in (torch.float32, torch.bfloat16, torch.float64):
        call = linear((dtype, dtype), size=(200, 130, 12, 4)).call | {"dropout_p": 0.3, "seed": SEED}
        for x in (call["x"], call["x"].T.contiguous().T):
            masks = with_threads((1, 2, 3), lambda call=call | {"x": x}: torch.ops.lora_ext.lora_linear(**call)[2])
            assert all(torch.equal(reference.unpack_mask(mask, 130), expected) for mask in masks)


@pytest.mark.parametrize("begin", [(0, 0, 0), (1, 2, 8), (0, 1, 5), (1, 0, 63)], ids=str)
def test_a_part_of_x_has_that_part_of_the_mask(begin):
    """As in a layer whose tokens or features are on several devices."""
    x = torch.randn(2, 4, 130)
    part = x[begin[0] : begin[0] + 1, begin[1] : begin[1] + 2, begin[2] : begin[2] + 67]
    found = plain.dropped_part(part, 0.3, SEED, x.shape, begin)
    whole = plain.dropped(x, 0.3, SEED)
    assert torch.equal(found, whole[begin[0] : begin[0] + 1, begin[1] : begin[1] + 2, begin[2] : begin[2] + 67])
    assert plain.dropped_part(part, 0.0, SEED, x.shape, begin) is part


@pytest.mark.parametrize("dropout_p", [1e-9, 0.0])
def test_dropout_below_the_resolution_is_none(dropout_p):
    call = linear().call
    y, _, mask = torch.ops.lora_ext.lora_linear(**call, dropout_p=dropout_p, seed=SEED)
    assert mask.numel() == 0 and torch.equal(y, functional.lora_linear(**call))


@pytest.mark.full
def test_recovers_from_running_out_of_memory():
    """A call that cannot allocate scratch memory fails; the next one works."""
    code = """if True:
        import resource, torch
        from lora_ext import functional, reference
        def call(rank):
            x, weight, A, B = (torch.randn(size) for size in ((40, 8), (6, 8), (rank, 8), (6, rank)))
            torch.testing.assert_close(
                functional.lora_linear(x, weight, None, A, B, 0.01), reference.lora_linear(x, weight, None, A, B, 0.01)
            )
        call(8)
        pages = int(open("/proc/self/statm").read().split()[0])
        resource.setrlimit(resource.RLIMIT_AS, (pages * resource.getpagesize() + 500 * 2**20,) * 2)
        try:
            call(1_000_000)
        except (MemoryError, RuntimeError) as error:
            print("refused:", type(error).__name__)
        call(8)
        call(300)
        print("recovered")
    """
    result = run_forked("-c", code)
    assert "refused:" in result.stdout and "recovered" in result.stdout, (result.returncode, result.stderr[-2000:])


# --- drawn seeds ----------------------------------------------------------------------------------------------------


def draw(rank: int | None) -> int:
    torch.manual_seed(5)
    return int(functional.draw_seed(torch.get_default_device(), rank))


def test_every_rank_draws_its_seed_in_one_kernel():
    for rank in (0, 1, 1000):
        with profile(activities=[ProfilerActivity.CPU]) as profiler:
            functional.draw_seed(torch.get_default_device(), rank)
        calls = [event.name for event in profiler.events() if event.cpu_parent is None]
        assert len(calls) == 1 and calls[0].startswith("aten::randint"), calls


def test_ranks_that_are_seeded_alike_draw_different_seeds():
    seeds = [draw(rank) for rank in range(100)]
    assert len(set(seeds)) == 100 and seeds == [draw(rank) for rank in range(100)]
    assert seeds[0] == draw(None) and min(seeds) >= 0
    assert len({seed % 2**20 for seed in seeds}) > 90 and len({seed // 2**43 for seed in seeds}) > 90
