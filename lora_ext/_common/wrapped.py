"""Finds the model inside wrappers: compilation, data parallelism, and other packages' interfaces."""

from __future__ import annotations

from torch import nn
from torch.nn.parallel import DataParallel, DistributedDataParallel

DATA_PARALLEL = (DistributedDataParallel, DataParallel)
KEY_PREFIX = "base_model.model."
"""Prefix of all keys in the state of a PeftModel, and in PEFT's files."""


class WrapsModel:
    """A module that holds a model whose paths do not begin at this module."""

    def get_base_model(self) -> nn.Module:
        raise NotImplementedError


def root_module(model: nn.Module) -> nn.Module:
    """``model``, or the module inside all wrappers: paths must not depend on them."""
    while True:
        if isinstance(model, DATA_PARALLEL):
            model = model.module
        elif (inner := _inside(model)) is not None:
            model = inner
        else:
            return model


def without_thin_wrappers(model: nn.Module) -> nn.Module:
    """``model``, or the module inside wrappers that keep no list of its parameters."""
    while (inner := _inside(model)) is not None:
        model = inner
    return model


def _inside(model: nn.Module) -> nn.Module | None:
    return model.get_base_model() if isinstance(model, WrapsModel) else getattr(model, "_orig_mod", None)
