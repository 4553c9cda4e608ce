"""Defines ``lora_ext_plain::<op>``, in plain PyTorch, of each op whose CUDA kernels take 16-bit ``x`` only.

The compiled op calls it for float32 and float64 (csrc/bindings/plain_op.h), with all of its arguments, which it has
checked, below autograd.
Each result is a list of tensors: of none for None, of one for a tensor.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from lora_ext._ops import grouped, linear, shrink_expand  # noqa: F401 (they register the formulas)
from lora_ext._ops.registration import composites, op_named

_PLAIN = torch.library.Library("lora_ext_plain", "DEF")

OPS = (
    "lora_linear",
    "lora_linear_backward",
    "lora_linear_siblings",
    "lora_linear_siblings_backward",
    "lora_delta_",
    "lora_shrink",
    "lora_shrink_backward",
    "lora_expand",
    "lora_expand_backward",
)
GROUPED_OPS = "lora_grouped_", "lora_grouped_backward"


def _as_list(result: Tensor | list[Tensor] | None) -> list[Tensor]:
    if isinstance(result, Tensor):
        return [result]
    return [] if result is None else list(result)


def _define(name: str, function: Callable) -> None:
    schema = op_named(name)._schema
    arguments, num_results = str(schema).partition("(")[2].partition(") -> ")[0], len(schema.returns)

    def kernel(*values):
        results = function(*values)
        return _as_list(results) if num_results == 1 else tuple(map(_as_list, results))

    _PLAIN.define(f"{name}({arguments}) -> ({', '.join(['Tensor[]'] * num_results)})")
    _PLAIN.impl(name, kernel, "CompositeExplicitAutograd")


for _name in (*OPS, *GROUPED_OPS):
    _define(_name, composites[_name])
