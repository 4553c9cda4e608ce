"""Extends Transformers' Trainer and TRL's SFTTrainer: LoRA+, a moving average, and the same batches after resuming."""

from __future__ import annotations

import shutil
import time
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
from torch.optim.swa_utils import get_ema_multi_avg_fn
from transformers import EarlyStoppingCallback, PrinterCallback, TrainerCallback, TrainingArguments
from transformers.trainer_callback import ExportableState
from transformers.trainer_pt_utils import LengthGroupedSampler

from lora_ext.commands.options import CommandError
from lora_ext.commands.results import read_json, write_json
from lora_ext.commands.training_options import TaskOptions, record_of

RECORD = "run.json"
"""File with the options of a run; a directory that has it holds a run."""

_OUTPUTS = ("metrics.json", "predictions.jsonl", "loss_curve.png", "adapter", "model", "merged")


def prepare_directory(options: TaskOptions, training: TrainingArguments) -> str | None:
    """Checks ``output_dir`` before anything is loaded. Returns the checkpoint to resume from, or None.

    ``--resume_from_checkpoint true`` (or ``last``) is the last whole checkpoint, if there is one.

    CommandError: the directory holds another run, or one that is neither continued nor replaced.
    """
    out, wanted = Path(training.output_dir), str(training.resume_from_checkpoint or "").lower()
    record = record_of(options, training)
    if (out / RECORD).exists() and not options.overwrite:
        if wanted in ("", "false"):
            raise CommandError(
                f"{out} holds a run; --resume_from_checkpoint true continues it, --overwrite replaces it, or name "
                "another --output_dir"
            )
        before = read_json(out / RECORD)
        for kind, values in record.items():
            old = before.get(kind, {})
            for name in sorted({*values, *old}):
                if values.get(name) != old.get(name):
                    raise CommandError(
                        f"{out} holds a run with {name}={old.get(name)!r}, not {values.get(name)!r}; resume it with "
                        "the same options, or name another --output_dir"
                    )
    elif out.exists() and not out.is_dir():
        raise CommandError(f"--output_dir {out} is a file")
    elif out.is_dir() and any(out.iterdir()) and not (out / RECORD).exists() and not wanted:
        raise CommandError(f"--output_dir {out} is not empty, and holds no run; name another one")
    if wanted in ("", "false") or options.overwrite:
        return None
    if wanted not in ("true", "last"):
        return training.resume_from_checkpoint
    # trainer_state.json is written last: a kill during a save leaves a checkpoint without it, which Trainer would take.
    whole = [path.parent for path in out.glob("checkpoint-*/trainer_state.json")]
    return str(max(whole, key=lambda path: int(path.name.rpartition("-")[2]))) if whole else None


def begin(options: TaskOptions, training: TrainingArguments) -> None:
    """Removes what an earlier run left, if it is replaced, and writes the record; the first process calls it."""
    out = Path(training.output_dir)
    if options.overwrite and (out / RECORD).exists():
        for path in [*out.glob("checkpoint-*"), *(out / name for name in _OUTPUTS)]:
            shutil.rmtree(path) if path.is_dir() else path.unlink(missing_ok=True)
    (out / "metrics.json").unlink(missing_ok=True)
    write_json(out / RECORD, record_of(options, training))


class MovingAverage(TrainerCallback):
    """Averages the trained weights: ``average += (1 - d) * (weight - average)`` (Polyak and Juditsky 1992).

    After step n, d is ``min(decay, (1 + n) / (10 + n))``. The average lives in the optimizer's state. A checkpoint is
    written while weights and average are swapped: its weights are the average, ready for use, and Trainer's best model
    is what was evaluated; its optimizer has the weights to go on with. So checkpoints need no file of ours.
    """

    def __init__(self, decay: float) -> None:
        self.decay, self.optimizer = decay, None

    def on_train_begin(self, args: Any, state: Any, control: Any, optimizer: Any = None, **kwargs: Any) -> None:
        self.optimizer = optimizer
        if state.global_step:
            self.swap()

    @torch.no_grad()
    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        decay = min(self.decay, (1 + state.global_step) / (10 + state.global_step))
        pairs = self._pairs()
        average_in = get_ema_multi_avg_fn(decay)
        average_in([average for _, average in pairs], [weight for weight, _ in pairs], state.global_step)

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if not (args.load_best_model_at_end and state.best_model_checkpoint):
            self.swap()

    @torch.no_grad()
    def swap(self) -> None:
        for weight, average in self._pairs():
            kept = weight.clone()
            weight.copy_(average)
            average.copy_(kept)

    @contextmanager
    def swapped(self) -> Iterator[None]:
        self.swap()
        try:
            yield
        finally:
            self.swap()

    def _pairs(self) -> list[tuple[torch.Tensor, torch.Tensor]]:
        optimizer = getattr(self.optimizer, "optimizer", self.optimizer)  # accelerate wraps it
        weights = [weight for group in optimizer.param_groups for weight in group["params"]]
        states = [(weight, optimizer.state[weight]) for weight in weights if optimizer.state.get(weight)]
        return [(weight.detach(), state.setdefault("average", weight.detach().clone())) for weight, state in states]


class Clock(TrainerCallback, ExportableState):
    """Counts the seconds of training, also those before a run was resumed."""

    def __init__(self, seconds: float = 0.0) -> None:
        self.seconds, self._since = seconds, None

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self._since = time.perf_counter()

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self._count()

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self._count()

    def _count(self) -> None:
        now = time.perf_counter()
        self.seconds, self._since = self.seconds + now - self._since, now

    def state(self) -> dict[str, Any]:
        return {"args": {"seconds": self.seconds}, "attributes": {}}


class Lines(TrainerCallback):
    """Prints a line for each log in place of Trainer's dictionaries, where no terminal shows its bar."""

    def __init__(self) -> None:
        self._since, self._done = 0.0, 0

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self._since, self._done = time.perf_counter(), state.global_step

    def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, Any] | None = None, **kwargs: Any) -> None:
        if not state.is_world_process_zero or not logs or not {"loss", "eval_loss"} & logs.keys():
            return
        shown = {
            "loss": "loss",
            "eval_loss": "validation loss",
            "eval_accuracy": "accuracy",
            "eval_macro_f1": "macro-F1",
        }
        scores = ", ".join(f"{name} {logs[key]:.3f}" for key, name in shown.items() if key in logs)
        seconds, steps = time.perf_counter() - self._since, state.global_step - self._done
        left = timedelta(seconds=round(seconds / max(steps, 1) * (state.max_steps - state.global_step)))
        print(
            f"step {state.global_step:,} of {state.max_steps:,}, epoch {state.epoch:.2f}: {scores}; {left} left",
            flush=True,
        )


class LoraTrainerMixin:
    """Goes before Trainer or SFTTrainer; :meth:`set_options` takes the place of arguments of the constructor.

    Attributes:
        lora_plus_ratio: learning rate of ``lora_B`` divided by that of all other parameters.
        average: the moving average, or None.
    """

    lora_plus_ratio: float = 1.0
    average: MovingAverage | None = None

    def set_options(self, options: TaskOptions) -> None:
        """Adds what ``options`` ask for."""
        self.lora_plus_ratio = options.lora_plus_ratio if "lora" in options.method.split("+") else 1.0
        self.add_callback(Clock())
        if self.args.disable_tqdm:
            self.remove_callback(PrinterCallback)
            self.add_callback(Lines())
        if options.ema_decay:
            self.average = MovingAverage(options.ema_decay)
            self.add_callback(self.average)
        if options.early_stopping is not None:
            self.add_callback(EarlyStoppingCallback(options.early_stopping))

    def create_optimizer(self, model: Any = None) -> torch.optim.Optimizer:
        is_new = self.optimizer is None
        optimizer = super().create_optimizer(model)
        if not is_new or self.lora_plus_ratio == 1.0:
            return optimizer
        names = self.model.named_parameters()
        factors = {id(weight) for name, weight in names if name.endswith(".lora_B") or ".lora_B." in name}
        for group in list(optimizer.param_groups):
            faster = [weight for weight in group["params"] if id(weight) in factors]
            group["params"] = [weight for weight in group["params"] if id(weight) not in factors]
            if faster:
                optimizer.add_param_group({**group, "params": faster, "lr": group["lr"] * self.lora_plus_ratio})
        return optimizer

    def _get_train_sampler(self, train_dataset: Any = None) -> Any:
        """Groups texts of similar length by the step, so that accumulated batches have the texts of one large batch."""
        if self.args.train_sampling_strategy != "group_by_length":
            return super()._get_train_sampler(train_dataset)
        rows = self.train_dataset if train_dataset is None else train_dataset
        size = self.args.train_batch_size * self.args.gradient_accumulation_steps * self.args.world_size
        return _EpochSampler(size, [len(ids) for ids in rows["input_ids"]], self.args.seed)

    def _get_eval_sampler(self, eval_dataset: Any) -> None:
        return None  # in order: Trainer's own shuffles the predictions where it groups by length

    def evaluate(self, *args: Any, **kwargs: Any) -> dict[str, float]:
        with self.average.swapped() if self.average and self.is_in_train else nullcontext():
            return super().evaluate(*args, **kwargs)

    def _save_checkpoint(self, *args: Any, **kwargs: Any) -> None:
        with self.average.swapped() if self.average else nullcontext():
            super()._save_checkpoint(*args, **kwargs)


class _EpochSampler(LengthGroupedSampler):
    """Draws from the seed and the epoch; Trainer's own draws from the global generator, so a resumed run differs."""

    def __init__(self, batch_size: int, lengths: list[int], seed: int) -> None:
        super().__init__(batch_size, lengths=lengths)
        self.seed = seed
        self.set_epoch(0)

    def set_epoch(self, epoch: int) -> None:  # accelerate's loader calls it
        self.generator = torch.Generator().manual_seed(self.seed + epoch)
