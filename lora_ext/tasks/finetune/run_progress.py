"""The progress of a run that a checkpoint keeps next to the weights: time, tokens and losses."""

from __future__ import annotations

import torch
from transformers import TrainerState

from lora_ext.tasks.finetune.run_checkpoints import PROGRESS
from lora_ext.tasks.shared import team


class RunProgress:
    """Progress of a run that its weights do not show: time, tokens, and losses that are not logged yet.

    Attributes:
        seconds: time spent in training steps, including those before a resumption.
        tokens: number of tokens in these steps, without padding.
        stopped: whether the run ended before its last step, because the evaluations did not improve.
    """

    KEY = PROGRESS

    def __init__(self) -> None:
        self.seconds, self.tokens, self.stopped = 0.0, 0, False
        self._loss: torch.Tensor | float = 0.0
        self._loss_here: torch.Tensor | float = 0.0  # of the present step, in this process
        self._steps = 0

    def take(self, loss: torch.Tensor) -> None:
        """Adds the loss of a batch, already divided by the number of batches in its step."""
        self._loss_here = self._loss_here + loss.double()

    def share(self, stop: bool, due: bool) -> tuple[bool, bool]:
        """Averages the loss of a step over the processes.

        Returns:
            Whether some process wants to ``stop``, and whether a checkpoint is ``due`` by the first one's clock.
        """
        loss, self._loss_here = self._loss_here, 0.0
        if team.processes() > 1:
            loss, stop, due = team.sums([float(loss), stop, due and team.is_first()])
            loss /= team.processes()
        self._loss = self._loss + loss
        return bool(stop), bool(due)

    def end_step(self, seconds: float, tokens: int) -> None:
        """Counts a step, and its time; ``tokens`` are those of all steps."""
        self._steps += 1
        self.seconds += seconds
        self.tokens = tokens

    def mean_loss(self) -> float:
        """Returns the mean loss of the steps since the last call."""
        mean = float(self._loss) / self._steps
        self._loss, self._steps = 0.0, 0
        return mean

    def state(self) -> dict[str, float]:
        return {"seconds": self.seconds, "loss": float(self._loss), "steps": self._steps, "stopped": self.stopped}

    def go_on(self, state: TrainerState) -> None:
        """Continues from what :meth:`state` put into a checkpoint."""
        saved = state.stateful_callbacks.get(self.KEY, {})
        self.seconds, self._loss = saved.get("seconds", 0.0), saved.get("loss", 0.0)
        self._steps, self.stopped = saved.get("steps", 0), saved.get("stopped", False)
        self.tokens = state.num_input_tokens_seen
