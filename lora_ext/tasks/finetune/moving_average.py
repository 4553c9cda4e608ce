"""An exponential moving average of trained parameters (Polyak and Juditsky 1992): steadier than their last values."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.optim.swa_utils import get_ema_multi_avg_fn


class MovingAverage:
    """Averages the parameters that require gradients; for adapters this costs almost no memory or time.

    After step ``n`` the decay is ``min(decay, (1 + n) / (10 + n))``, which forgets early values soon.

    Args:
        model: the model whose trained parameters are averaged.
        decay: in (0, 1).
    """

    FILE = "average.safetensors"

    def __init__(self, model: nn.Module, decay: float) -> None:
        self.decay = decay
        self._trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
        self._average: dict[str, Tensor] = {}

    @torch.no_grad()
    def update(self, step: int) -> None:
        """Adds the values after step ``step``, counted from 1."""
        if not self._average:
            self._average = {name: p.detach().clone() for name, p in self._trained.items()}
            return
        average_in = get_ema_multi_avg_fn(min(self.decay, (1 + step) / (10 + step)))
        average_in([self._average[name] for name in self._trained], list(self._trained.values()), step)

    @contextmanager
    def in_place(self) -> Iterator[None]:
        """Gives the model the average inside the block, if there is one yet, and restores its values afterwards."""
        trained = {name: p.detach().clone() for name, p in self._trained.items()}
        self._put(self._average)
        try:
            yield
        finally:
            self._put(trained)

    def keep(self) -> None:
        """Gives the model the average for good."""
        self._put(self._average)
        self._average = {}

    def values(self) -> list[Tensor]:
        """Returns the average of each parameter, in one order; before the first step, its value."""
        if not self._average:
            self.update(1)
        return [self._average[name] for name in self._trained]

    def save(self, directory: Path) -> None:
        if self._average:
            save_file({name: value.cpu().contiguous() for name, value in self._average.items()}, directory / self.FILE)

    def load(self, directory: Path) -> None:
        """Loads the average from ``directory``; raises ValueError if it belongs to other parameters."""
        values = load_file(directory / self.FILE)
        if {name: v.shape for name, v in values.items()} != {name: p.shape for name, p in self._trained.items()}:
            raise ValueError(f"{directory / self.FILE} belongs to other parameters")
        self._average = {name: values[name].to(p.device) for name, p in self._trained.items()}

    @torch.no_grad()
    def _put(self, values: Mapping[str, Tensor]) -> None:
        for name, value in values.items():
            self._trained[name].copy_(value)
