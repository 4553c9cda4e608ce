"""Extends ``transformers.Trainer`` for LoRA runs: small checkpoints, exact resumption, a clean stop on Ctrl-C."""

from __future__ import annotations

import collections
import math
import signal
import statistics
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any

import numpy as np
import torch
from tqdm import tqdm
from transformers import EarlyStoppingCallback, ProgressCallback, Trainer, TrainerCallback, TrainerState
from transformers.trainer_pt_utils import LengthGroupedSampler

from lora_ext._common import progress as display
from lora_ext.methods import load_method, method_of, save_method
from lora_ext.tasks import TaskError
from lora_ext.tasks.finetune import busy_machine
from lora_ext.tasks.finetune.moving_average import MovingAverage
from lora_ext.tasks.finetune.run_checkpoints import PROGRESS, Checkpoint, Clock, damaged, new_checkpoint, path_of
from lora_ext.tasks.finetune.scores import summary_scores
from lora_ext.tasks.finetune.settings import Settings
from lora_ext.tasks.finetune.training_arguments import training_arguments
from lora_ext.tasks.shared import team
from lora_ext.tasks.shared.whole_files import writing


class Interrupted(KeyboardInterrupt):
    """Raised on Ctrl-C during training, after a checkpoint of the last step was written."""


class FinetuneTrainer(Trainer):
    """A Trainer that writes only trained parameters and draws the same batches in a resumed run.

    Evaluation and prediction keep the order of the dataset and use only the logits among the model's outputs.

    Attributes:
        lora_plus_ratio: learning rate of ``lora_B`` divided by that of all other parameters (LoRA+, Hayou et al. 2024,
            arXiv 2402.12354).
        average: moving average of the weights, or None; it is evaluated during training and kept at the end.
        class_weights: ``[num_labels]``, factors of the losses of each class's texts, or None.
        early_stopping: decides when evaluations do not improve any more, or None.
        progress: time, tokens and losses so far.
        stop: listens to Ctrl-C during training, or None.
        clock: decides when a checkpoint is due.
    """

    lora_plus_ratio = 1.0
    average: MovingAverage | None = None
    class_weights: torch.Tensor | None = None
    early_stopping: _EarlyStopping | None = None
    stop: _StopOnInterrupt | None = None

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.progress, self.clock = Progress(), Clock()

    def create_optimizer(self, model: Any = None) -> torch.optim.Optimizer:
        if self.optimizer is not None:
            return self.optimizer
        optimizer = super().create_optimizer(model)
        factors = {id(parameter) for name, parameter in self.model.named_parameters() if name.endswith(".lora_B")}
        for group in list(optimizer.param_groups) if self.lora_plus_ratio != 1.0 else ():
            faster = [parameter for parameter in group["params"] if id(parameter) in factors]
            if faster:
                group["params"] = [parameter for parameter in group["params"] if id(parameter) not in factors]
                rate = self.lora_plus_ratio * group["lr"]
                optimizer.add_param_group({**group, "params": faster, "lr": rate})
        return optimizer

    def _get_train_sampler(self, train_dataset: Any = None) -> torch.utils.data.Sampler:
        """Groups texts by the step, so that accumulated batches have the texts of one batch of the step's size.

        So have the batches of several processes: each takes a part of the step.
        """
        dataset = self.train_dataset if train_dataset is None else train_dataset
        size = self.args.train_batch_size * self.args.gradient_accumulation_steps * team.processes()
        return _EpochSampler(size, [len(row["input_ids"]) for row in dataset], self.args.seed)

    def evaluate(self, *args: Any, **kwargs: Any) -> dict[str, float]:
        with self.average.in_place() if self.average is not None else nullcontext():
            return super().evaluate(*args, **kwargs)

    def prediction_step(self, *args: Any, **kwargs: Any) -> tuple[Any, Any, Any]:
        loss, outputs, labels = super().prediction_step(*args, **kwargs)
        return loss, outputs[0] if isinstance(outputs, tuple) else outputs, labels

    def compute_loss(
        self, model: Any, inputs: dict[str, Any], return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        """Returns the loss; with class weights, the mean over the texts of each one's loss times its class's weight.

        It is not divided by the batch's sum of weights, so that accumulated batches give the same step as one batch.
        """
        if self.class_weights is None:
            return super().compute_loss(model, inputs, return_outputs, num_items_in_batch)
        outputs = model(**inputs)
        labels, logits = inputs["labels"], outputs["logits"].float()
        smoothing = self.args.label_smoothing_factor
        losses = torch.nn.functional.cross_entropy(logits, labels, reduction="none", label_smoothing=smoothing)
        loss = (losses * self.class_weights.to(losses)[labels]).mean()
        return (loss, outputs) if return_outputs else loss

    def training_step(self, *args: Any, **kwargs: Any) -> torch.Tensor:
        loss = super().training_step(*args, **kwargs)
        self.progress.take(loss)
        return loss

    def _determine_best_metric(self, metrics: dict[str, float], trial: Any) -> bool:
        """Returns whether to write a checkpoint: of a better evaluation, when one is due, or because training ends."""
        is_best = super()._determine_best_metric(metrics, trial)
        self.progress.stopped = self.early_stopping is not None and self.early_stopping.has_stopped
        return is_best or self.control.should_save or self.progress.stopped

    def _load_best_model(self) -> None:
        self._load_weights(path_of(Path(self.args.output_dir), self.state.best_global_step))

    def _load_weights(self, checkpoint: Path) -> None:
        """Loads the trained weights and their average in the first process, whose directory has all checkpoints."""
        if team.is_first():
            self._load_from_checkpoint(str(checkpoint))
            with _explaining_damage(str(checkpoint)):
                self._load_average(str(checkpoint))
        team.share(parameter for parameter in self.model.parameters() if parameter.requires_grad)
        if self.average is not None:
            team.share(self.average.values())

    def _save_checkpoint(self, model: Any, trial: Any) -> None:
        """Writes a checkpoint atomically."""
        directory = self.args.output_dir
        self.state.stateful_callbacks[Progress.KEY] = self.progress.state()
        with self.clock.writing_one(), new_checkpoint(Path(directory), self.state.global_step) as fresh:
            # The Trainer creates its own subdirectory checkpoint-<step> in output_dir; the files move up below.
            self.args.output_dir = str(fresh)
            try:
                super()._save_checkpoint(model, trial)
            finally:
                self.args.output_dir = directory
            (inner,) = fresh.iterdir()
            for path in list(inner.iterdir()):
                path.rename(fresh / path.name)
            inner.rmdir()

    def _save(self, output_dir: str | None = None, state_dict: dict[str, Any] | None = None) -> None:
        directory = output_dir or self.args.output_dir
        if method_of(self.model).name == "full":  # the whole model, in the format of transformers
            self.model.save_pretrained(directory, state_dict=state_dict)
        else:
            save_method(self.model, directory)

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: Any = None) -> None:
        with _explaining_damage(resume_from_checkpoint):
            if method_of(self.model).name == "full":
                super()._load_from_checkpoint(resume_from_checkpoint, model)
            else:
                load_method(self.model, resume_from_checkpoint)

    def _save_optimizer_and_scheduler(self, output_dir: str) -> None:
        super()._save_optimizer_and_scheduler(output_dir)
        if self.average is not None and team.is_first():
            self.average.save(Path(output_dir))

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        with _explaining_damage(checkpoint):
            super()._load_optimizer_and_scheduler(checkpoint)
            self._load_average(checkpoint)

    def _load_average(self, checkpoint: str | None) -> None:
        if checkpoint is not None and self.average is not None:
            self.average.load(Path(checkpoint))

    def take_over(self, checkpoint: Checkpoint) -> None:
        """Restores the state after the last step from its ``checkpoint``, without training."""
        has_best = self.args.load_best_model_at_end and checkpoint.best is not None
        self._load_weights(checkpoint.best if has_best else checkpoint.path)
        self.state = checkpoint.state
        self.progress.go_on(self.state)


@contextmanager
def _explaining_damage(checkpoint: str | None) -> Iterator[None]:
    """Turns any loading error into one line with the remedy."""
    try:
        yield
    except (torch.OutOfMemoryError, TaskError):
        raise
    except Exception as error:  # a damaged file can make torch.load raise any exception
        raise damaged(checkpoint, error) from error


class Progress:
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


class _Steps(TrainerCallback):
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


class _EarlyStopping(EarlyStoppingCallback):
    """Transformers' callback, which takes its count from a checkpoint, and asks for no strategy of evaluations."""

    @property
    def has_stopped(self) -> bool:
        return self.early_stopping_patience_counter >= self.early_stopping_patience

    def on_train_begin(self, args, state, control, **kwargs):
        saved = state.stateful_callbacks.get(type(self).__name__) or {}
        self.early_stopping_patience_counter = saved.get("attributes", {}).get("early_stopping_patience_counter", 0)


class _Averaging(TrainerCallback):
    def __init__(self, average: MovingAverage) -> None:
        self.average = average

    def on_step_end(self, args, state, control, **kwargs):
        self.average.update(state.global_step)


class _EpochSampler(LengthGroupedSampler):
    """Groups rows of similar length, in an order that depends only on the seed and the epoch."""

    def __init__(self, batch_size: int, lengths: list[int], seed: int) -> None:
        super().__init__(batch_size, lengths=lengths)
        self.seed = seed
        self.set_epoch(0)

    def set_epoch(self, epoch: int) -> None:  # accelerate's data loader calls it
        self.generator = torch.Generator().manual_seed(self.seed + epoch)


class _Shown(TrainerCallback):
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


class _StopOnInterrupt(TrainerCallback):
    """Stops the run on Ctrl-C: the first after the current step, with a checkpoint; the second immediately."""

    requested = False

    @contextmanager
    def listening(self) -> Iterator[None]:
        def handler(signum: int, frame: Any) -> None:
            if self.requested:
                raise KeyboardInterrupt
            self.requested = True
            print("\nstopping after this step; press Ctrl-C again to stop at once", flush=True)

        previous = signal.signal(signal.SIGINT, handler)
        try:
            yield
        finally:
            signal.signal(signal.SIGINT, previous)

    def on_step_end(self, args, state, control, **kwargs):
        if self.requested:
            control.should_save = control.should_training_stop = True


def build_trainer(
    model, settings: Settings, out: Path, train, validation, collator, kind: type[FinetuneTrainer] | None = None
) -> FinetuneTrainer:
    """Returns a trainer; ``train`` and ``validation`` are lists of ``{"input_ids": [...], "labels": class index}``.

    ``kind``: another class of trainers, which defines what labels are.
    """
    arguments = training_arguments(settings, out, len(train))
    with writing(out):  # the constructor creates the directory of the checkpoints
        trainer = (kind or FinetuneTrainer)(
            model,
            arguments,
            train_dataset=train,
            eval_dataset=validation or None,
            data_collator=collator,
            compute_metrics=lambda output: summary_scores(output.predictions.argmax(-1), output.label_ids),
        )
    # The Trainer trusts a classifier that takes **kwargs to divide its loss by the number of texts in a step. Most take
    # them and return a batch's mean (BERT does in transformers 5.24), so that accumulated gradients would be too large.
    trainer.model_accepts_loss_kwargs = False
    trainer.lora_plus_ratio = settings.lora_plus_ratio
    if settings.ema_decay:
        trainer.average = MovingAverage(model, settings.ema_decay)
        trainer.add_callback(_Averaging(trainer.average))
    if settings.early_stopping is not None:
        trainer.early_stopping = _EarlyStopping(settings.early_stopping)
        trainer.add_callback(trainer.early_stopping)
    trainer.remove_callback(ProgressCallback)
    trainer.add_callback(_Shown())
    trainer.add_callback(_Steps(trainer))
    return trainer


def forward_of(model: torch.nn.Module, settings: Settings) -> Callable[..., Any]:
    """Returns a function that calls ``model`` in the precision of the settings, as a trainer does."""

    def forward(**inputs: torch.Tensor) -> Any:
        device_type = next(iter(inputs.values())).device.type
        with torch.autocast(device_type, torch.bfloat16, enabled=settings.precision == "bfloat16"):
            return model(**inputs)

    return forward


class _Progress(TrainerCallback):
    def __init__(self, on_progress: Callable[[float], None]) -> None:
        self.on_progress = on_progress

    def on_step_end(self, args, state, control, **kwargs):
        self.on_progress(state.global_step / max(state.max_steps, 1))


def train(
    trainer: FinetuneTrainer, checkpoint: Checkpoint | None, on_progress: Callable[[float], None] | None = None
) -> Progress:
    """Trains to the end, from ``checkpoint`` if given; calls ``on_progress`` with the finished fraction.

    Raises:
        Interrupted: Ctrl-C was pressed; a checkpoint of the current step has been written.
        WriteError: a checkpoint cannot be written.
    """
    if checkpoint is not None and checkpoint.is_last:
        trainer.take_over(checkpoint)
    else:
        trainer.stop = stop = _StopOnInterrupt()
        trainer.add_callback(stop)
        if on_progress is not None:
            trainer.add_callback(_Progress(on_progress))
        with stop.listening():
            trainer.train(resume_from_checkpoint=str(checkpoint.path) if checkpoint else None)
        if stop.requested:
            raise Interrupted
    if trainer.average is not None:
        trainer.average.keep()
    return trainer.progress


def predict(trainer: FinetuneTrainer, examples: list[dict[str, Any]]) -> np.ndarray:
    """Returns the model's logits ``[len(examples), num_labels]``, float32, in the order of ``examples``."""
    return trainer.predict(examples).predictions
