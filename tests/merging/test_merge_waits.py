"""Tests which merges wait for a GPU, without one: reading a value of a fake tensor raises an error."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from torch._subclasses.fake_tensor import DataDependentOutputException, DynamicOutputShapeException, FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

from lora_ext import _load, functional
from lora_ext.merging import weights
from lora_ext.merging.weights import merge_all_, pack_factors

pytestmark = pytest.mark.cpu_only("pretends that there is a GPU")

WAITS = (DataDependentOutputException, DynamicOutputShapeException)


class Ops(TorchDispatchMode):
    """Notes the names of the ops that run, and "waits" for a copy to the CPU."""

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        to_cpu = isinstance(result, torch.Tensor) and result.device.type == "cpu"
        self.names.append("waits" if to_cpu else func.__name__)
        return result

    def ours(self) -> list[str]:
        return [name.partition(".")[0] for name in self.names if name.startswith("lora_")]


@pytest.fixture
def cuda(monkeypatch) -> Iterator[Ops]:
    """Makes tensors on a GPU that does not exist."""
    monkeypatch.setattr(_load, "check_kernels_exist", lambda caller, device: None)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
    with FakeTensorMode(), torch.device("cuda"), Ops() as ops:
        yield ops


def layer() -> tuple[torch.Tensor, ...]:
    return torch.randn(40, 300, dtype=torch.bfloat16), torch.randn(4, 300), torch.randn(40, 4)


def test_a_merge_without_a_record_is_one_op_and_waits_for_nothing(cuda):
    weight, A, B = layer()
    assert weight.is_cuda
    cuda.names.clear()
    assert functional.lora_merge_(weight, A, B, 0.5, record=False) is None
    assert cuda.ours() == ["lora_merge_"]
    assert "waits" not in cuda.names


def test_a_merge_with_a_record_is_one_op_and_waits(cuda):
    with pytest.raises(WAITS):
        functional.lora_merge_(*layer(), 0.5)
    assert not cuda.ours()  # the op itself waits


def test_a_check_waits_before_the_merge(cuda):
    weight, A, B = layer()
    A, B = pack_factors(weight.dtype, [(A, B, 0.5)])
    with pytest.raises(WAITS):
        merge_all_("test", [weight], [A], [B], record=False)
    assert cuda.ours() == ["lora_merge_check"]  # and not yet lora_merge_


def test_what_waits_is_refused_during_a_capture(cuda, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
    weight, A, B = layer()
    functional.lora_merge_(weight, A, B, 0.5, record=False)
    cuda.names.clear()
    with pytest.raises(RuntimeError, match="lora_merge_: this merge waits for the GPU, .* record=False"):
        functional.lora_merge_(weight, A, B, 0.5)
    A, B = pack_factors(weight.dtype, [(A, B, 0.5)])
    with pytest.raises(RuntimeError, match="test: this merge waits for the GPU"):
        merge_all_("test", [weight], [A], [B], record=False)
    assert not cuda.ours()


@pytest.mark.parametrize(
    ("limit", "parts"),
    [(10**9, [[0, 1, 2, 3]]), (1, [[0], [1], [2], [3]]), (60, [[0, 1], [2], [3]]), (100, [[0, 1], [2], [3]])],
)
def test_scratch_memory_is_limited(monkeypatch, limit, parts):
    monkeypatch.setattr(weights, "SCRATCH_BYTES", limit)
    sizes = [torch.empty(numel) for numel in (5, 10, 30, 1)]  # 20, 40, 120 and 4 bytes
    assert list(weights._parts_with_scratch(sizes, range(4))) == parts
