"""Operations of every op, for torch.utils.flop_counter.FlopCounterMode: two for each multiply-add, as PyTorch counts.

They are registered when that module is imported, not before: where Triton is installed it imports Triton, and on a CUDA
build without Triton it logs a warning.
"""

from __future__ import annotations

import importlib.abc
import importlib.util
import sys
from collections.abc import Sequence
from math import prod
from types import ModuleType

import torch

_MODULE = "torch.utils.flop_counter"
_Shape = tuple[int, ...]


def _layer_forward(x: _Shape, weights: Sequence[_Shape | None], As: Sequence[_Shape], Bs: Sequence[_Shape]) -> int:
    """Counts the operations of a forward. A weight of None: the base layer is not part of the op."""
    base = sum(prod(weight) for weight in weights if weight is not None)
    return 2 * prod(x[:-1]) * (base + sum(map(prod, As)) + sum(map(prod, Bs)))


def _layer_backward(
    grad_y: _Shape, weights: Sequence[_Shape | None], As: Sequence[_Shape], Bs: Sequence[_Shape], wanted: Sequence[bool]
) -> int:
    want_x, want_A, want_B = wanted
    base = sum(prod(weight) for weight in weights if weight is not None)
    A, B = sum(map(prod, As)), sum(map(prod, Bs))
    return 2 * prod(grad_y[:-1]) * (want_x * (base + A) + want_A * A + (want_x or want_A) * B + want_B * B)


def _largest(factors: Sequence[_Shape]) -> int:
    """Elements of the largest matrix of a list of matrices and stacks: shapes do not say which rows choose which."""
    return max(prod(factor[-2:]) for factor in factors)


def _grouped_backward(grad_y: _Shape, As: Sequence[_Shape], Bs: Sequence[_Shape], wanted: Sequence[bool]) -> int:
    wanted_A, wanted_B = any(wanted[1 : 1 + len(As)]), any(wanted[1 + len(As) :])
    return _layer_backward(grad_y, [None], [(_largest(As),)], [(_largest(Bs),)], (wanted[0], wanted_A, wanted_B))


def _merge(weights: Sequence[_Shape], lora_As: Sequence[_Shape], *_, **__) -> int:
    return sum(2 * prod(weight) * A[0] for weight, A in zip(weights, lora_As, strict=True))


# Arguments are the op's, with shapes in place of tensors.
_FORMULAS = {
    "lora_linear": lambda x, W, bias, A, B, *_, **__: _layer_forward(x, [W], [A], [B]),
    "lora_linear_backward": lambda grad_y, x, W, A, B, xa, mask, scaling, dropout_p, wanted, **_: _layer_backward(
        grad_y, [W], [A], [B], wanted
    ),
    "lora_linear_siblings": lambda x, Ws, biases, bases, As, Bs, *_, **__: _layer_forward(x, Ws, As, Bs),
    "lora_linear_siblings_backward": lambda grad_ys, x, Ws, As, Bs, xa, mask, scalings, dropout_p, wanted, **_: (
        _layer_backward(grad_ys[0], Ws, As, Bs, wanted)
    ),
    "lora_delta_": lambda y, x, A, B, *_, **__: _layer_forward(x, [None], [A], [B]),
    "lora_grouped_": lambda y, x, As, Bs, *_, **__: 2 * prod(x[:-1]) * (_largest(As) + _largest(Bs)),
    "lora_grouped_backward": lambda grad_y, x, As, Bs, groups, scalings, ranks, xa, mask, p, wanted, **_: (
        _grouped_backward(grad_y, As, Bs, wanted)
    ),
    "lora_grouped_linear": lambda x, W, bias, As, Bs, *_, **__: (
        2 * prod(x[:-1]) * (prod(W) + _largest(As) + _largest(Bs))
    ),
    "lora_shrink": lambda x, A, **_: 2 * prod(x[:-1]) * prod(A),
    "lora_shrink_backward": lambda grad_xa, x, A, base, wanted, **_: 2 * prod(x[:-1]) * prod(A) * sum(wanted),
    "lora_expand": lambda base, xa, B, *_, **__: 2 * prod(base[:-1]) * prod(B),
    "lora_expand_backward": lambda grad_y, xa, B, wanted, **_: 2 * prod(grad_y[:-1]) * prod(B) * sum(wanted),
    "lora_dropout_mask": lambda *_, **__: 0,
    "lora_merge_": _merge,
    "lora_merge_record_": _merge,
    "lora_merge_check": _merge,
    "lora_unmerge_": _merge,
}


def _register(flop_counter: ModuleType) -> None:
    for name, formula in _FORMULAS.items():
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


if _MODULE in sys.modules:
    _register(sys.modules[_MODULE])
else:
    sys.meta_path.insert(0, _OnImport())
