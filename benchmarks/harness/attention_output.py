"""An attention of which only the output projection is computed, for libraries whose functions take an attention."""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor, nn


class AttentionOutput(nn.Module):
    """Calls ``apply_lora_o(self, X)``, which reads the PEFT layer ``self.o_proj``; X is [batch, length, features]."""

    def __init__(self, o_proj: nn.Module, apply_lora_o: Callable[[nn.Module, Tensor], Tensor]) -> None:
        super().__init__()
        self.o_proj, self.apply_lora_o = o_proj, apply_lora_o

    def forward(self, x: Tensor) -> Tensor:
        return self.apply_lora_o(self, x.unsqueeze(0)).squeeze(0)
