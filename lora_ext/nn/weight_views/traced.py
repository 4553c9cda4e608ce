"""Calls with the stand-in for a parameter under TorchDynamo.

Only compiled code imports this: ``torch.compiler`` imports ``torch._dynamo``, which takes seconds and 70 MB.
"""

from __future__ import annotations

import operator
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor


@torch.compiler.assume_constant_result
def can_trace_views() -> bool:
    """Returns whether TorchDynamo, like uncompiled calls, hands all products with a stand-in to its __torch_function__.

    Two entries are missing in the tables of PyTorch 2.13, and are added here. They change nothing for tensors:

    - ``torch._grouped_mm`` is not among the functions that can be overridden;
    - ``view @ x`` has no reflected function, so ``x @ view`` would be called.

    Older releases do not trace what :mod:`lora_ext.nn.weight_views.calls` does with a module's ``__dict__``.
    """
    if torch.__version__ < (2, 13):
        return False
    try:
        from torch._dynamo.variables import builtin
        from torch._dynamo.variables.torch import get_overridable_functions  # computed once

        get_overridable_functions().add(torch._grouped_mm)
        for function in (operator.matmul, operator.imatmul):
            builtin.BUILTIN_TO_TENSOR_RFN_MAP.setdefault(function, Tensor.__rmatmul__)
    except (ImportError, AttributeError):  # private names
        return False
    return torch._grouped_mm in get_overridable_functions()


@torch.compiler.disable(reason="the loop over experts needs the router's choices; use grouped_mm or batched_mm")
def uncompiled(function: Callable[..., Any], *args: Any) -> Any:
    return function(*args)
