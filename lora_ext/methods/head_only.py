"""Training the head alone: what the features of the frozen model give without any adaptation."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import nn

from .base import Method


@dataclass(frozen=True)
class HeadOnly(Method):
    """Nothing but the new head is trained, which every method trains."""

    name: ClassVar[str] = "head-only"

    def count(self, model: nn.Module) -> int:
        return 0
