"""What tests of the commands share: reading results, and the one line of a mistake."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

from safetensors.torch import load_file
from torch import Tensor

from lora_ext.commands import trainer

Command = Callable[..., tuple[int, str, str]]
"""Runs a command. Returns its exit status, and what it printed on standard output and standard error."""


def metrics_of(out: Path) -> dict[str, Any]:
    return json.loads((out / "metrics.json").read_text())


class Run(NamedTuple):
    """A finished run of ``finetune``: its directory, and what it printed."""

    out: Path
    said: str

    @property
    def metrics(self) -> dict[str, Any]:
        return metrics_of(self.out)

    @property
    def losses(self) -> list[float]:
        return [row["loss"] for row in self.metrics["history"] if "loss" in row]

    @property
    def adapter(self) -> dict[str, Tensor]:
        return load_file(self.out / "adapter" / "adapter_model.safetensors")

    @property
    def predictions(self) -> list[dict[str, Any]]:
        return [json.loads(line) for line in (self.out / "predictions.jsonl").read_text().splitlines()]


def stopped_after(step: int) -> type[trainer.Clock]:
    """Makes a Clock whose process is interrupted after a step."""

    class Clock(trainer.Clock):  # Trainer stores the state of callbacks by the names of their classes
        def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            super().on_step_end(args, state, control)
            if state.global_step == step:
                raise KeyboardInterrupt

    return Clock


def mistake(result: tuple[int, str, str]) -> str:
    """Returns the only line of an error, without the command's name."""
    status, _, messages = result
    lines = [line for line in messages.splitlines() if line.startswith("lora-ext")]
    assert status == 2, messages
    assert len(lines) == 1, messages
    return lines[0].partition(" error: ")[2]
