"""Exported programs (``torch.export``, AOTInductor) that run without this package: docs/adapters.md."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from torch.overrides import TorchFunctionMode

from lora_ext import _load, reference
from lora_ext._ops.registration import OPS

__all__ = ["library_paths", "plain_pytorch"]


def library_paths() -> list[Path]:
    """Returns the libraries that register ``torch.ops.lora_ext``: the CPU kernels, and the CUDA kernels if they run.

    A program exported with our ops needs them and nothing else of lora_ext: ``torch.ops.load_library`` in Python,
    ``dlopen`` in C++.
    """
    return [_load.LIBRARY] + ([] if _load.cuda_unavailable_reason else [_load.CUDA_LIBRARY])


@contextmanager
def plain_pytorch() -> Iterator[None]:
    """Computes our ops by the formulas of lora_ext/_ops/plain.py while a model is exported.

    A program that ``torch.export.export`` makes here has PyTorch's ops only, and needs no library of ours. It is as
    slow as plain PyTorch, and in 16 bits it rounds more often than our ops.

    Raises:
        ValueError: a layer would draw a dropout mask; call ``model.eval()`` first.
    """
    with _PlainPyTorch():
        yield


class _PlainPyTorch(TorchFunctionMode):
    def __torch_function__(self, func, types, args=(), kwargs=None):
        name = _NAME_OF.get(func)
        if name is None:
            for kind in types:
                if not issubclass(kind, torch.Tensor):  # a parameter's stand-in: it may call our ops for this function
                    with self:
                        return kind.__torch_function__(func, types, args, kwargs)
            return func(*args, **kwargs or {})
        arguments = OPS[name].by_name(*args, **kwargs or {})
        dropout_p = arguments.get("dropout_p", 0.0)
        if reference.dropout_threshold(dropout_p) > 0:
            raise ValueError(
                f"plain_pytorch: dropout_p is {dropout_p}, but an exported program has no dropout; call model.eval() "
                "first"
            )
        return OPS[name].plain(**arguments)


# The forwards: autograd differentiates what they compute.
_NAME_OF = {
    function: name
    for name, op in OPS.items()
    if op.plain is not None and not name.endswith("_backward")
    for function in (op.overload, op.overload.overloadpacket)
}
