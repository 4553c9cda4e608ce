"""Registers the number of operations of every op for torch.utils.flop_counter.FlopCounterMode.

The formulas stand next to the fake kernels. They are registered when that module is imported, not before: where Triton
is installed it imports Triton, and on a CUDA build without Triton it logs a warning.
"""

from __future__ import annotations

import importlib.abc
import importlib.util
import sys
from collections.abc import Sequence
from math import prod
from types import ModuleType

import torch

from lora_ext._ops.registration import flop_formulas

_MODULE = "torch.utils.flop_counter"
Shape = tuple[int, ...]


def of_forward(x: Shape, weights: Sequence[Shape | None], As: Sequence[Shape], Bs: Sequence[Shape]) -> int:
    """Counts the operations of a forward. A weight of None: the base layer is not part of the op."""
    base = sum(prod(weight) for weight in weights if weight is not None)
    return 2 * prod(x[:-1]) * (base + sum(map(prod, As)) + sum(map(prod, Bs)))


def of_backward(
    grad_y: Shape, weights: Sequence[Shape | None], As: Sequence[Shape], Bs: Sequence[Shape], wanted: Sequence[bool]
) -> int:
    want_x, want_A, want_B = wanted
    base = sum(prod(weight) for weight in weights if weight is not None)
    A, B = sum(map(prod, As)), sum(map(prod, Bs))
    return 2 * prod(grad_y[:-1]) * (want_x * (base + A) + want_A * A + (want_x or want_A) * B + want_B * B)


def largest_matrix(factors: Sequence[Shape]) -> Shape:
    """Returns the largest of a list of matrices and stacks: shapes do not say which rows choose which."""
    return max((factor[-2:] for factor in factors), key=prod)


def _register(flop_counter: ModuleType) -> None:
    for name, formula in flop_formulas.items():
        flop_counter.register_flop_formula(getattr(torch.ops.lora_ext, name))(formula)


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
