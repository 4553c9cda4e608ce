"""Registers the number of operations of every op for torch.utils.flop_counter.FlopCounterMode.

The formulas are registered when that module is imported, not before: where Triton is installed it imports Triton, and
on a CUDA build without Triton it logs a warning.
"""

from __future__ import annotations

import importlib.abc
import importlib.util
import sys
from collections.abc import Callable, Mapping
from math import prod
from types import ModuleType
from typing import Any

import torch

from lora_ext._ops.registration import OPS, Op

_MODULE = "torch.utils.flop_counter"


def count(op: str, arguments: Mapping[str, Any]) -> int:
    """Counts two operations for each multiply-add of a call, as PyTorch does.

    Args:
        arguments: by name, with shapes in place of tensors.
    """
    if op == "lora_dropout_mask":
        return 0
    if "merge" in op:
        return sum(
            2 * prod(weight) * A[0] for weight, A in zip(arguments["weights"], arguments["lora_As"], strict=True)
        )
    base, A, B = (_num_elements(op, arguments, name) for name in ("weight", "lora_A", "lora_B"))
    first = next(iter(arguments.values()))  # of the tokens in all ops, or a list of such tensors
    num_tokens = prod((first[0] if _is_list(first) else first)[:-1])
    if "output_mask" not in arguments:
        return 2 * num_tokens * (base + A + B)
    want_x, *wanted = arguments["output_mask"]
    if len(wanted) == 1:  # of one factor
        return 2 * num_tokens * (want_x + wanted[0]) * (A + B)
    want_A, want_B = any(wanted[: len(wanted) // 2]), any(wanted[len(wanted) // 2 :])
    return 2 * num_tokens * (want_x * (base + A) + want_A * A + (want_x or want_A) * B + want_B * B)


def _is_list(value: Any) -> bool:
    return len(value) > 0 and isinstance(value[0], (list, tuple))


def _num_elements(op: str, arguments: Mapping[str, Any], name: str) -> int:
    """Counts the elements of the argument, or of all of the list with this name in the plural."""
    value = arguments.get(name) or arguments.get(f"{name}s") or ()
    matrices = value if _is_list(value) else [value] if value else []
    if "grouped" in op:  # matrices and stacks, of which each row chooses one; shapes do not say which
        return max((prod(matrix[-2:]) for matrix in matrices), default=0)
    return sum(map(prod, matrices))


def _formula(op: Op) -> Callable[..., int]:
    return lambda *values, **named: count(op.name, op.by_name(*values, **named))


def _register(flop_counter: ModuleType) -> None:
    for name, op in OPS.items():
        flop_counter.register_flop_formula(getattr(torch.ops.lora_ext, name))(_formula(op))


class _OnImport(importlib.abc.MetaPathFinder):
    """Registers the formulas at the end of the first import of flop_counter."""

    def find_spec(self, name, path, target=None):
        if name != _MODULE:
            return None
        sys.meta_path.remove(self)
        spec = importlib.util.find_spec(name)
        execute = spec.loader.exec_module

        def execute_and_register(module: ModuleType) -> None:
            execute(module)
            _register(module)

        spec.loader.exec_module = execute_and_register
        return spec


def register_formulas() -> None:
    """Registers the formula of every op, once the module is there."""
    if _MODULE in sys.modules:
        _register(sys.modules[_MODULE])
    else:
        sys.meta_path.insert(0, _OnImport())
