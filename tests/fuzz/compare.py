"""Compares results with the same formula in float64, within a bound for rounding errors.

The bound of an element is the formula's value for the absolute values of all operands, which rounding errors are
proportional to, times the units of the dtypes involved. Elements that could overflow on the way are not compared; where
the exact result is finite and far from overflow, ours must be finite, too.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from support import op_table
from support.layers import rounds_factors
from support.merging import same_bits
from support.op_table import Sample, entry_of, label, tensors_of
from torch import Tensor
from torch.utils import _pytree as pytree

from lora_ext import functional, reference
from lora_ext._ops.checks import FLOATING, accumulation_dtype
from lora_ext._ops.plain import scale

_SIXTEEN = (torch.bfloat16, torch.float16)


class CannotTell(Exception):
    """Raised by an oracle that has nothing to compare with for these arguments."""


class WrongResult(Exception):
    """Raised if a result differs from the formula's."""


def plain(value: Any) -> Any:
    """Copies tensors, also in lists, without history; leaves that require gradients still do."""
    return pytree.tree_map_only(Tensor, _plain, value)


def _plain(tensor: Tensor) -> Tensor:
    if lacks_memory(tensor) or (tensor.is_quantized and tensor.is_neg()):
        raise CannotTell  # PyTorch crashes when it copies these
    return tensor.detach().clone().requires_grad_(tensor.is_leaf and tensor.requires_grad)


def lacks_memory(tensor: Tensor) -> bool:
    """Whether some of a tensor's elements lie outside its storage; PyTorch reads them anyway."""
    if tensor.layout != torch.strided or tensor.is_meta or tensor.numel() == 0 or tensor.is_nested:
        return False
    last = sum((size - 1) * stride for size, stride in zip(tensor.shape, tensor.stride(), strict=True))
    needed = (tensor.storage_offset() + last + 1) * tensor.element_size()
    return tensor.untyped_storage().nbytes() < needed


def tensors_in(value: Any) -> list[Tensor]:
    return [leaf for leaf in pytree.tree_leaves(value) if isinstance(leaf, Tensor)]


def _has_subnormals(before: Mapping[str, Any], computed_in: torch.dtype) -> bool:
    """Whether bfloat16 products take elements for zeros: those of bfloat16, and of factors that are rounded to it."""
    is_rounded = rounds_factors(torch.device("cpu"), computed_in)
    factors = [value for name, value in before.items() if name.startswith(("lora_", "down_weight", "up_weight"))]
    tensors = [tensor for tensor in tensors_in([*before.values()]) if tensor.dtype == torch.bfloat16]
    tensors += [tensor for tensor in tensors_in(factors) if is_rounded and tensor.dtype == torch.float32]
    return any(((t != 0) & (t.abs() < torch.finfo(t.dtype).tiny)).any() for t in tensors)


def share_memory(values: Sequence[Any]) -> bool:
    storages = [t.untyped_storage().data_ptr() for t in tensors_in(values) if t.layout == torch.strided and t.numel()]
    return len(set(storages)) < len(storages)


def _in_float64(value: Any, absolute: bool) -> Any:
    """Converts an argument, or its absolute values, to float64."""

    def converted(leaf: Any) -> Any:
        if isinstance(leaf, Tensor):
            wide = leaf.detach().to(torch.float64 if leaf.dtype in FLOATING else leaf.dtype, copy=True)
            return wide.abs() if absolute and wide.is_floating_point() else wide
        if isinstance(leaf, int | float) and not isinstance(leaf, bool):
            return abs(float(leaf)) if absolute else float(leaf)
        return leaf

    return pytree.tree_map(converted, value)


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


def _largest(before: Mapping[str, Any]) -> float:
    """Returns the largest finite element of all tensors, and at least 1."""
    tensors = [t.detach().double() for t in tensors_in([*before.values()]) if t.is_floating_point() and t.numel()]
    return max([1.0, *(t[t.isfinite()].abs().max().item() for t in tensors if t.isfinite().any())])


def check_formula(
    formula: Callable[..., Sequence[Tensor]], before: Mapping[str, Any], result: Any, after: Mapping[str, Any]
) -> None:
    """Compares the results of a function, and the gradients that it left in its arguments, if any.

    ``formula`` takes the arguments by name, in float64, and returns the expected results.
    """
    results, dropout_p = tensors_in(result), float(before.get("dropout_p", 0.0))
    if dropout_p > 0 and before.get("seed") is None:
        raise CannotTell  # the function drew the mask
    if "y" in after and result is not after["y"]:
        raise WrongResult("the result is not y")
    if any(tensor.is_meta for tensor in [*tensors_in([*before.values()]), *results]):
        raise CannotTell
    computed_in = before["x"].dtype
    if _has_subnormals(before, computed_in):
        raise CannotTell  # the processor's instruction for pairs of bfloat16 treats them as zeros
    if any(tensor.dtype not in FLOATING for tensor in results):
        raise WrongResult(f"results have dtypes {[tensor.dtype for tensor in results]}")
    largest = max(abs(float(scaling)) for scaling in [before.get("scaling", 0.0), *before.get("scalings", [])])
    largest *= scale(1.0, dropout_p) * (_largest(before) if dropout_p > 0 else 1.0)
    if largest > torch.finfo(accumulation_dtype(computed_in)).max / 4:
        raise CannotTell  # a factor overflows by itself: times zero, or what dropout drops, it is NaN
    leaves = [(name, i) for name, i, t in tensors_of(after) if name != "y" and t.is_leaf and t.grad is not None]
    if share_memory([after[name] for name in before if name != "y"]):
        leaves = []  # arguments that are views of each other share gradients
    grads = [torch.linspace(-1, 1, y.numel()).to(y.dtype).double().view(y.shape) for y in results]
    # Every activation is at most its argument's size plus an eighth.
    rest, times = ({"activation": "identity"}, 1.2) if "activation" in before else ({}, 1)
    call, sizes = ({n: _in_float64(value, absolute) for n, value in before.items()} for absolute in (False, True))
    exact = op_table.results(formula, Sample(call, grads), leaves)
    of_sizes = Sample(sizes | rest, [grad.abs() for grad in grads])
    magnitudes = op_table.results(lambda **call: [times * y for y in formula(**call)], of_sizes, leaves)
    found = {f"result {i}": y for i, y in enumerate(results)}
    found |= {f"grad of {label(*place)}": entry_of(after, *place).grad for place in leaves}
    keeps_nan = reference.dropout_threshold(dropout_p) == 0
    steps = sum(size for tensor in tensors_in([*before.values()]) for size in tensor.shape)
    for name, ours in found.items():
        check_close(name, ours, exact[name], magnitudes[name], steps, computed_in, keeps_nan)


def check_seed(before: Mapping[str, Any], result: Tensor, after: Mapping[str, Any]) -> None:
    """Checks a drawn seed: not negative, as those of a single process."""
    device = torch.device(before["device"] or "cpu").type
    if result.dtype != torch.int64 or result.shape != () or result.device.type != device:
        raise WrongResult(f"the seed is {result}")
    if device == "meta":
        raise CannotTell
    if result < 0:
        raise WrongResult(f"the seed is {result}")


def check_merge(before: Mapping[str, Any], record: functional.MergeRecord | None, after: Mapping[str, Any]) -> None:
    """Checks a merged weight, and that unmerging restores every bit."""
    if share_memory([*after.values()]) or before["seed"] is not None:
        raise CannotTell  # the result depends on the order of writes, or on random numbers
    W, A, B = (before[name].detach().double() for name in ("weight", "lora_A", "lora_B"))
    scaling, computed_in = float(before["scaling"]), accumulation_dtype(before["weight"].dtype)
    magnitude = W.abs() + abs(scaling) * (B.abs() @ A.abs())
    check_close("weight", after["weight"], W + scaling * (B @ A), magnitude, A.shape[0], computed_in)
    if record is not None:
        again = after["weight"].detach().clone()
        functional.lora_unmerge_(again, record)
        if not same_bits(again, before["weight"]):
            raise WrongResult("merged and unmerged, the weight has other bits than before")
