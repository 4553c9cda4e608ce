"""The methods that insert nothing: full fine-tuning, BitFit and the head alone."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor, nn

from lora_ext.methods.base import Inserted, Method, head_paths
from lora_ext.model.bare_model import BareModel, root_module


@dataclass(frozen=True)
class InPlace(Method):
    """Base of the methods whose parameters are all the bare model's."""

    def count(self, model: nn.Module) -> int:
        """Counts the elements of what is trained, without the head."""
        return sum(parameter.numel() for parameter in self.trained_parameters(BareModel(root_module(model))).values())


@dataclass(frozen=True)
class Full(InPlace):
    """Trains all floating-point parameters; quantised weights are integers and stay frozen."""

    name: ClassVar[str] = "full"

    def trained_parameters(self, bare: BareModel) -> dict[str, nn.Parameter]:
        return _outside_head(bare)

    def buffers(self, bare: BareModel) -> dict[str, Tensor]:
        """Returns all persistent buffers, such as batch-norm statistics."""
        return {
            f"{path}.{name}".lstrip("."): buffer
            for path, module in [("", bare.root), *bare.modules.items()]
            for name, buffer in module.named_buffers(recurse=False)
            if name not in module._non_persistent_buffers_set
        }


@dataclass(frozen=True)
class BitFit(InPlace):
    """Trains the biases only (Ben Zaken et al. 2021, arXiv 2106.10199)."""

    name: ClassVar[str] = "bitfit"

    def trained_parameters(self, bare: BareModel) -> dict[str, nn.Parameter]:
        biases = {path: one for path, one in _outside_head(bare).items() if path.rpartition(".")[2].endswith("bias")}
        if not biases:
            others = "BERT, RoBERTa and GPT-2 have, and Llama with attention_bias=True or mlp_bias=True"
            raise TypeError(f"bitfit: {type(bare.root).__name__} has no biases to train; {others}")
        return biases


@dataclass(frozen=True)
class HeadOnly(InPlace):
    """Trains only the new head, which every method trains: a baseline on the features of the frozen model."""

    name: ClassVar[str] = "head-only"

    def trained_parameters(self, bare: BareModel) -> dict[str, nn.Parameter]:
        if not head_paths(bare):
            raise TypeError(f"head-only: {type(bare.root).__name__} has no new head to train; use a model with one")
        return {}


def _outside_head(bare: BareModel) -> dict[str, nn.Parameter]:
    """Returns the bare model's floating-point parameters, without the head's; shared ones once."""
    found, seen = {}, set()
    inserted = [path for path, module in bare.modules.items() if isinstance(module, Inserted)]
    below = tuple(f"{path}." for path in [*head_paths(bare), *inserted])
    for path, module in [("", bare.root), *bare.modules.items()]:
        for name, parameter in module.named_parameters(recurse=False):
            full = f"{path}.{name}".lstrip(".")
            if parameter.is_floating_point() and not full.startswith(below) and parameter not in seen:
                seen.add(parameter)
                found[full] = parameter
    return found
