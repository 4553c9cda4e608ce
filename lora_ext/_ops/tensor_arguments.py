"""Checks that all tensors that an op is given are dense and on one device, whether it uses them or not.

PyTorch calls the fake kernels for real tensors too, where one of them is a meta tensor: they would answer with memory
that nobody has written. They check every tensor of every call. csrc/bindings/op.h is the same for the compiled ops.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping

import torch
from torch import Tensor


def tensors_of(arguments: Mapping[str, object]) -> Iterator[tuple[str, Tensor]]:
    """The tensors among arguments and in lists, each with its name in messages: ``weight``, ``weights[1]``."""
    for name, value in arguments.items():
        if isinstance(value, Tensor):
            yield name, value
        elif isinstance(value, (list, tuple)):
            yield from ((f"{name}[{i}]", entry) for i, entry in enumerate(value) if isinstance(entry, Tensor))


def check_tensors(op: str, arguments: Mapping[str, object]) -> None:
    """TypeError for the first tensor that is not dense, ValueError for one that is elsewhere than the first."""
    first: tuple[str, Tensor] | None = None
    for label, tensor in tensors_of(arguments):
        if tensor.is_nested:
            raise TypeError(f"{op}: {label} is a nested tensor, want a dense one")
        if tensor.layout is not torch.strided:
            raise TypeError(
                f"{op}: {label} has layout {str(tensor.layout).removeprefix('torch.')}, want a dense tensor"
            )
        first = first or (label, tensor)
        if not _is_same(tensor.device, first[1].device):
            raise ValueError(f"{op}: {label} is on {tensor.device} but {first[0]} is on {first[1].device}")


def _is_same(device: torch.device, other: torch.device) -> bool:
    """cpu:0 is the CPU."""
    return device == other or (device.type == other.type and device.type in ("cpu", "meta"))
