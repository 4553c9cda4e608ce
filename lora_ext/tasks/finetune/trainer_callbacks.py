"""Callbacks of the trainer: seeds, logs, evaluations, checkpoints, progress, Ctrl-C and SIGTERM."""

from __future__ import annotations

import collections
import math
import signal
import statistics
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from tqdm import tqdm
from transformers import EarlyStoppingCallback, TrainerCallback

from lora_ext._common import progress as display
from lora_ext.tasks.finetune import busy_machine
from lora_ext.tasks.finetune.moving_average import MovingAverage
from lora_ext.tasks.finetune.run_checkpoints import Clock, path_of
from lora_ext.tasks.shared import sigterm

if TYPE_CHECKING:
    from lora_ext.tasks.finetune.trainer import FinetuneTrainer


class Steps(TrainerCallback):
    """Seeds every step, and decides when to log, evaluate and save.

    - Random numbers depend only on the seed and the number of the step. Random numbers drawn by an evaluation or a
      resumption change nothing.
    - After a step, in this order: the loss is logged (100 times per run), the model is evaluated (at the end of an
      epoch), a checkpoint is written (when one is due, after the last step and after Ctrl-C). The checkpoint therefore
      contains the results of its step.
    """

    def __init__(self, trainer: FinetuneTrainer) -> None:
        self.trainer = trainer
        self._durations: collections.deque[float] = collections.deque(maxlen=5)
        self._has_advised = False

    def on_train_begin(self, args, state, control, **kwargs):
        self.trainer.progress.go_on(state)
        self.trainer.clock = Clock()
        if state.best_global_step:  # the Trainer loads the best weights only if it knows a path, which may have moved
            state.best_model_checkpoint = str(path_of(Path(args.output_dir), state.best_global_step))

    def on_step_begin(self, args, state, control, **kwargs):
        seeds = [args.seed, state.global_step, *([args.process_index] if args.process_index else [])]
        torch.manual_seed(int(np.random.SeedSequence(seeds).generate_state(1, np.uint64)[0]))
        self._start = time.perf_counter()

    def on_step_end(self, args, state, control, train_dataloader=None, lr_scheduler=None, **kwargs):
        trainer, step = self.trainer, state.global_step
        seconds = time.perf_counter() - self._start
        stop, due = trainer.progress.share(trainer.stop is not None and trainer.stop.requested, trainer.clock.is_due())
        if stop and trainer.stop is not None:
            trainer.stop.requested = True  # of another process
        trainer.progress.end_step(seconds, state.num_input_tokens_seen)
        is_last = step >= state.max_steps
        if is_last or step % math.ceil(state.max_steps / 100) == 0:  # 100 points for a run of any length
            trainer.log({"loss": trainer.progress.mean_loss(), "learning_rate": lr_scheduler.get_last_lr()[0]})
        steps_of_epoch = -(-len(train_dataloader) // args.gradient_accumulation_steps)
        control.should_evaluate = trainer.eval_dataset is not None and (is_last or step % steps_of_epoch == 0)
        control.should_save = is_last or due
        self._durations.append(seconds)
        if not self._has_advised and len(self._durations) == self._durations.maxlen:
            line = busy_machine.advice(torch.get_num_threads(), statistics.median(self._durations))
            if line is not None:
                self._has_advised = True
                tqdm.write(line)


class EarlyStopping(EarlyStoppingCallback):
    """Transformers' callback, which takes its count from a checkpoint, and asks for no strategy of evaluations."""

    @property
    def has_stopped(self) -> bool:
        return self.early_stopping_patience_counter >= self.early_stopping_patience

    def on_train_begin(self, args, state, control, **kwargs):
        saved = state.stateful_callbacks.get(type(self).__name__) or {}
        self.early_stopping_patience_counter = saved.get("attributes", {}).get("early_stopping_patience_counter", 0)


class Averaging(TrainerCallback):
    """Updates the moving average of the weights after every step."""

    def __init__(self, average: MovingAverage) -> None:
        self.average = average

    def on_step_end(self, args, state, control, **kwargs):
        self.average.update(state.global_step)


class ShownProgress(TrainerCallback):
    """Shows the progress of training, with the current loss, and of evaluations.

    It replaces the Trainer's callback, which also draws bars into a log file: one line for every step.
    """

    def __init__(self) -> None:
        self._training: display.Progress | None = None
        self._evaluation: display.Progress | None = None

    def on_train_begin(self, args, state, control, **kwargs):
        steps = {"unit": "steps", "done": state.global_step, "dynamic_ncols": True}
        self._training = display.progress("finetune", state.max_steps, **steps)

    def on_step_end(self, args, state, control, **kwargs):
        self._training.set(state.global_step)

    def on_log(self, args, state, control, logs=None, **kwargs):
        if self._training is not None and "loss" in (logs or {}):
            self._training.note(f"epoch {state.epoch:.2f}, loss {float(logs['loss']):.3f}")

    def on_train_end(self, args, state, control, **kwargs):
        self._training.close()
        self._training = None

    def on_prediction_step(self, args, state, control, eval_dataloader=None, **kwargs):
        if self._evaluation is None:  # first=10: a short evaluation after an epoch prints no line
            options = {"unit": "batches", "first": 10.0, "leave": self._training is None, "dynamic_ncols": True}
            self._evaluation = display.progress("evaluate", len(eval_dataloader), **options)
        self._evaluation.advance(1)

    def on_evaluate(self, args, state, control, **kwargs):
        if self._evaluation is not None:
            self._evaluation.close()
            self._evaluation = None

    on_predict = on_evaluate


class StopOnInterrupt(TrainerCallback):
    """Stops the run on Ctrl-C and SIGTERM: after the current step, with a checkpoint; a second Ctrl-C stops it at once.

    SIGTERM never stops it at once: a scheduler may send it to a process whose parent passes Ctrl-C on.
    """

    requested = False

    @contextmanager
    def listening(self) -> Iterator[None]:
        """Listens within the block; outside the main thread, which gets all signals, to nothing."""
        if threading.current_thread() is not threading.main_thread():
            yield
            return

        def on_ctrl_c(signum: int, frame: Any) -> None:
            nonlocal times
            times += 1
            if times > 1:
                raise KeyboardInterrupt
            self._request("\nstopping after this step; press Ctrl-C again to stop at once")

        times = 0
        previous = signal.signal(signal.SIGINT, on_ctrl_c)
        try:
            with sigterm.listening(lambda: self._request("\nSIGTERM: stopping after this step")):
                yield
        finally:
            signal.signal(signal.SIGINT, previous)

    def _request(self, line: str) -> None:
        self.requested = True
        # OSError: nobody reads any more. RuntimeError: the signal came while Python wrote to that stream.
        with suppress(OSError, RuntimeError):
            print(line, flush=True)

    def on_step_end(self, args, state, control, **kwargs):
        if self.requested:
            control.should_save = control.should_training_stop = True


class ReportedProgress(TrainerCallback):
    """Calls a function with the finished fraction after every step."""

    def __init__(self, on_progress: Callable[[float], None]) -> None:
        self.on_progress = on_progress

    def on_step_end(self, args, state, control, **kwargs):
        self.on_progress(state.global_step / max(state.max_steps, 1))
