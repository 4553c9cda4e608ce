"""Exported programs (``torch.export``, AOTInductor) that run without this package: docs/export.md."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

from lora_ext import _load, reference
from lora_ext._ops.checks import accumulation_dtype


def library_paths() -> list[Path]:
    """Returns the libraries that register ``torch.ops.lora_ext``: the CPU kernels, and the CUDA kernels if they run.

    A program exported with our ops needs them and nothing else of lora_ext: ``torch.ops.load_library`` in Python,
    ``dlopen`` in C++.
    """
    return [_load.LIBRARY] + ([] if _load.cuda_unavailable_reason else [_load.CUDA_LIBRARY])


@contextmanager
def plain_pytorch() -> Iterator[None]:
    """Computes our ops by the formulas of lora_ext/reference.py while a model is exported.

    A program that ``torch.export.export`` makes here has PyTorch's ops only, and needs no library of ours. It is as
    slow as plain PyTorch, and in 16 bits it rounds more often than our ops.

    Raises:
        ValueError: a layer would draw a dropout mask; call ``model.eval()`` first.
    """
    with _PlainPyTorch():
        yield


class _PlainPyTorch(TorchFunctionMode):
    def __torch_function__(self, func, types, args=(), kwargs=None):
        return _FORMULAS.get(func, func)(*args, **kwargs or {})


def _check_dropout(dropout_p: float) -> None:
    if reference.dropout_threshold(dropout_p) > 0:
        raise ValueError(
            f"plain_pytorch: dropout_p is {dropout_p}, but an exported program has no dropout; call model.eval() first"
        )


# In the place of the tensors for our backward there is None: autograd differentiates the formulas.


def _lora_linear(x, weight, bias, lora_A, lora_B, scaling, dropout_p=0.0, seed=None):
    _check_dropout(dropout_p)
    return reference.lora_linear(x, weight, bias, lora_A, lora_B, scaling), None, None


def _lora_linear_siblings(x, weights, biases, lora_As, lora_Bs, scalings, dropout_p=0.0, seed=None):
    _check_dropout(dropout_p)
    return reference.lora_linear_siblings(x, weights, biases, lora_As, lora_Bs, scalings), None, None


def _lora_delta_(y, x, lora_A, lora_B, scaling, dropout_p=0.0, seed=None):
    _check_dropout(dropout_p)
    y += reference.lora_delta(x, lora_A, lora_B, scaling)
    return None, None


def _lora_shrink(x: Tensor, lora_A: Tensor) -> Tensor:
    acc = accumulation_dtype(x.dtype)
    return x.to(acc) @ lora_A.to(acc).T


def _lora_expand(base: Tensor, xa: Tensor, lora_B: Tensor, bias: Tensor | None = None) -> Tensor:
    y = base + xa @ lora_B.to(xa.dtype).T
    return (y if bias is None else y + bias).to(base.dtype)


def _formulas() -> dict[Callable, Callable]:
    formulas = {}
    for formula in (_lora_linear, _lora_linear_siblings, _lora_delta_, _lora_shrink, _lora_expand):
        op = getattr(torch.ops.lora_ext, formula.__name__.removeprefix("_"))
        formulas |= {op: formula, op.default: formula}
    return formulas


_FORMULAS = _formulas()
