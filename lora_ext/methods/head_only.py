"""Training of the head alone: a baseline on the features of the frozen model."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import nn

from lora_ext.methods.base import Method, head_paths
from lora_ext.model.bare_model import BareModel


@dataclass(frozen=True)
class HeadOnly(Method):
    """Trains only the new head, which every method trains."""

    name: ClassVar[str] = "head-only"

    def trained_parameters(self, bare: BareModel) -> dict[str, nn.Parameter]:
        if not head_paths(bare):
            raise TypeError(f"head-only: {type(bare.root).__name__} has no new head to train; use a model with one")
        return {}

    def count(self, model: nn.Module) -> int:
        return 0
