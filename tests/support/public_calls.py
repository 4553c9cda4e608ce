"""An entry of the table of public functions, its call, and the state that a refused call must not change."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from support.models import snapshot
from torch import Tensor, nn

from lora_ext.adapters import adapter_status, merge_record_bytes

NAN = float("nan")


@dataclass
class Call:
    """A public function, and what makes all named arguments of a valid call, with files in a directory."""

    function: Callable[..., Any]
    arguments: Callable[[Path], dict[str, Any]]


def state(value: Any) -> Any:
    """Records the state that a refusal must not change."""
    if isinstance(value, nn.Module):
        modules = snapshot(value)
        return modules | {
            "values": {path: state(tensor) for path, tensor in modules["values"].items()},
            "adapters": adapter_status(value),
            "record": merge_record_bytes(value),
        }
    if isinstance(value, Tensor):
        bits = None if value.is_meta else value.detach().contiguous().view(-1).view(torch.uint8).numpy().tobytes()
        return bits, tuple(value.shape), value._version, value.requires_grad
    if isinstance(value, Path):
        return snapshot(value) if value.is_dir() else value.read_bytes() if value.is_file() else None
    if isinstance(value, (list, tuple)):
        return [state(entry) for entry in value]
    return repr(value)


def call(function: Any, arguments: dict[str, Any]) -> None:
    result = function(**arguments)
    if hasattr(result, "__next__"):
        list(result)
    elif hasattr(result, "__enter__"):
        with result:
            pass
