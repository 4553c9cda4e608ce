"""A stand-in for DeepSpeed's ZeRO-3: empty parameters, and the context that brings their values."""

from __future__ import annotations

import enum
import sys
import types
from collections.abc import Iterable, Iterator
from contextlib import contextmanager

import pytest
import torch
from torch import Tensor, nn


class Status(enum.Enum):
    AVAILABLE = 1
    NOT_AVAILABLE = 2


def partition(model: nn.Module, monkeypatch: pytest.MonkeyPatch, *, engine: bool = False) -> None:
    """Empties the parameters of ``model`` as ``zero.Init`` does while it is loaded; with ``engine``, as an engine does.

    DeepSpeed 0.19 puts the same attributes on parameters, and an engine ``ds_id`` and ``_external_params`` on modules.
    """
    for number, parameter in enumerate(model.parameters()):
        parameter.ds_id, parameter.ds_shape, parameter.ds_status = number, parameter.shape, Status.NOT_AVAILABLE
        parameter.ds_process_group, parameter.whole_values = None, parameter.data
        parameter.data = torch.empty(0)
    for number, module in enumerate(model.modules() if engine else ()):
        module.ds_id, module._external_params = number, {}

    def register(module: nn.Module, parameter: Tensor) -> None:
        module._external_params[id(parameter)] = parameter

    zero = types.SimpleNamespace(GatheredParameters=_gathered_parameters, register_external_parameter=register)
    monkeypatch.setitem(sys.modules, "deepspeed", types.SimpleNamespace(zero=zero))


@contextmanager
def _gathered_parameters(parameters: Iterable[Tensor]) -> Iterator[None]:
    parameters = list(dict.fromkeys(parameters))
    assert all(parameter.ds_status is Status.NOT_AVAILABLE for parameter in parameters)  # DeepSpeed refuses nesting
    for parameter in parameters:
        parameter.data, parameter.ds_status = parameter.whole_values, Status.AVAILABLE
    try:
        yield
    finally:
        for parameter in parameters:
            parameter.data, parameter.ds_status = torch.empty(0), Status.NOT_AVAILABLE
