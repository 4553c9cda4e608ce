"""Compares results with the same formula in float64, within a bound for rounding errors.

The bound of an element is the formula's value for the absolute values of all operands, which rounding errors are
proportional to, times the units of the dtypes involved. Elements that could overflow on the way are not compared; where
the exact result is finite and far from overflow, ours must be finite, too.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from lora_ext import reference
from lora_ext._ops.checks import FLOATING, accumulation_dtype

from .cases import CannotTell, WrongResult

_SIXTEEN = (torch.bfloat16, torch.float16)


def plain(value: Any) -> Any:
    """Copies tensors, also in lists, without history; leaves that require gradients still do."""
    if isinstance(value, Tensor):
        if lacks_memory(value) or (value.is_quantized and value.is_neg()):
            raise CannotTell  # PyTorch crashes when it copies these
        return value.detach().clone().requires_grad_(value.is_leaf and value.requires_grad)
    if isinstance(value, (list, tuple)):
        return [plain(entry) for entry in value]
    return value


def lacks_memory(tensor: Tensor) -> bool:
    """Whether some of a tensor's elements lie outside its storage; PyTorch reads them anyway."""
    if tensor.layout != torch.strided or tensor.is_meta or tensor.numel() == 0 or tensor.is_nested:
        return False
    last = sum((size - 1) * stride for size, stride in zip(tensor.shape, tensor.stride(), strict=True))
    needed = (tensor.storage_offset() + last + 1) * tensor.element_size()
    return tensor.untyped_storage().nbytes() < needed


def tensors_in(value: Any) -> list[Tensor]:
    if isinstance(value, Tensor):
        return [value]
    if isinstance(value, (list, tuple)):
        return [tensor for entry in value for tensor in tensors_in(entry)]
    return []


def same_bits(first: Tensor, second: Tensor) -> bool:
    """Whether two tensors of equal size hold the same bits, including those of NaNs and zeros."""
    bits = (tensor.detach().contiguous().view(-1).view(torch.uint8) for tensor in (first, second))
    return first.dtype == second.dtype and torch.equal(*bits)


def _has_subnormals(before: Mapping[str, Any], computed_in: torch.dtype) -> bool:
    """Whether bfloat16 products take elements for zeros: those of bfloat16, and those of float32 rounded for them."""
    factors = tensors_in([value for name, value in before.items() if name.startswith("lora_")])
    rounds = computed_in == torch.bfloat16 and all(factor.dtype == torch.bfloat16 for factor in factors)
    dtypes = (torch.bfloat16, torch.float32) if rounds else (torch.bfloat16,)
    tensors = [tensor for tensor in tensors_in(list(before.values())) if tensor.dtype in dtypes]
    return any(((t != 0) & (t.abs() < torch.finfo(t.dtype).tiny)).any() for t in tensors)


def share_memory(values: Sequence[Any]) -> bool:
    storages = [t.untyped_storage().data_ptr() for t in tensors_in(values) if t.layout == torch.strided and t.numel()]
    return len(set(storages)) < len(storages)


def _in_float64(value: Any, absolute: bool) -> Any:
    """Converts an argument, or its absolute values, to float64."""
    if isinstance(value, Tensor):
        return _wide(value, absolute)
    if isinstance(value, (list, tuple)):
        return [_in_float64(entry, absolute) for entry in value]
    if isinstance(value, (int, float)) and not isinstance(value, bool):
        return abs(float(value)) if absolute else float(value)
    return value


def _wide(tensor: Tensor, absolute: bool) -> Tensor:
    if tensor.dtype not in FLOATING:
        return tensor.detach().clone()
    wide = tensor.detach().to(torch.float64).clone()
    return (wide.abs() if absolute else wide).requires_grad_(tensor.requires_grad)


def check_close(
    what: str,
    actual: Tensor,
    expected: Tensor,
    magnitude: Tensor,
    steps: int,
    computed_in: torch.dtype,
    keeps_nan: bool = True,
) -> None:
    """Checks ``actual`` against ``expected`` within the bound after ``steps`` additions in ``computed_in``.

    A NaN must stay one, unless ``keeps_nan`` is False, as with dropout, which can drop it.
    """
    if tuple(actual.shape) != tuple(expected.shape):
        raise WrongResult(f"{what} has shape {list(actual.shape)}, want {list(expected.shape)}")
    acc = accumulation_dtype(computed_in)
    unit = 4 * torch.finfo(actual.dtype).eps + (steps + 16) * torch.finfo(acc).eps
    if computed_in in _SIXTEEN:
        unit += 4 * torch.finfo(computed_in).eps
    smallest = max(torch.finfo(dtype).tiny for dtype in {actual.dtype, acc, computed_in})
    bound = magnitude * unit + 4 * smallest
    largest = min(torch.finfo(dtype).max for dtype in {actual.dtype, acc, computed_in})
    known = (magnitude < largest / 4) & expected.isfinite()
    error = (actual.detach().to(torch.float64) - expected).abs().nan_to_num(nan=float("inf"))
    wrong = known & (error > bound)
    if wrong.any():
        at = tuple(wrong.nonzero()[0].tolist())
        raise WrongResult(
            f"{what}{list(at)} is {actual[at].item()}, want {expected[at].item()} within {bound[at].item():.1e}; "
            f"{int(wrong.sum())} of {wrong.numel()} are wrong"
        )
    lost = expected.isnan() & actual.isfinite() & keeps_nan
    if lost.any():
        raise WrongResult(f"{what} is finite in {int(lost.sum())} elements that are NaN")


def check_scale(before: Mapping[str, Any], computed_in: torch.dtype) -> None:
    """Raises CannotTell if the factor of an update overflows by itself: times zero it is NaN."""
    largest = max(abs(float(scaling)) for scaling in [before.get("scaling", 0.0), *before.get("scalings", [])])
    if largest * rescale(before.get("dropout_p", 0.0)) > torch.finfo(accumulation_dtype(computed_in)).max / 4:
        raise CannotTell


def rescale(dropout_p: float) -> float:
    """Factor of the values that dropout keeps."""
    return 65536.0 / (65536.0 - reference.dropout_threshold(float(dropout_p)))


def against_formula(
    formula: Callable[..., Sequence[Tensor]],
    before: Mapping[str, Any],
    results: Sequence[Tensor],
    after: Mapping[str, Any],
    computed_in: torch.dtype,
    magnitude_formula: Callable[..., Sequence[Tensor]] | None = None,
) -> None:
    """Compares results and the gradients that the call left in its arguments, if any.

    ``formula`` takes the arguments by name, in float64, and returns the expected ``results``.
    """
    if any(tensor.is_meta for tensor in [*tensors_in(list(before.values())), *results]):
        raise CannotTell
    if _has_subnormals(before, computed_in):
        raise CannotTell  # the processor's instruction for pairs of bfloat16 treats them as zeros
    if any(tensor.dtype not in FLOATING for tensor in results):
        raise WrongResult(f"results have dtypes {[tensor.dtype for tensor in results]}")
    check_scale(before, computed_in)
    runs = []
    for absolute in (False, True):
        arguments = {name: _in_float64(value, absolute) for name, value in before.items()}
        function = (magnitude_formula or formula) if absolute else formula
        with torch.enable_grad():
            runs.append((arguments, list(function(**arguments))))
    (exact, expected), (sizes, magnitudes) = runs
    keeps_nan = reference.dropout_threshold(float(before.get("dropout_p", 0.0))) == 0
    steps = sum(size for tensor in tensors_in(list(before.values())) for size in tensor.shape)
    if len(results) != len(expected):
        raise WrongResult(f"there are {len(results)} results, want {len(expected)}")
    for i, (ours, value, magnitude) in enumerate(zip(results, expected, magnitudes, strict=True)):
        check_close(f"result {i}", ours, value.detach(), magnitude.detach(), steps, computed_in, keeps_nan)

    leaves = [(name, i, t) for name in before if name in after for i, t in enumerate(tensors_in(after[name]))]
    leaves = [(name, i, leaf) for name, i, leaf in leaves if leaf.is_leaf and leaf.grad is not None]
    if not leaves or share_memory([after[name] for name in before if name in after]):
        return  # arguments that are views of each other share gradients
    for outputs, sign in ((expected, None), (magnitudes, torch.abs)):
        pairs = [
            (o, torch.linspace(-1, 1, o.numel()).to(r.dtype).double().view(o.shape))
            for o, r in zip(outputs, results, strict=True)
        ]
        pairs = [(o, p if sign is None else sign(p)) for o, p in pairs if o.requires_grad]
        torch.autograd.backward([o for o, _ in pairs], [p for _, p in pairs])
    for name, i, leaf in leaves:
        value, magnitude = (tensors_in(run[name])[i].grad for run in (exact, sizes))
        if value is None:
            value = magnitude = torch.zeros(leaf.shape, dtype=torch.float64)
        check_close(f"gradient of {name}", leaf.grad, value, magnitude, steps, computed_in, keeps_nan)
