"""Merges that fail in the middle: every layer keeps its bits and its merge state."""

from __future__ import annotations

import sys
import threading

import pytest
import torch
from support.merged_models import all_same, assert_restores, hard_layer, hard_model, refused, weights
from support.merging import same_bits
from support.processes import run_forked

from lora_ext import merge, unmerge
from lora_ext.merging import layers as merged_module
from lora_ext.merging.weights import MergeRecord

pytestmark = pytest.mark.full

MERGE = "lora_merge_record_"


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
