"""Extends ``transformers.Trainer`` for LoRA runs: small checkpoints, exact resumption, a clean stop on Ctrl-C."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import ProgressCallback, Trainer
from transformers.trainer_pt_utils import LengthGroupedSampler

from lora_ext._common.printable import first_of
from lora_ext.methods import load_method, method_of, save_method
from lora_ext.tasks import TaskError
from lora_ext.tasks.finetune.moving_average import MovingAverage
from lora_ext.tasks.finetune.run_checkpoints import Clock, RunCheckpoint, damaged, new_checkpoint, path_of
from lora_ext.tasks.finetune.run_progress import RunProgress
from lora_ext.tasks.finetune.scores import summary_scores
from lora_ext.tasks.finetune.settings import Settings
from lora_ext.tasks.finetune.trainer_callbacks import (
    Averaging,
    EarlyStopping,
    ReportedProgress,
    ShownProgress,
    Steps,
    StopOnInterrupt,
)
from lora_ext.tasks.finetune.training_arguments import training_arguments
from lora_ext.tasks.shared import team
from lora_ext.tasks.shared.whole_files import writing


class Interrupted(KeyboardInterrupt):
    """Raised on Ctrl-C or SIGTERM during training, after a checkpoint of the last step was written."""


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
        stop: listens to Ctrl-C and SIGTERM during training, or None.
        clock: decides when a checkpoint is due.
    """

    lora_plus_ratio = 1.0
    average: MovingAverage | None = None
    class_weights: torch.Tensor | None = None
    early_stopping: EarlyStopping | None = None
    stop: StopOnInterrupt | None = None

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.progress, self.clock = RunProgress(), Clock()

    def create_optimizer(self, model: Any = None) -> torch.optim.Optimizer:
        if self.optimizer is not None:
            return self.optimizer
        optimizer = super().create_optimizer(*(() if model is None else (model,)))  # Transformers 5.0 takes none
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
        self.state.stateful_callbacks[RunProgress.KEY] = self.progress.state()
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
        if method_of(self.model).name == "full":
            # By default Transformers gives the weights the names of the checkpoint that the model came from (Mixtral's
            # experts, gamma and beta of old LayerNorms), which its Trainer does not find in the model.
            self.model.save_pretrained(directory, state_dict=state_dict, save_original_format=False)
        else:
            save_method(self.model, directory)

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: Any = None) -> None:
        with _explaining_damage(resume_from_checkpoint):
            if method_of(self.model).name == "full":
                super()._load_from_checkpoint(resume_from_checkpoint, model)
            else:
                load_method(self.model, resume_from_checkpoint)

    def _issue_warnings_after_load(self, load_result: Any) -> None:
        """Raises ValueError if a whole model was not loaded whole. Tied weights are in the file once."""
        values = self.model.state_dict()
        loaded = {values[name].data_ptr() for name in values.keys() - load_result.missing_keys}
        lost = [name for name in load_result.missing_keys if values[name].data_ptr() not in loaded]
        for what, names in (("no values for", lost), ("unknown values:", load_result.unexpected_keys)):
            if names:
                raise ValueError(f"its weights have {what} {first_of(names, 1)}")

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

    def take_over(self, checkpoint: RunCheckpoint) -> None:
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


class _EpochSampler(LengthGroupedSampler):
    """Groups rows of similar length, in an order that depends only on the seed and the epoch."""

    def __init__(self, batch_size: int, lengths: list[int], seed: int) -> None:
        super().__init__(batch_size, lengths=lengths)
        self.seed = seed
        self.set_epoch(0)

    def set_epoch(self, epoch: int) -> None:  # accelerate's data loader calls it
        self.generator = torch.Generator().manual_seed(self.seed + epoch)


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
        trainer.add_callback(Averaging(trainer.average))
    if settings.early_stopping is not None:
        trainer.early_stopping = EarlyStopping(settings.early_stopping)
        trainer.add_callback(trainer.early_stopping)
    trainer.remove_callback(ProgressCallback)
    trainer.add_callback(ShownProgress())
    trainer.add_callback(Steps(trainer))
    return trainer


def forward_of(model: torch.nn.Module, settings: Settings) -> Callable[..., Any]:
    """Returns a function that calls ``model`` in the precision of the settings, as a trainer does."""

    def forward(**inputs: torch.Tensor) -> Any:
        device_type = next(iter(inputs.values())).device.type
        with torch.autocast(device_type, torch.bfloat16, enabled=settings.precision == "bfloat16"):
            return model(**inputs)

    return forward


def train(
    trainer: FinetuneTrainer, checkpoint: RunCheckpoint | None, on_progress: Callable[[float], None] | None = None
) -> RunProgress:
    """Trains to the end, from ``checkpoint`` if given; calls ``on_progress`` with the finished fraction.

    Raises:
        Interrupted: Ctrl-C was pressed, or SIGTERM came; a checkpoint of the current step has been written.
        WriteError: a checkpoint cannot be written.
    """
    if checkpoint is not None and checkpoint.is_last:
        trainer.take_over(checkpoint)
    else:
        trainer.stop = stop = StopOnInterrupt()
        trainer.add_callback(stop)
        if on_progress is not None:
            trainer.add_callback(ReportedProgress(on_progress))
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
