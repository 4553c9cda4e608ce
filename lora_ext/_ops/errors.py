"""Explains why a public function failed: turns an error of PyTorch or of a compiled op into one that names the
argument. Nothing is checked in Python before a call has failed.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping

import torch

from lora_ext import _load
from lora_ext._common.arguments import check_types
from lora_ext._ops.checks import check_scaling, check_tensors, explain_inference, refusal_of_op

# The exceptions that wrong arguments cause. Others are not explained: torch.utils.checkpoint, for example, stops a
# recomputation by an exception of its own.
UNEXPLAINED = (RuntimeError, TypeError, ValueError, AttributeError, ArithmeticError, LookupError)
OUT_OF_MEMORY = "out of memory. "  # csrc/bindings/errors.h


def check_memory(error: Exception) -> None:
    """Raises torch.OutOfMemoryError, whose message says how much was wanted, if an op failed for lack of memory."""
    if OUT_OF_MEMORY in str(error):
        raise torch.OutOfMemoryError(str(error)) from None


def _is_tensor(value: object) -> bool:
    return isinstance(value, torch.Tensor)


def explain(
    error: Exception,
    function: Callable,
    arguments: Mapping[str, object],
    check_values: Callable[..., None] | None = None,
) -> None:
    """Raises a better error than ``error``, if there is one, for a call of a public function.

    Args:
        arguments: by name, among other things: ``locals()`` of the function.
        check_values: of a function that is more than one op, called with the arguments once their types are right.

    Raises:
        TypeError, ValueError: naming the argument.
        torch.OutOfMemoryError: with the bytes that were wanted.
        RuntimeError: there are no kernels for the device, or autograd cannot keep an inference tensor.
    """
    name = function.__name__
    parameters = inspect.signature(function).parameters
    arguments = {parameter: arguments[parameter] for parameter in parameters}
    if (isinstance(error, (TypeError, ValueError)) and str(error).startswith(f"{name}: ")) or "vmap: " in str(error):
        return  # it is explained already, by us or by torch.func.vmap (a random draw, a change in place)
    # PyTorch accepts a tensor without dimensions in place of a number, but not in place of a list.
    lists = {n for n, parameter in parameters.items() if "Sequence" in str(parameter.annotation)}
    check_types(function, {n: v for n, v in arguments.items() if n in lists or not (_is_tensor(v) and v.dim() == 0)})
    check_tensors(name, arguments)
    check_memory(error)
    explain_inference(name, arguments, error)
    for label, value in arguments.items():  # PyTorch cannot convert Python's larger integers
        if isinstance(value, int) and not isinstance(value, bool):
            check_scaling(name, value, label)
    if check_values is not None:
        check_values(**arguments)
    if refused := refusal_of_op(error, name):
        raise refused from None
    _load.check_kernels_exist(name, next(filter(_is_tensor, arguments.values())).device)
