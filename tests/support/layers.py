"""Compares results with plain PyTorch's, and measures what autograd keeps of a layer, for tests of ops and layers."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import TypeVar

import pytest
import torch
from torch import Tensor, nn

from lora_ext import _load

T = TypeVar("T")

# dtypes of x and the factors: the usual pairs, and two unusual ones.
DTYPES = [
    (torch.float64, torch.float64),
    (torch.float32, torch.float32),
    (torch.bfloat16, torch.bfloat16),
    (torch.bfloat16, torch.float32),
    (torch.float16, torch.float16),
    (torch.float16, torch.float32),
    (torch.float32, torch.bfloat16),
    (torch.float64, torch.float32),
]


def dtypes_id(dtypes: tuple[torch.dtype, torch.dtype]) -> str:
    return f"{dtypes[0]}-{dtypes[1]}".replace("torch.", "")


# The pairs that make test-quick tests; make test has all.
QUICK = [
    (torch.float32, torch.float32),
    (torch.bfloat16, torch.bfloat16),
    (torch.bfloat16, torch.float32),
    (torch.float16, torch.float32),
]
of_dtypes = pytest.mark.parametrize(
    "dtypes", [pytest.param(pair, marks=[pytest.mark.full] * (pair not in QUICK)) for pair in DTYPES], ids=dtypes_id
)


def relative_error(value: Tensor, exact: Tensor) -> float:
    if exact.numel() == 0:
        return 0.0
    return ((value.double() - exact.double()).norm() / exact.double().norm().clamp_min(1e-300)).item()


def assert_errors_as_plain(
    results: list[tuple[dict[str, Tensor], ...]], x_dtype: torch.dtype, factor_dtype: torch.dtype
) -> None:
    """Checks (our, exact, plain PyTorch's) results by name: our joint error is at most twice plain PyTorch's."""
    joint: dict[str, list[list[Tensor]]] = {}
    for ours, exact, plain in results:
        for name in ours:
            assert ours[name].shape == exact[name].shape and ours[name].dtype == plain[name].dtype, name
            joint.setdefault(name, []).append([result[name].flatten() for result in (ours, exact, plain)])
    # If plain PyTorch is exact by chance, the last bit of a float32 (float64) sum is still allowed.
    floor = 1e-14 if x_dtype == torch.float64 else 1e-6
    if factor_dtype != x_dtype:
        floor = max(floor, torch.finfo(factor_dtype).eps)
    for name, values in joint.items():
        value, exact_value, plain_value = (torch.cat(parts) for parts in zip(*values, strict=True))
        error, plain_error = relative_error(value, exact_value), relative_error(plain_value, exact_value)
        assert error <= 2 * plain_error + floor, f"{name}: error {error:.3g}, plain PyTorch's {plain_error:.3g}"


emulations = 0
"""How many emulated GPUs (simt/driver.py) the code runs in."""


def rounds_factors(device: torch.device, x_dtype: torch.dtype) -> bool:
    """Returns whether kernels round wider factors to the dtype of x, as autocast does: where they multiply its bits."""
    if device.type == "cuda" or emulations:
        return x_dtype.itemsize == 2
    return x_dtype == torch.bfloat16 and _load.cpu_isa() in ("avx512_bf16", "amx")


def with_threads(numbers: Iterable[int], function: Callable[[], T]) -> list[T]:
    """Returns what ``function`` returns with each number of threads."""
    before, found = torch.get_num_threads(), []
    try:
        for number in numbers:
            torch.set_num_threads(number)
            found.append(function())
    finally:
        torch.set_num_threads(before)
    return found


def misaligned(matrix: Tensor) -> Tensor:
    """Copies a matrix to a view in which no row is aligned to 16 bytes."""
    wide = matrix.new_empty(matrix.shape[0], matrix.shape[1] // 8 * 8 + 16)
    view = wide[:, 1 : 1 + matrix.shape[1]]
    return view.copy_(matrix)


def saved_bytes(function: Callable[[], object]) -> list[tuple[tuple, int]]:
    """Returns shapes and bytes of the tensors that autograd keeps for the backward, without parameters."""
    saved = []

    def pack(tensor):
        if not isinstance(tensor, nn.Parameter):
            saved.append((tuple(tensor.shape), tensor.nbytes))
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        function()
    return saved


def delta_of(layer: nn.Module, name: str = "default") -> Tensor:
    """The update of a layer's weight, in its shape: packed projections, experts and convolutions have views of it."""
    weight, factors = layer.weight, layer.factors(name)
    delta = torch.zeros_like(weight, dtype=factors[next(iter(factors))][0].dtype)
    for key, matrix in layer.matrices().items():
        if key.startswith("weight") and key in factors:
            begin = matrix.view.storage_offset() - weight.storage_offset()
            delta.as_strided(matrix.view.shape, matrix.view.stride(), begin).copy_(layer.delta_weight(name, key))
    return delta
