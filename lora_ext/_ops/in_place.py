"""Changes arguments in place as PyTorch's own in-place ops do: refuses what PyTorch would refuse before anything
changes, and tells autograd of the change.

PyTorch's ops do this in two places. The Autograd key checks whether the graph can record the change, and the
ADInplaceOrView key counts it. The latter also handles calls that never reach Autograd: in inference mode, and with
inference tensors. Kernels of the stable ABI do neither by themselves; ``Op`` in registration.py does it for them.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from lora_ext._ops.checks import refuse_to_keep, tensors_of

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


def check_recorded_change(op: str, y: Tensor | None, kept: Mapping[str, object]) -> None:
    """Raises RuntimeError if autograd cannot record a change to ``y``, or cannot keep a tensor for the backward.

    Does for our ops what PyTorch's check_inplace (torch/csrc/autograd/VariableTypeUtils.h) does for PyTorch's. Cases
    that it misses are refused by ``mark_dirty`` afterwards. Autograd refuses to keep an inference tensor after the
    change.
    """
    check_inference(op, "y", y)
    reason = ""
    if y is None:  # the op refuses it
        return
    if y._is_view():
        creation = torch._C._autograd._get_creation_meta(y).value
        if creation != _DEFAULT:
            reason = _VIEWS.get(creation, "a view that must not change")
        elif y.requires_grad and y._base.is_leaf:
            reason = "a view of a leaf Variable that requires grad"
    elif y.requires_grad and y.is_leaf:
        reason = "a leaf Variable that requires grad"
    if reason:
        raise RuntimeError(f"{op}: y is {reason}: autograd cannot record an in-place change; pass y.clone()")
    for label, tensor in tensors_of(kept):
        if tensor.is_inference():
            refuse_to_keep(op, [label])
