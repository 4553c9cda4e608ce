"""Counts the memory that a training step holds and allocates, from PyTorch's records instead of the process's size."""

from __future__ import annotations

import ctypes
from collections.abc import Callable, Iterable
from itertools import accumulate

import torch
from torch import Tensor, nn


def saved_storages(call: Callable[[], object], beyond: Iterable[Tensor] = ()) -> dict[int, int]:
    """Returns the storages that autograd keeps for the backward of ``call``: bytes by address.

    beyond: tensors that exist anyway, such as parameters; their storages are not counted.
    """
    known = {tensor.untyped_storage().data_ptr() for tensor in beyond}
    found: dict[int, int] = {}

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.nbytes() and storage.data_ptr() not in known:
            found[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        result = call()  # keeps the graph, and so the addresses, until all are counted
    del result
    return found


def keep_freed_memory() -> str:
    """Makes glibc keep freed blocks up to 32 MiB for the rest of the process; returns what a title says of it.

    By default it returns them to the system, or not, depending on the largest block that was freed before. Then each
    step of a small model takes up to 100 MB of new pages, a fifth of its time, or none, whoever's model it is.
    """
    trim_threshold, mmap_threshold = -1, -3  # mallopt(3)
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except AttributeError:
        return ""
    is_kept = mallopt(mmap_threshold, 1 << 25) and mallopt(trim_threshold, (1 << 31) - 1)
    return ", freed memory kept" if is_kept else ""


def activation_bytes(model: nn.Module, call: Callable[[], object]) -> int:
    """Bytes that autograd keeps for the backward of one forward of ``model``, beyond its parameters and buffers."""
    return sum(saved_storages(call, [*model.parameters(), *model.buffers()]).values())


def allocations(call: Callable[[], object]) -> tuple[object, list[int]]:
    """Returns ``call()`` and its allocations of CPU tensors in bytes, in order; freeing is negative."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
        result = call()
    events = [event for event in profile.profiler.kineto_results.events() if event.name() == "[memory]"]
    return result, [event.nbytes() for event in sorted(events, key=lambda event: event.start_ns())]


def peak_bytes(call: Callable[[], object], device: str) -> int:
    """Peak bytes of tensors on ``device`` during ``call``, beyond those held before."""
    if device == "cuda":
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        call()
        torch.cuda.synchronize()
        return torch.cuda.max_memory_allocated() - before
    return max(accumulate(allocations(call)[1], initial=0))
