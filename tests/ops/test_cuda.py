"""Tests that need a GPU: arithmetic, streams, graphs, memory, and sizes beyond 32-bit indices.

``pytest --device cuda`` runs the other tests of the ops on the GPU; these run whenever there is one.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from support.layers import of_dtypes, relative_error
from support.op_table import (
    OPS,
    Dtypes,
    Sample,
    assert_as_good_as_plain,
    assert_bits,
    entry_of,
    grouped,
    linear,
    results,
    tensors_of,
)
from torch import Tensor

from lora_ext import functional, reference

SEED = 0x0123_4567_89AB_CDEF
BF16 = (torch.bfloat16,) * 2

pytestmark = pytest.mark.usefixtures("on_gpu")


def seed_tensor() -> Tensor:
    return torch.tensor(SEED)


def dropped(sample: Sample) -> Sample:
    return sample.with_dropout(0.1, seed_tensor())


def with_rows(sample: Sample, x: Tensor, grad_y: Tensor) -> Sample:
    return Sample(sample.call | {"x": x}, [grad_y])


LINEAR, GROUPED = OPS["lora_linear"], OPS["lora_grouped_"]


def of_sizes(*sizes: tuple) -> pytest.MarkDecorator:
    """Runs a test for samples of lora_linear, and of lora_grouped_ by tokens, features and entries."""
    found = []
    for size in sizes:
        name = "lora_linear" if len(size) == 4 else "lora_grouped_"
        make: Callable[[Dtypes], Sample] = partial(linear, size=size)
        if name == "lora_grouped_":
            make = partial(grouped, **dict(zip(("tokens", "features", "entries"), size, strict=True)), ranks=True)
        found.append(pytest.param(name, make, id=str(size)))
    return pytest.mark.parametrize(("name", "make"), found)


# Shapes that fill several blocks of every kernel and cover the rank buckets; more in test_values.py.
@pytest.mark.parametrize("dropout_p", [0.0, 0.1])
@of_dtypes
@of_sizes(
    (1, 4096, 4096, 16),
    (2, 4096, 4096, 16),
    (8, 1024, 4096, 64),
    (1000, 1030, 777, 8),
    (2048, 2048, 1024, 16),
    (600, 512, 640, 256),
    (1, (4096, 4096), [(8, 16)]),
    (64, (4096, 1024), [(100, 16)]),
    (65, (1030, 777), [8, 4, (3, 17)]),
    (2048, (2048, 1024), [(32, 16)]),
    (5000, (512, 640), [16, (2, 40), 8]),
    (1500, (300, 200), [2] * 100),
)
def test_as_good_as_pytorch_against_float64(name, make, dtypes, dropout_p):
    assert_as_good_as_plain(OPS[name], make, dtypes, dropout_p, seed_tensor())


@of_dtypes
@of_sizes(
    (4096, 1024, 768, 16),
    (5, 4096, 4096, 8),
    (3000, 300, 200, 100),
    (33, (1024, 768), [(20, 16), 8]),
    (4000, (1024, 768), [(20, 16), 8]),
)
def test_the_same_bits_every_run(name, make, dtypes):
    sample, other = dropped(make(dtypes)), torch.randn(4096, 4096)
    first = OPS[name].results(sample)
    for _ in range(5):
        other = (other @ other).clamp(-1, 1)  # different work on the GPU every time
        assert_bits(OPS[name].results(sample), first)


# --- streams and graphs -----------------------------------------------------------------------------------------------


def test_runs_on_the_current_stream():
    """On another stream it would read x before the sleeping stream has written it."""
    sample, stale = (dropped(linear(BF16, size=(512, 256, 384, 16))) for _ in range(2))
    expected = LINEAR.results(sample)
    x, grad_y = stale.call["x"], stale.grads[0]
    moving = with_rows(sample, x, grad_y)
    torch.cuda.synchronize()
    with torch.cuda.stream(torch.cuda.Stream()):
        torch.cuda._sleep(200_000_000)  # about 0.1 s
        x.copy_(sample.call["x"])
        grad_y.copy_(sample.grads[0])
        found = LINEAR.results(moving)
    torch.cuda.synchronize()
    assert_bits(found, expected)


def test_memory_freed_on_one_stream_is_not_read_from_another():
    """Scratch memory returns to the allocator while kernels run; only the same stream may reuse it, later."""
    samples = [dropped(linear(BF16, size=(700, 512, 640, 16))) for _ in range(2)]
    expected = list(map(LINEAR.results, samples))
    torch.cuda.synchronize()
    streams = [torch.cuda.Stream() for _ in samples]
    for _ in range(20):
        found = []
        for sample, stream in zip(samples, streams, strict=True):
            with torch.cuda.stream(stream):
                found.append(LINEAR.results(sample))
        torch.cuda.synchronize()
        for result, wanted in zip(found, expected, strict=True):
            assert_bits(result, wanted)


def captured(function) -> tuple[torch.cuda.CUDAGraph, Any]:
    """Captures function() as a graph; returns it and the tensors that its replay fills."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(3):  # libraries initialise outside the capture
            function()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        outputs = function()
    return graph, outputs


@of_dtypes
@of_sizes(
    (300, 256, 384, 16),
    (2, 4096, 1024, 64),
    (40, (256, 192), [(6, 8)]),
    (300, (256, 192), [(6, 8)]),
    (40, (256, 192), [8] * 50),
    (300, (256, 192), [8] * 50),
)
def test_forward_and_backward_in_a_graph(name, make, dtypes):
    """A captured call reads every tensor at every replay: the seed, groups, ranks and scalings, too."""
    sample = dropped(make(dtypes))
    graph, outputs = captured(lambda: OPS[name].results(sample))
    for replay in range(3):
        other = make(dtypes)
        for argument, i, tensor in tensors_of(sample.call):
            if argument not in ("weight", "bias", "seed"):
                tensor.copy_(entry_of(other.call, argument, i))
        sample.grads[0].copy_(other.grads[0])
        sample.call["seed"].fill_(SEED + replay)
        for output in outputs.values():
            output.fill_(torch.nan)
        graph.replay()
        for what, eager in OPS[name].results(sample).items():
            rtol = 2 * torch.finfo(eager.dtype).eps
            torch.testing.assert_close(outputs[what], eager, rtol=rtol, atol=1e-5, msg=lambda m, n=what: f"{n}: {m}")


def weight_and_factors(dtypes: Dtypes, *size: int) -> tuple[Tensor, Tensor, Tensor]:
    call = linear(dtypes, size=size).call
    return call["weight"], call["lora_A"], call["lora_B"]


def test_merge_in_a_graph():
    weight, A, B = weight_and_factors(BF16, 1, 512, 640, 16)
    pristine = weight.clone()

    def merge() -> list[Tensor]:
        weight.copy_(pristine)
        functional.lora_merge_(weight, A, B, 0.5, record=False)
        return [weight]

    graph, (merged,) = captured(merge)
    A.copy_(torch.randn_like(A))
    graph.replay()
    result = merged.clone()
    assert torch.equal(merge()[0], result)


def test_a_merge_that_waits_is_not_captured():
    weight, A, B = weight_and_factors(BF16, 1, 64, 40, 8)
    pristine = weight.clone()
    with pytest.raises(RuntimeError, match="lora_merge_: this merge waits for the GPU, which a CUDA graph cannot"):
        captured(lambda: [functional.lora_unmerge_(weight, functional.lora_merge_(weight, A, B, 0.5))])
    assert torch.equal(weight, pristine)


@of_sizes((300, 256, 384, 16), (20, (256, 192), [(6, 8), 4]), (200, (256, 192), [(6, 8), 4]))
def test_never_waits_for_the_gpu(name, make):
    sample, layer = dropped(make(BF16)), weight_and_factors(BF16, 1, 64, 40, 8)
    drawn = Sample(sample.call | {"seed": None}, sample.grads)  # on the device
    OPS[name].results(sample)
    torch.cuda.set_sync_debug_mode("error")
    try:
        OPS[name].results(sample)
        OPS[name].results(drawn)
        functional.lora_merge_(*layer, 0.5, record=False)
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
def test_tensors_on_another_gpu_than_the_current_one():
    with torch.device("cuda:1"):
        sample, layer = dropped(linear(BF16, size=(300, 256, 384, 16))), weight_and_factors(BF16, 1, 64, 40, 8)
    found = LINEAR.results(sample)
    functional.lora_merge_(*layer, 0.5)
    assert torch.cuda.current_device() == 0
    assert {result.device.index for result in found.values()} == {1}
    assert all(torch.isfinite(result).all() for result in [*found.values(), layer[0]])


# --- mixed batches ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("num_tokens", [20, 200])
def test_numbers_that_do_not_exist_give_nan_to_their_rows_only(num_tokens):
    sample, bad = grouped(BF16, tokens=num_tokens, features=(256, 192), entries=[(3, 8)]), torch.tensor([0, 7])
    expected = GROUPED.results(sample)
    sample.call["group_of_row"][bad] = torch.tensor([3, -2])
    found = GROUPED.results(sample)
    others = torch.ones(num_tokens, dtype=torch.bool).index_fill_(0, bad, False)
    for name in ("result 0", "grad of x"):
        assert found[name][bad].isnan().all() and torch.equal(found[name][others], expected[name][others])
    assert not any(found[name].isnan().any() for name in found if "lora_" in name)


@pytest.mark.full
def test_compiled_with_cuda_graphs():
    call = grouped(BF16, tokens=8, features=(256, 192), entries=[(6, 8)]).call
    base = torch.nn.Linear(256, 192, dtype=torch.bfloat16).requires_grad_(False)

    @torch.no_grad()
    def layer(x, group_of_row):
        return functional.lora_grouped_(**call | {"y": base(x), "x": x, "group_of_row": group_of_row})

    compiled = torch.compile(layer, fullgraph=True, mode="reduce-overhead")
    for _ in range(4):
        groups = torch.randint(-1, 6, (8,))
        torch.testing.assert_close(compiled(call["x"], groups), layer(call["x"], groups))


# --- memory and sizes -------------------------------------------------------------------------------------------------


def extra_bytes(function) -> int:
    """Returns the peak memory of a call in addition to its results."""
    function()  # cuBLAS allocates its workspace in the first call
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    found = function()
    kept = torch.cuda.memory_allocated() - before
    del found
    return torch.cuda.max_memory_allocated() - before - kept


@pytest.mark.large
@pytest.mark.parametrize("dtypes", [BF16, (torch.float32,) * 2], ids=str)
def test_no_temporary_as_large_as_x_or_y(dtypes):
    sample = dropped(linear(dtypes, size=(8192, 4096, 4096, 16)))
    call, most = sample.call, sample.call["x"].nbytes / 4
    with torch.no_grad():
        assert extra_bytes(lambda: torch.ops.lora_ext.lora_linear(**call)) < most
        _, xa, mask = torch.ops.lora_ext.lora_linear(**call)
        of_backward = {name: value for name, value in call.items() if name not in ("bias", "seed")}
        of_backward |= {"grad_y": sample.grads[0], "xa": xa, "mask": mask, "output_mask": (True, True, True)}
        assert extra_bytes(lambda: torch.ops.lora_ext.lora_linear_backward(**of_backward)) < most
        layer = [call[name] for name in ("weight", "lora_A", "lora_B")]
        assert extra_bytes(lambda: functional.lora_merge_(*layer, 0.5, record=False)) < most
        # Slots for the record, until its length is known.
        assert extra_bytes(lambda: functional.lora_merge_(*layer, 0.5)) < 1.25 * layer[0].nbytes


def test_calls_leave_nothing_behind():
    sample = dropped(linear(BF16, size=(512, 1024, 1024, 16)))
    LINEAR.results(sample)
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    for _ in range(10):
        LINEAR.results(sample)
    assert torch.cuda.memory_allocated() == before


def needs_memory(gigabytes: float) -> None:
    torch.cuda.empty_cache()
    free = torch.cuda.mem_get_info()[0] / 1e9
    if free < gigabytes:
        pytest.skip(f"needs {gigabytes} GB of GPU memory, {free:.0f} are free")


@pytest.mark.large
def test_more_elements_than_32_bits_count():
    """x and its gradient have over 2**31 elements: the last rows equal those of a call on these rows only."""
    needs_memory(24)
    num_tokens, in_features, tail = 2**19 + 33, 4160, 64
    x, grad_y = (torch.randn(num_tokens, features, dtype=torch.bfloat16) for features in (in_features, 24))
    sample = with_rows(linear(BF16, size=(1, in_features, 24, 8)), x, grad_y)
    y, grad_x, grad_A, grad_B = LINEAR.results(sample).values()
    y_end, grad_x_end, _, _ = LINEAR.results(with_rows(sample, x[-tail:], grad_y[-tail:])).values()
    torch.testing.assert_close(y[-tail:], y_end)
    torch.testing.assert_close(grad_x[-tail:], grad_x_end)
    assert torch.isfinite(grad_A).all() and torch.isfinite(grad_B).all()

    del grad_x, y
    mask = torch.ops.lora_ext.lora_linear(**dropped(sample).call)[2]
    keep = reference.unpack_mask(mask[-tail:], in_features)
    block = torch.arange(in_features // 8).expand(tail, -1)
    row = torch.arange(num_tokens - tail, num_tokens).unsqueeze(1).expand_as(block)
    words = reference.philox4x32((block, torch.zeros_like(block), row, torch.zeros_like(block)), SEED)
    halves = torch.stack([half for word in words for half in (word & 0xFFFF, word >> 16)], dim=-1).flatten(1)
    assert torch.equal(keep, halves >= reference.dropout_threshold(0.1))


@pytest.mark.large
def test_a_merge_beyond_32_bits():
    needs_memory(14)
    rows, columns = 2**16 + 5, 2**15 + 8
    weight = torch.randn(rows, columns, dtype=torch.bfloat16)
    A, B = torch.randn(4, columns, dtype=torch.bfloat16), torch.randn(rows, 4, dtype=torch.bfloat16)
    expected = reference.merge(weight[-32:], A, B[-32:], 0.5)
    functional.lora_merge_(weight, A, B, 0.5)
    assert (weight[-32:] != expected).float().mean() < 0.01
    torch.testing.assert_close(weight[-32:], expected)


@pytest.mark.large
def test_many_tokens_and_few_features():
    """A grid has at most 65535 blocks in y and z, so they must not grow with the tokens."""
    sample = linear(size=(2**21 + 7, 24, 17, 3))
    result, expected = LINEAR.results(sample), results(LINEAR.plain, sample, LINEAR.leaves(sample))
    for name in result:
        assert relative_error(result[name], expected[name]) < 1e-4, name
