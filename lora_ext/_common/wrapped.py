"""Finds the model inside wrappers: compilation, checkpointing and data parallelism."""

from __future__ import annotations

from torch import nn
from torch.nn.parallel import DataParallel, DistributedDataParallel

DATA_PARALLEL = (DistributedDataParallel, DataParallel)
KEY_PREFIX = "base_model.model."
"""Prefix of all keys in the state of a PeftModel, and in PEFT's files."""


COMPILED, _CHECKPOINTED = "_orig_mod", "_checkpoint_wrapped_module"
"""The names under which torch.compile and checkpoint_wrapper (FSDP's checkpointing) hold the module that they wrap."""


def without_wrapper(module: nn.Module) -> nn.Module | None:
    """The module that a wrapper around a part of a model holds, or None: ``module`` is no such wrapper."""
    parts = module._modules
    return parts.get(COMPILED, parts.get(_CHECKPOINTED))


def root_module(model: nn.Module) -> nn.Module:
    """``model``, or the module inside all wrappers: paths must not depend on them."""
    while True:
        if isinstance(model, DATA_PARALLEL):
            model = model.module
        elif (inner := getattr(model, COMPILED, None)) is not None:
            model = inner
        else:
            return model
