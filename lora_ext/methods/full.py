"""Fine-tuning of all parameters."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor, nn

from lora_ext.methods.base import Method, head_paths
from lora_ext.methods.inserted import Inserted
from lora_ext.model.bare_model import BareModel, root_module


@dataclass(frozen=True)
class Full(Method):
    """Trains all floating-point parameters; quantised weights are integers and stay frozen."""

    name: ClassVar[str] = "full"

    def trained_parameters(self, bare: BareModel) -> dict[str, nn.Parameter]:
        return parameters_outside(bare, head_paths(bare))

    def buffers(self, bare: BareModel) -> dict[str, Tensor]:
        """Returns all persistent buffers, such as batch-norm statistics."""
        return {
            f"{path}.{name}".lstrip("."): buffer
            for path, module in [("", bare.root), *bare.modules.items()]
            for name, buffer in module._buffers.items()
            if buffer is not None and name not in module._non_persistent_buffers_set
        }

    def count(self, model: nn.Module) -> int:
        return sum(parameter.numel() for parameter in self.trained_parameters(BareModel(root_module(model))).values())


def parameters_outside(bare: BareModel, paths: list[str]) -> dict[str, nn.Parameter]:
    """Returns the bare model's floating-point parameters outside ``paths``, shared ones once."""
    found, seen = {}, set()
    inserted = [path for path, module in bare.modules.items() if isinstance(module, Inserted)]
    below = tuple(f"{path}." for path in [*paths, *inserted])
    for path, module in [("", bare.root), *bare.modules.items()]:
        for name, parameter in module._parameters.items():
            full = f"{path}.{name}" if path else name
            if parameter is None or not parameter.is_floating_point():
                continue
            if id(parameter) not in seen and not full.startswith(below):
                seen.add(id(parameter))
                found[full] = parameter
    return found
