"""Seconds of forward passes, and bytes in memory and on disk."""

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
    """The most memory this process has held so far: on the GPU by PyTorch's count, else resident in RAM."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


def tensor_bytes(model: torch.nn.Module) -> int:
    """Bytes of the model's distinct tensors: what its checkpoint takes, less a header of some kilobytes."""
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
    """Seconds of ``rounds`` forward passes of each model. They take turns, so that a busy machine slows all alike.

    Each follows one of the same model that is not timed: models that share weights would else find them in the cache,
    and the first of them would not. No round begins after ``seconds``, once there are three.
    """
    synchronize: Callable[[], None] = torch.cuda.synchronize if torch.cuda.is_available() else lambda: None
    taken: dict[Key, list[float]] = {name: [] for name in models}
    end = time.perf_counter() + seconds
    for round_number in range(rounds + 2):
        if round_number >= 5 and time.perf_counter() > end:
            break
        for name, model in models.items():
            model(**inputs)
            synchronize()
            start = time.perf_counter()
            model(**inputs)
            synchronize()
            if round_number >= 2:  # the first ones warm up
                taken[name].append(time.perf_counter() - start)
    return taken
