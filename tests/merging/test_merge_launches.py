"""The op calls of a merge: if one fails, every layer keeps its bits; on a GPU they wait only where they must."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from types import SimpleNamespace

import pytest
import torch
from support.merged_models import all_same, assert_restores, hard_model, weights
from support.models import refused
from support.processes import run_forked
from torch._subclasses.fake_tensor import DataDependentOutputException, DynamicOutputShapeException, FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

from lora_ext import functional, merge, unmerge
from lora_ext.merging import layers as merged_module
from lora_ext.merging import weights as weights_module
from lora_ext.merging.weights import MergeRecord, merge_all_, pack_factors

pytestmark = pytest.mark.full


def is_second(weights_or_record: list[torch.Tensor] | MergeRecord, *_: object) -> bool:
    """Returns whether a call is for the weight in bfloat16, after that in float32."""
    first = weights_or_record[0] if isinstance(weights_or_record, list) else weights_or_record
    return first.dtype == torch.bfloat16


BETWEEN = merged_module, "merge_all_", lambda *_: True  # the old set is out, the new one not yet in
FAILURES = {
    "no memory for a record": (MergeRecord, "to", is_second, torch.OutOfMemoryError),
    "no memory between two sets": (*BETWEEN, MemoryError),
    "Ctrl-C between two sets": (*BETWEEN, KeyboardInterrupt),
    "exit between two sets": (*BETWEEN, SystemExit),
    "the launch of a merge": (torch.ops.lora_ext, "lora_merge_record_", is_second, RuntimeError),
    "the launch of an unmerge": (torch.ops.lora_ext, "lora_unmerge_", is_second, RuntimeError),
}


@pytest.mark.parametrize("what", FAILURES)
def test_an_error_in_the_middle(what, monkeypatch):
    model = hard_model([torch.float32, torch.bfloat16])
    pristine = weights(model)
    merge(model, "a")
    owner, name, fails, error = FAILURES[what]
    is_op = owner is torch.ops.lora_ext
    original = getattr(owner, name).default if is_op else getattr(owner, name)
    failed = []

    def fail_once(*arguments, **options):
        if failed or not fails(*arguments):
            return original(*arguments, **options)
        failed.append(all_same(weights(model), pristine))
        raise error("now")

    changes = [lambda: merge(model, "b"), lambda: model["layer1"].merge("b"), lambda: unmerge(model)]
    with monkeypatch.context() as patch:
        patch.setattr(owner, name, SimpleNamespace(default=fail_once) if is_op else fail_once)
        for change in changes[:2] if name == "lora_merge_record_" else changes:
            failed.clear()
            with refused(model, error, "now"):
                change()
            assert failed == [owner is merged_module and change is not changes[1]]
    assert_restores(model, pristine)


SHORT_OF_MEMORY = """
import resource, torch
from lora_ext.merging.weights import merge_all_

torch.set_num_threads(2)
shapes = [(600, 500), (4096, 4096)]
weights = [torch.randn(shape) for shape in shapes]
before = [weight.clone() for weight in weights]
As, Bs = [torch.randn(2, k) for _, k in shapes], [1e3 * torch.randn(n, 2) for n, _ in shapes]
used = int(open("/proc/self/statm").read().split()[0]) * resource.getpagesize()
resource.setrlimit(resource.RLIMIT_AS, (used + {free} * 2**20, -1))
try:
    records = merge_all_("test", weights, As, Bs)
except torch.OutOfMemoryError as error:
    assert "lora_merge_record_: out of memory. It wanted " in str(error), error
    assert all(map(torch.equal, weights, before))
else:
    raise AssertionError("a record as large as the weight fitted")
resource.setrlimit(resource.RLIMIT_AS, (-1, -1))
merge_all_("test", weights, As, Bs)
assert not any(map(torch.equal, weights, before))
"""


@pytest.mark.full
@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="needs a limit on memory")
@pytest.mark.cpu_only("limits the CPU's memory")
@pytest.mark.parametrize("free", [16, 80, 120])  # MiB, below 2 * 64
def test_out_of_memory_in_an_op(free):
    result = run_forked("-c", SHORT_OF_MEMORY.format(free=free))
    assert result.returncode == 0, result.stderr


# --- which merges wait for a GPU: reading a value of a fake tensor raises an error ------------------------------------

WAITS = (DataDependentOutputException, DynamicOutputShapeException)


class Ops(TorchDispatchMode):
    """Notes the names of the ops that run, and "waits" for a copy to the CPU."""

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        to_cpu = isinstance(result, torch.Tensor) and result.device.type == "cpu"
        if func.namespace != "lora_ext_check":  # of shapes: no launch
            self.names.append("waits" if to_cpu else func.__name__)
        return result

    def ours(self) -> list[str]:
        return [name.partition(".")[0] for name in self.names if name.startswith("lora_")]


@pytest.fixture
def cuda(monkeypatch) -> Iterator[Ops]:
    """Makes tensors on a GPU that does not exist."""
    monkeypatch.setattr(weights_module._load, "check_kernels_exist", lambda caller, device: None)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
    with FakeTensorMode(), torch.device("cuda"), Ops() as ops:
        yield ops


def layer() -> tuple[torch.Tensor, ...]:
    return torch.randn(40, 300, dtype=torch.bfloat16), torch.randn(4, 300), torch.randn(40, 4)


@pytest.mark.parametrize("captured", [False, True])
def test_what_waits_for_the_gpu(cuda, monkeypatch, captured):
    """A merge without a record is one op that waits for nothing; others wait, which a capture of a graph refuses."""
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: captured)
    weight, A, B = layer()
    assert weight.is_cuda
    cuda.names.clear()
    assert functional.lora_merge_(weight, A, B, 0.5, record=False) is None
    assert cuda.ours() == ["lora_merge_"] and "waits" not in cuda.names
    cuda.names.clear()
    error, text = (RuntimeError, "this merge waits for the GPU") if captured else (WAITS, None)
    with pytest.raises(error, match=text):  # the op itself waits
        functional.lora_merge_(weight, A, B, 0.5)
    A, B = pack_factors(weight.dtype, [(A, B, 0.5)])
    with pytest.raises(error, match=text):
        merge_all_("test", [weight], [A], [B], record=False)
    assert cuda.ours() == ([] if captured else ["lora_merge_check"])  # and not yet lora_merge_
