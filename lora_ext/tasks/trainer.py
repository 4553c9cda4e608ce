"""``transformers.Trainer`` with what a LoRA run needs: small checkpoints, exact resumption, a clean stop on Ctrl-C."""

from __future__ import annotations

import signal
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import ProgressCallback, Trainer, TrainerCallback, TrainingArguments
from transformers.trainer_pt_utils import LengthGroupedSampler

from lora_ext.methods import load_method, method_of, save_method

from . import TaskError
from .moving_average import MovingAverage
from .report import accuracy, macro_f1
from .settings import SCHEDULES, Settings


class Interrupted(KeyboardInterrupt):
    """Ctrl-C during training; a checkpoint of the last step is on disk."""


class FinetuneTrainer(Trainer):
    """Writes only what is trained, and draws the same batches in a resumed run.

    Evaluation and prediction keep the order of the dataset, and take of a model's outputs the logits alone.

    Attributes:
        lora_plus_ratio: the learning rate of ``lora_B`` over that of all else (LoRA+, Hayou et al. 2024, arXiv
            2402.12354).
        average: which is evaluated during training, and what the model has after it; or None.
    """

    lora_plus_ratio = 1.0
    average: MovingAverage | None = None

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
        dataset = self.train_dataset if train_dataset is None else train_dataset
        return _EpochSampler(self.args.train_batch_size, [len(row["input_ids"]) for row in dataset], self.args.seed)

    def evaluate(self, *args: Any, **kwargs: Any) -> dict[str, float]:
        with self.average.in_place() if self.average is not None else nullcontext():
            return super().evaluate(*args, **kwargs)

    def prediction_step(self, *args: Any, **kwargs: Any) -> tuple[Any, Any, Any]:
        loss, outputs, labels = super().prediction_step(*args, **kwargs)
        return loss, outputs[0] if isinstance(outputs, tuple) else outputs, labels

    def _save(self, output_dir: str | None = None, state_dict: dict[str, Any] | None = None) -> None:
        if method_of(self.model).name == "full":  # the whole model, as others read it
            super()._save(output_dir, state_dict)
        else:
            save_method(self.model, output_dir or self.args.output_dir)

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: Any = None) -> None:
        with _explaining_damage(resume_from_checkpoint):
            if method_of(self.model).name == "full":
                super()._load_from_checkpoint(resume_from_checkpoint, model)
            else:
                load_method(self.model, resume_from_checkpoint)

    def _save_optimizer_and_scheduler(self, output_dir: str) -> None:
        super()._save_optimizer_and_scheduler(output_dir)
        if self.average is not None:
            self.average.save(Path(output_dir))

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        with _explaining_damage(checkpoint):
            super()._load_optimizer_and_scheduler(checkpoint)
            if checkpoint is not None and self.average is not None:
                self.average.load(Path(checkpoint))


@contextmanager
def _explaining_damage(checkpoint: str | None) -> Iterator[None]:
    """Whatever a checkpoint's files do not load with becomes one line that says what to do."""
    try:
        yield
    except torch.OutOfMemoryError:
        raise
    except PermissionError as error:
        raise TaskError(f"--resume: {checkpoint} cannot be read: {error}") from error
    except Exception as error:  # torch.load raises what the damage happens to cause
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise TaskError(
            f"--resume: {checkpoint} cannot be read ({reason}); delete it to continue from the one before"
        ) from error


class _Averaging(TrainerCallback):
    def __init__(self, average: MovingAverage) -> None:
        self.average = average

    def on_step_end(self, args, state, control, **kwargs):
        self.average.update(state.global_step)


class _EpochSampler(LengthGroupedSampler):
    """Rows of like length together, in an order that follows from the seed and the epoch alone."""

    def __init__(self, batch_size: int, lengths: list[int], seed: int) -> None:
        super().__init__(batch_size, lengths=lengths)
        self.seed = seed
        self.set_epoch(0)

    def set_epoch(self, epoch: int) -> None:  # accelerate's data loader calls it
        self.generator = torch.Generator().manual_seed(self.seed + epoch)


class _LossInBar(ProgressCallback):
    """The progress bar with the current loss in it, in place of a printed line for every logged one."""

    def on_log(self, args, state, control, logs=None, **kwargs):
        if self.training_bar is not None and "loss" in (logs or {}):
            self.training_bar.set_postfix(epoch=f"{state.epoch:.2f}", loss=f"{float(logs['loss']):.3f}")


class Throughput(TrainerCallback):
    """Seconds spent in training steps, and the tokens in them, padding not counted; before a resumption, too."""

    def __init__(self) -> None:
        self.seconds = 0.0
        self.tokens = 0

    def on_train_begin(self, args, state, control, **kwargs):
        self.seconds = state.stateful_callbacks.get("Throughput", {}).get("seconds", 0.0)
        self.tokens = state.num_input_tokens_seen

    def on_step_begin(self, args, state, control, **kwargs):
        self._start = time.perf_counter()

    def on_step_end(self, args, state, control, **kwargs):
        self.seconds += time.perf_counter() - self._start
        self.tokens = state.num_input_tokens_seen
        state.stateful_callbacks["Throughput"] = {"seconds": self.seconds}  # goes into checkpoints


class _StopOnInterrupt(TrainerCallback):
    """The first Ctrl-C ends the run after the current step, with a checkpoint; the second one ends it at once."""

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


def build_trainer(model, settings: Settings, out: Path, train, validation, collator) -> FinetuneTrainer:
    """``train`` and ``validation`` are lists of ``{"input_ids": [...], "labels": class index}``."""
    steps = len(train) / settings.batch_size * settings.epochs
    arguments = TrainingArguments(
        output_dir=str(out / "checkpoints"),
        per_device_train_batch_size=settings.batch_size,
        per_device_eval_batch_size=settings.batch_size,
        num_train_epochs=settings.epochs,
        learning_rate=settings.learning_rate,
        lr_scheduler_type=SCHEDULES[settings.schedule],
        warmup_steps=round(settings.warmup * steps),
        eval_strategy="epoch" if validation else "no",
        logging_steps=0.01,  # of all steps: a hundred points on the loss curve, however long the run
        save_steps=0.1,
        save_total_limit=2,
        include_num_input_tokens_seen="non_padding",
        dataloader_pin_memory=torch.cuda.is_available(),
        bf16=settings.precision == "bfloat16",
        use_cpu=not torch.cuda.is_available(),  # or bf16 is refused
        disable_tqdm=False,  # whatever the verbosity
        report_to=[],
        seed=settings.seed,
    )
    trainer = FinetuneTrainer(
        model,
        arguments,
        train_dataset=train,
        eval_dataset=validation or None,
        data_collator=collator,
        compute_metrics=lambda output: {
            "accuracy": accuracy(output.predictions.argmax(-1), output.label_ids),
            "macro_f1": macro_f1(output.predictions.argmax(-1), output.label_ids),
        },
    )
    trainer.lora_plus_ratio = settings.lora_plus_ratio
    if settings.ema_decay:
        trainer.average = MovingAverage(model, settings.ema_decay)
        trainer.add_callback(_Averaging(trainer.average))
    trainer.remove_callback(ProgressCallback)
    trainer.add_callback(_LossInBar())
    return trainer


def forward_of(model: torch.nn.Module, settings: Settings) -> Callable[..., Any]:
    """The forward of ``model`` in the precision of the settings, as a trainer runs it."""

    def forward(**inputs: torch.Tensor) -> Any:
        device_type = next(iter(inputs.values())).device.type
        with torch.autocast(device_type, torch.bfloat16, enabled=settings.precision == "bfloat16"):
            return model(**inputs)

    return forward


class _Progress(TrainerCallback):
    def __init__(self, tell: Callable[[float], None]) -> None:
        self.tell = tell

    def on_step_end(self, args, state, control, **kwargs):
        self.tell(state.global_step / max(state.max_steps, 1))


def train(
    trainer: FinetuneTrainer, checkpoint: Path | None, on_progress: Callable[[float], None] | None = None
) -> Throughput:
    """Trains to the end, from ``checkpoint`` if given; ``on_progress`` is told the part that is done.

    Raises:
        Interrupted: on the first Ctrl-C, after a checkpoint of the step then finished was written.
    """
    stop, throughput = _StopOnInterrupt(), Throughput()
    trainer.add_callback(stop)
    trainer.add_callback(throughput)
    if on_progress is not None:
        trainer.add_callback(_Progress(on_progress))
    with stop.listening():
        trainer.train(resume_from_checkpoint=str(checkpoint) if checkpoint else None)
    if stop.requested:
        raise Interrupted
    steps = [entry["step"] for entry in trainer.state.log_history if "eval_loss" in entry]
    if trainer.eval_dataset is not None and steps[-1:] != [trainer.state.global_step]:
        trainer.evaluate()  # the last checkpoint comes before it, and so it is missing from what is resumed there
    if trainer.average is not None:
        trainer.average.keep()
    return throughput


def predict(trainer: FinetuneTrainer, examples: list[dict[str, Any]]) -> np.ndarray:
    """Logits ``[len(examples), num_labels]`` of the trainer's model, float32, in the order of ``examples``."""
    return trainer.predict(examples).predictions


def last_checkpoint(out: Path) -> Path:
    """The newest checkpoint that was written to its end (``trainer_state.json`` comes last).

    Raises:
        TaskError: there is none.
    """
    complete = [state.parent for state in out.glob("checkpoints/checkpoint-*/trainer_state.json")]
    if not complete:
        raise TaskError(f"--resume: {out} holds no checkpoint; start the run anew, with --overwrite")
    return max(complete, key=lambda path: int(path.name.rpartition("-")[2]))
