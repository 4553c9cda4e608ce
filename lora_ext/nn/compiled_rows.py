"""Refuses mixed batches in compiled code.

Only compiled code imports this: ``torch.compiler.disable`` imports ``torch._dynamo``, which takes seconds and 70 MB.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, NoReturn

import torch

if TYPE_CHECKING:
    from lora_ext.nn.active import ActiveAdapters


@torch.compiler.disable
def refuse_if_chosen(active: ActiveAdapters) -> None:
    if active.running.choice is not None:
        refuse_compiled()


@torch.compiler.disable
def refuse_compiled() -> NoReturn:
    raise ValueError(
        "adapter_names: a compiled model would be compiled again for every choice of adapters, and an exported or "
        "traced one has a single choice; call the model that is not compiled (compiled._orig_mod), or generate(..., "
        "disable_compile=True). To export the model, activate an adapter (set_adapter) and pass no names"
    )
