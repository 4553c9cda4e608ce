"""Checks that all tensor arguments of an op are dense and on one device, whether the op uses them or not.

PyTorch also calls the fake kernels for real tensors if one argument is a meta tensor: they would return uninitialised
memory. So they check every tensor of every call. csrc/bindings/op.h does the same for the compiled ops.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping

import torch
from torch import Tensor

from lora_ext._ops.refusals import refusal

_functorch = torch._C._functorch


def tensors_of(arguments: Mapping[str, object]) -> Iterator[tuple[str, Tensor]]:
    """Yields the tensors among arguments and in lists, each with its name in messages: ``weight``, ``weights[1]``."""
    for name, value in arguments.items():
        if isinstance(value, Tensor):
            yield name, value
        elif isinstance(value, (list, tuple)):
            yield from ((f"{name}[{i}]", entry) for i, entry in enumerate(value) if isinstance(entry, Tensor))


def is_wrapper(tensor: Tensor) -> bool:
    """Returns whether it is a batch or a level of torch.func, which has no storage and which no kernel reads."""
    return _functorch.is_functorch_wrapped_tensor(tensor) or _functorch.is_legacy_batchedtensor(tensor)


def check_tensors(op: str, arguments: Mapping[str, object]) -> None:
    """Raises TypeError for a tensor that is not dense or that PyTorch quantised, ValueError for one on another device
    than the first tensor.
    """
    first: tuple[str, Tensor] | None = None
    for label, tensor in tensors_of(arguments):
        if tensor.is_nested:
            raise TypeError(f"{op}: {label} is a nested tensor, want a dense one")
        if tensor.layout is not torch.strided:
            raise TypeError(
                f"{op}: {label} has layout {str(tensor.layout).removeprefix('torch.')}, want a dense tensor"
            )
        if tensor.is_quantized:
            raise refusal(op, "dtype", label, str(tensor.dtype).removeprefix("torch."))
        first = first or (label, tensor)
        if not _is_same(tensor.device, first[1].device):
            raise refusal(op, "device", label, tensor.device, first[0], first[1].device)


def check_memory_is_there(op: str, arguments: Mapping[str, object]) -> None:
    """Raises RuntimeError for a tensor beyond its storage, in the words of the compiled ops; PyTorch would read it."""
    for label, tensor in tensors_of(arguments):
        if type(tensor) not in (Tensor, torch.nn.Parameter) or tensor.is_meta or tensor.numel() == 0:
            continue
        if is_wrapper(tensor):
            continue
        if tensor._is_zerotensor():
            continue
        last = sum((size - 1) * stride for size, stride in zip(tensor.shape, tensor.stride(), strict=True))
        needed = (tensor.storage_offset() + last + 1) * tensor.element_size()
        if tensor.untyped_storage().nbytes() < needed:
            shape = list(tensor.shape)
            raise RuntimeError(f"{op}: {label} is {shape}, but its storage has been freed or made smaller")


_NOT_SAVED = "Inference tensors cannot be saved for backward"  # PyTorch's words


def explain_inference(op: str, arguments: Mapping[str, object], error: Exception) -> None:
    """Raises RuntimeError with the names of the inference tensors, if ``error`` is that autograd cannot keep one."""
    if str(error).startswith(_NOT_SAVED):
        names = [label for label, tensor in tensors_of(arguments) if tensor.is_inference()]
        are = "is an inference tensor" if len(names) == 1 else "are inference tensors"
        raise RuntimeError(
            f"{op}: {', '.join(names)} {are}, which autograd cannot keep for the backward; "
            f"pass {', '.join(f'{name}.clone()' for name in names)}"
        ) from None


def _is_same(device: torch.device, other: torch.device) -> bool:
    """Returns whether the two are one device: cpu:0 is the CPU."""
    return device == other or (device.type == other.type and device.type in ("cpu", "meta"))
