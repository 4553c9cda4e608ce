"""Fake (meta) and autograd registrations of the merge ops, which lora_ext/merging/weights.py combines."""

from __future__ import annotations

from math import prod

import torch

from lora_ext._ops.checks import merge_segments
from lora_ext._ops.in_place import register_in_place
from lora_ext._ops.registration import LIBRARY, below_autograd, op_named, register_op


def _flops(weights, lora_As, *_, **__) -> int:
    return sum(2 * prod(weight) * A[0] for weight, A in zip(weights, lora_As, strict=True))


@register_op("lora_merge_check", flops=_flops)
def _(weights, lora_As, lora_Bs, seeds, first_rows):
    return weights[0].new_empty((len(weights),), dtype=torch.int64)


@register_op("lora_merge_record_", flops=_flops)
def _(weights, lora_As, lora_Bs, seeds, first_rows):
    num_corrections = [torch.library.get_ctx().new_dynamic_size() for _ in weights]
    return (
        weights[0].new_empty((len(weights),), dtype=torch.int64),
        [w.new_empty((w.shape[0], merge_segments(w.shape[1])), dtype=torch.int16) for w in weights],
        [w.new_empty((count,), dtype=torch.int16) for w, count in zip(weights, num_corrections, strict=True)],
    )


for _name in ("lora_merge_", "lora_unmerge_"):
    register_op(_name, flops=_flops)(lambda **arguments: None)


# --- autograd ---------------------------------------------------------------------------------------------------------


def _lora_merge_check_autograd(*arguments):
    with below_autograd():  # it returns counts
        return op_named("lora_merge_check")(*arguments)


def refuse_weight_that_requires_grad(op: str, *weights: torch.Tensor) -> None:
    if torch.is_grad_enabled() and any(weight.requires_grad for weight in weights):
        raise RuntimeError(
            f"{op}: weight requires grad; merging in place would corrupt its gradient. "
            "Call weight.requires_grad_(False) or merge under torch.no_grad()"
        )


def _register_change_of_weights(name: str) -> None:
    def has_changed(result) -> bool:
        return result is None or bool(result[1])  # lora_merge_record_ may have merged nothing

    change = register_in_place(name, has_changed)

    def autograd_kernel(weights, *arguments):
        refuse_weight_that_requires_grad(name, *weights)
        return change(weights, *arguments)

    LIBRARY.impl(name, autograd_kernel, "Autograd")


LIBRARY.impl("lora_merge_check", _lora_merge_check_autograd, "Autograd")
for _name in ("lora_merge_", "lora_merge_record_", "lora_unmerge_"):
    _register_change_of_weights(_name)
