"""Changes arguments in place as PyTorch's own in-place ops do: refuses what PyTorch would refuse before anything
changes, and tells autograd of the change.

PyTorch's ops do this in two places. The Autograd key checks whether the graph can record the change, and the
ADInplaceOrView key counts it. The latter also handles calls that never reach Autograd: in inference mode, and with
inference tensors. Kernels of the stable ABI do neither by themselves.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from lora_ext._ops.registration import LIBRARY, ChangedArguments, op_named

below_in_place = torch._C._AutoDispatchBelowADInplaceOrView
_CreationMeta = torch._C._autograd.CreationMeta

_DEFAULT = _CreationMeta.DEFAULT.value
_VIEWS = {
    _CreationMeta.MULTI_OUTPUT_NODE.value: "one of several views that one function returned (split, unbind)",
    _CreationMeta.NO_GRAD_MODE.value: "a view made under torch.no_grad()",
    _CreationMeta.INFERENCE_MODE.value: "a view made in inference mode",
    _CreationMeta.IN_CUSTOM_FUNCTION.value: "a view that a custom autograd function returned",
}


def check_inference(op: str, label: str, tensor: Tensor | None) -> None:
    """Raises RuntimeError for an inference tensor outside of inference mode, whose changes cannot be counted."""
    if tensor is not None and tensor.is_inference() and not torch.is_inference_mode_enabled():
        raise RuntimeError(
            f"{op}: {label} is an inference tensor, which may change in inference mode only; pass {label}.clone()"
        )


def check_saved(op: str, label: str, tensor: Tensor | None) -> None:
    """Raises RuntimeError for an inference tensor that the backward needs: autograd refuses it after the change."""
    if tensor is not None and tensor.is_inference():
        raise RuntimeError(
            f"{op}: {label} is an inference tensor, which autograd cannot keep for the backward; pass {label}.clone()"
        )


def count_change(*tensors: Tensor) -> None:
    """Counts a change, so that a backward that saved one of these fails. Inference tensors have no count."""
    torch.autograd.graph.increment_version([tensor for tensor in tensors if not tensor.is_inference()])


def check_recorded_change(op: str, label: str, tensor: Tensor | None) -> None:
    """Raises RuntimeError if autograd cannot record a change to ``tensor``.

    Does for our ops what PyTorch's check_inplace (torch/csrc/autograd/VariableTypeUtils.h) does for PyTorch's. Cases
    that it misses are refused by ``mark_dirty`` afterwards.
    """
    check_inference(op, label, tensor)
    reason = ""
    if tensor is None:  # the op refuses it
        return
    if tensor._is_view():
        creation = torch._C._autograd._get_creation_meta(tensor).value
        if creation != _DEFAULT:
            reason = _VIEWS.get(creation, "a view that must not change")
        elif tensor.requires_grad and tensor._base.is_leaf:
            reason = "a view of a leaf Variable that requires grad"
    elif tensor.requires_grad and tensor.is_leaf:
        reason = "a leaf Variable that requires grad"
    if reason:
        raise RuntimeError(
            f"{op}: {label} is {reason}: autograd cannot record an in-place change; pass {label}.clone()"
        )


def register_in_place(name: str, has_changed: Callable[[object], bool] = lambda result: True) -> Callable:
    """Registers the ADInplaceOrView kernel of an op that changes arguments, as its schema says.

    Returns:
        The function that an Autograd kernel calls after its checks, with the op's arguments and results.
    """
    op = op_named(name)
    changed = ChangedArguments(op)

    def change(*arguments):
        tensors = changed.of(arguments)
        for label, tensor in tensors:
            check_inference(name, label, tensor)
        with below_in_place():
            result = op(*arguments)
        if has_changed(result):
            count_change(*(tensor for _, tensor in tensors))
        return result

    LIBRARY.impl(name, change, "ADInplaceOrView")
    return change
