"""Merges that fail or are interrupted in the middle: every layer keeps its bits and its merge state."""

from __future__ import annotations

import copy
import signal
import sys
import threading
from collections.abc import Iterator

import pytest
import torch
from support.merged_models import all_same, assert_restores, hard_layer, hard_model, merged_sets, refused, weights
from support.merging import same_bits
from support.processes import run_forked
from torch import nn

from lora_ext import functional, merge, unmerge
from lora_ext.adapters import merge_and_unload
from lora_ext.merging import layers as merged_module
from lora_ext.merging.weights import MergeRecord

pytestmark = pytest.mark.full

MERGE = "lora_merge_record_"
HERE = torch.get_default_device().type


def test_out_of_memory_before_the_first_weight_changes(monkeypatch):
    model = hard_model([torch.float32, torch.bfloat16])
    pristine = weights(model)
    merge(model, "a")

    failed = []

    def fail_once(self, device):
        if self.dtype == torch.bfloat16 and not failed:
            failed.append(True)
            raise torch.OutOfMemoryError("nothing left")
        return self

    with monkeypatch.context() as patch:
        patch.setattr(MergeRecord, "to", fail_once)
        for change in (lambda: unmerge(model), lambda: merge(model, "b")):
            failed.clear()
            with refused(model, torch.OutOfMemoryError, "nothing left"):
                change()
    assert_restores(model, pristine)


SHORT_OF_MEMORY = """
import resource, threading, torch
from lora_ext.merging.weights import merge_all_, unmerge_all_

torch.set_num_threads(1)
weights = [torch.randn(4, 300), torch.randn(1, 2**20)]
before = [weight.clone() for weight in weights]
factors = [torch.randn(2, 300), torch.randn(64, 2**20)], [torch.randn(4, 2), torch.randn(1, 64)]  # 256 MiB
records = merge_all_("test", weights, *factors)
merged, errors = [weight.clone() for weight in weights], []

def unmerge():
    try:
        unmerge_all_("test", weights, records)
    except torch.OutOfMemoryError as error:
        errors.append(error)

used = int(open("/proc/self/statm").read().split()[0]) * resource.getpagesize()
resource.setrlimit(resource.RLIMIT_AS, (used + 2**27, -1))
thread = threading.Thread(target=unmerge)  # a new thread has no memory cached from the merge
thread.start(), thread.join()
assert "lora_unmerge_: out of memory. It wanted 268" in str(errors), errors
assert all(map(torch.equal, weights, merged))
resource.setrlimit(resource.RLIMIT_AS, (-1, -1))
unmerge_all_("test", weights, records)
assert all(map(torch.equal, weights, before))
"""


SHORT_OF_MEMORY_FOR_RECORDS = """
import resource, torch
from lora_ext.merging.weights import merge_all_

torch.set_num_threads(2)
shapes = [(600, 500), (4096, 4096)]
weights = [torch.randn(shape) for shape in shapes]
before = [weight.clone() for weight in weights]
As, Bs = [torch.randn(2, k) for _, k in shapes], [1e3 * torch.randn(n, 2) for n, _ in shapes]
used = int(open("/proc/self/statm").read().split()[0]) * resource.getpagesize()
resource.setrlimit(resource.RLIMIT_AS, (used + {room} * 2**20, -1))
try:
    records = merge_all_("test", weights, As, Bs)
except torch.OutOfMemoryError as error:
    assert "lora_merge_record_: out of memory. It wanted " in str(error), error
    assert all(map(torch.equal, weights, before))
else:
    raise AssertionError("there was room for a record as large as the weight")
resource.setrlimit(resource.RLIMIT_AS, (-1, -1))
merge_all_("test", weights, As, Bs)
assert not any(map(torch.equal, weights, before))
"""


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="needs a limit on memory")
@pytest.mark.cpu_only("limits the CPU's memory")
@pytest.mark.parametrize(
    "script",
    [
        SHORT_OF_MEMORY,  # no room for the second weight's copy of lora_A; the first weight needs little
        *(SHORT_OF_MEMORY_FOR_RECORDS.format(room=room) for room in (16, 40, 80, 120)),  # below 2 * 64 MiB
    ],
    ids=["factors", "records, 16", "records, 40", "records, 80", "records, 120"],
)
def test_out_of_memory_in_an_op(script):
    result = run_forked("-c", script)
    assert result.returncode == 0, result.stderr


@pytest.mark.parametrize("error", [MemoryError, KeyboardInterrupt, SystemExit])
def test_an_error_between_unmerging_the_old_set_and_merging_the_new_one(monkeypatch, error):
    model = hard_model([torch.float32, torch.bfloat16])
    pristine = weights(model)
    merge(model, "a")

    original, failed = merged_module.merge_all_, []

    def fail_once(caller, weights, *arguments, **options):
        if failed:
            return original(caller, weights, *arguments, **options)
        failed.append(all_same(weights, pristine[: len(weights)]))
        raise error("now")

    with monkeypatch.context() as patch:
        patch.setattr(merged_module, "merge_all_", fail_once)
        for change in (lambda: merge(model, "b"), lambda: model["layer0"].merge("b")):
            failed.clear()
            with refused(model, error, "now"):
                change()
            assert failed == [True]
    assert_restores(model, pristine)


class PressesCtrlC:
    """Stands in for an op during which Ctrl-C is pressed: Python raises KeyboardInterrupt when it returns."""

    def __init__(self, op) -> None:
        self.default, self.calls = self, 0
        self.op = op

    def __call__(self, *arguments):
        result = self.op.default(*arguments)
        self.calls += 1
        signal.raise_signal(signal.SIGINT)
        return result


@pytest.fixture
def ctrl_c() -> Iterator[None]:
    """Makes SIGINT raise KeyboardInterrupt, Python's default."""
    if threading.current_thread() is not threading.main_thread():
        pytest.skip("signals are for the main thread")
    previous = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
    signal.signal(signal.SIGINT, previous)


@pytest.mark.parametrize("op", [MERGE, "lora_unmerge_"])
def test_ctrl_c_during_an_op_takes_effect_after_the_change(monkeypatch, ctrl_c, op):
    model = hard_model([torch.float32, torch.bfloat16])
    pristine, expected = weights(model), copy.deepcopy(model)
    merge(model, "a")
    merge(expected, ["a", "b"])
    with monkeypatch.context() as patch:
        pressed = PressesCtrlC(getattr(torch.ops.lora_ext, op))
        patch.setattr(torch.ops.lora_ext, op, pressed)
        with pytest.raises(KeyboardInterrupt):
            merge(model, "b")
        assert pressed.calls >= 2
    assert merged_sets(model) == [("a", "b")] * 2 and all_same(weights(model), weights(expected))
    assert_restores(model, pristine)


def test_ctrl_c_while_unloading(monkeypatch, ctrl_c):
    model = nn.ModuleList([hard_layer(torch.float32)])
    expected = copy.deepcopy(model[0])
    expected.merge()
    with monkeypatch.context() as patch:
        op = MERGE if HERE == "cpu" else "lora_merge_"  # without a record
        patch.setattr(torch.ops.lora_ext, op, PressesCtrlC(getattr(torch.ops.lora_ext, op)))
        with pytest.raises(KeyboardInterrupt):
            merge_and_unload(model)
    assert type(model[0]) is nn.Linear and same_bits(model[0].weight, expected.weight)


def test_ctrl_c_during_a_merge_that_is_refused(monkeypatch, ctrl_c):
    model = hard_model([torch.float32, torch.bfloat16])
    pristine = weights(model)
    merge(model, "a")
    with torch.no_grad():
        model["layer1"].adapters["b"].lora_A[0, 0] = float("nan")
    with monkeypatch.context() as patch:
        patch.setattr(torch.ops.lora_ext, "lora_unmerge_", PressesCtrlC(torch.ops.lora_ext.lora_unmerge_))
        with refused(model, KeyboardInterrupt, "^$"):
            merge(model, "b")
    assert_restores(model, pristine)


@pytest.mark.parametrize("op", [MERGE, "lora_unmerge_"])
def test_ctrl_c_leaves_a_weight_outside_layers_unchanged(monkeypatch, ctrl_c, op):
    """Otherwise the caller would have no record, or one that no longer matches the weight."""
    weight = torch.randn(6, 300)
    before, arguments = weight.clone(), (torch.randn(2, 300), torch.randn(6, 2), 0.3)
    record = functional.lora_merge_(weight, *arguments)
    merged_weight = weight.clone()
    if op == MERGE:
        functional.lora_unmerge_(weight, record)
    with monkeypatch.context() as patch:
        patch.setattr(torch.ops.lora_ext, op, PressesCtrlC(getattr(torch.ops.lora_ext, op)))
        with pytest.raises(KeyboardInterrupt):
            functional.lora_merge_(weight, *arguments) if op == MERGE else functional.lora_unmerge_(weight, record)
    assert same_bits(weight, before if op == MERGE else merged_weight)


@pytest.mark.parametrize("op", [MERGE, "lora_unmerge_"])
def test_a_launch_that_fails_after_another(monkeypatch, op):
    model = hard_model([torch.float32, torch.bfloat16])
    pristine = weights(model)
    merge(model, "a")
    original = getattr(torch.ops.lora_ext, op).default

    class FailsOnce:
        failed = False

        def default(self, weights, *arguments):
            if weights[0].dtype == torch.bfloat16 and not self.failed:
                self.failed = True
                raise RuntimeError("launch failed")
            return original(weights, *arguments)

    with monkeypatch.context() as patch:
        patch.setattr(torch.ops.lora_ext, op, FailsOnce())
        with refused(model, RuntimeError, "launch failed"):
            merge(model, "b")
    assert_restores(model, pristine)


def test_merging_in_another_thread():
    layer = hard_layer(torch.float32)
    pristine = layer.weight.clone()
    for action in (layer.merge, layer.unmerge):
        thread = threading.Thread(target=action)
        thread.start(), thread.join()
    assert same_bits(layer.weight, pristine) and not layer.is_merged
