"""Measures seconds of forward passes, and bytes in memory and on disk."""

from __future__ import annotations

import math
import resource
import sys
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, TypeVar

import torch

Key = TypeVar("Key")


def peak_memory_bytes(device: torch.device) -> int:
    """Returns the peak memory of this process: on a GPU by PyTorch's count, otherwise resident in RAM."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


def tensor_bytes(model: torch.nn.Module) -> int:
    """Bytes of the model's distinct tensors: its checkpoint's size without the header of some kilobytes."""
    tensors = {tensor.data_ptr(): tensor for tensor in model.state_dict().values()}
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors.values())


def directory_bytes(directory: Path) -> int:
    return sum(file.stat().st_size for file in directory.rglob("*") if file.is_file())


@torch.inference_mode()
def latencies(
    models: Mapping[Key, Callable[..., Any]],
    inputs: Mapping[str, torch.Tensor],
    rounds: int = 11,
    seconds: float = math.inf,
) -> dict[Key, list[float]]:
    """Times ``rounds`` forward passes of each model, in turns, so that a busy machine slows them equally.

    An untimed pass of the same model precedes each timed one: otherwise models that share weights would find them in
    the cache, except the first. After three rounds, no round starts later than ``seconds``.
    """
    synchronize: Callable[[], None] = torch.cuda.synchronize if torch.cuda.is_available() else lambda: None
    taken: dict[Key, list[float]] = {name: [] for name in models}
    end = time.perf_counter() + seconds
    for round_number in range(rounds + 2):
        if round_number >= 5 and time.perf_counter() > end:
            break
        for name, model in models.items():
            model(**inputs)  # untimed
            synchronize()
            start = time.perf_counter()
            model(**inputs)
            synchronize()
            if round_number >= 2:  # the first ones warm up
                taken[name].append(time.perf_counter() - start)
    return taken
