"""The merge ops, which lora_ext/merging/weights.py combines: fake kernels and registration."""

from __future__ import annotations

from collections.abc import Callable

import torch

from lora_ext._ops.checks import merge_segments
from lora_ext._ops.registration import LIBRARY, register


def _fake_check(weights, lora_As, lora_Bs, seeds, first_rows):
    return weights[0].new_empty((len(weights),), dtype=torch.int64)


def _fake_merge(**arguments):
    return None


def _fake_record(weights, lora_As, lora_Bs, seeds, first_rows):
    num_corrections = [torch.library.get_ctx().new_dynamic_size() for _ in weights]
    return (
        weights[0].new_empty((len(weights),), dtype=torch.int64),
        [w.new_empty((w.shape[0], merge_segments(w.shape[1])), dtype=torch.int16) for w in weights],
        [w.new_empty((count,), dtype=torch.int16) for w, count in zip(weights, num_corrections, strict=True)],
    )


def refuse_weight_that_requires_grad(op: str, *weights: torch.Tensor) -> None:
    if torch.is_grad_enabled() and any(weight.requires_grad for weight in weights):
        raise RuntimeError(
            f"{op}: weight requires grad; merging in place would corrupt its gradient. "
            "Call weight.requires_grad_(False) or merge under torch.no_grad()"
        )


def _has_changed(results: object) -> bool:
    return results is None or bool(results[1])  # lora_merge_record_ may have merged nothing


def _register_change_of_weights(name: str, fake: Callable) -> None:
    def record(weights, *arguments):
        refuse_weight_that_requires_grad(name, *weights)
        return op.change(weights, *arguments)  # gradients of other arguments: there are none

    op = register(name, fake, record=record, has_changed=_has_changed)
    LIBRARY.impl(name, op.change, "ADInplaceOrView")  # for inference mode


_register_change_of_weights("lora_merge_", _fake_merge)
_register_change_of_weights("lora_unmerge_", _fake_merge)
_register_change_of_weights("lora_merge_record_", _fake_record)
register("lora_merge_check", _fake_check)
