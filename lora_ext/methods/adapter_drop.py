"""AdapterDrop (Rücklé et al. 2021, arXiv 2010.11918), the paper's Adapter^D."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import nn

from lora_ext.methods.adapter_p import AdapterP
from lora_ext.methods.base import check_at_least


@dataclass(frozen=True)
class AdapterDrop(AdapterP):
    """Pfeiffer's adapters without those of the lower layers, which then need no backward.

    Args:
        drop_layers: number of layers without adapters, from the input; None: 5 of 12, as in the paper of AdapterDrop.
    """

    drop_layers: int | None = None
    name: ClassVar[str] = "adapter-drop"

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.drop_layers is not None:
            check_at_least(self.name, 0, drop_layers=self.drop_layers)

    def adapted_layers(self, model: nn.Module) -> list[tuple[str, nn.Module]]:
        layers = super().adapted_layers(model)
        dropped = round(5 / 12 * len(layers)) if self.drop_layers is None else self.drop_layers
        if dropped >= len(layers):
            raise ValueError(
                f"{self.name}: drop_layers is {dropped}, but the model has {len(layers)} layers; want fewer than that"
            )
        return layers[dropped:]
