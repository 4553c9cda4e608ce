"""The ``transformers.TrainingArguments`` of a run."""

from __future__ import annotations

import math
from pathlib import Path

import torch
from torch.utils.data import DataLoader
from transformers import Trainer, TrainingArguments, get_scheduler

from lora_ext.tasks import TaskError
from lora_ext.tasks.finetune import extra_arguments
from lora_ext.tasks.finetune.defaults import USUAL
from lora_ext.tasks.finetune.settings import SCHEDULES, Settings
from lora_ext.tasks.shared import team


def training_arguments(settings: Settings, out: Path, texts: int) -> TrainingArguments:
    """Returns the arguments of a run in ``out`` on ``texts`` texts; values of ``settings.set`` win.

    Raises:
        TaskError: transformers refuses a value of ``--set``.
    """
    extra = extra_arguments.typed(settings.set)
    if "lr_scheduler_type" in extra and settings.schedule != USUAL["schedule"]:
        raise TaskError(f"--set lr_scheduler_type and --schedule {settings.schedule} contradict; give one of them")
    steps = texts / settings.texts_per_step * settings.epochs
    if extra.get("max_steps", -1) > 0:
        steps = extra["max_steps"]
    arguments = {
        "output_dir": str(out / "checkpoints"),
        "per_device_train_batch_size": team.share_of(settings.batch_size),
        "per_device_eval_batch_size": team.share_of(settings.batch_size),
        "gradient_accumulation_steps": settings.accumulation_steps,
        "num_train_epochs": settings.epochs,
        "learning_rate": settings.learning_rate,
        "lr_scheduler_type": SCHEDULES[settings.schedule],
        "warmup_steps": round(settings.warmup * steps),
        "eval_strategy": "no",  # the trainer's callback decides when to evaluate, log and save
        "logging_strategy": "no",
        "save_strategy": "no",
        "include_num_input_tokens_seen": "non_padding",
        "dataloader_pin_memory": torch.cuda.is_available(),
        "bf16": settings.precision == "bfloat16",
        "use_cpu": not torch.cuda.is_available(),  # without it, the Trainer refuses bf16 on a CPU
        "disable_tqdm": False,  # independent of the verbosity
        "report_to": [],
        "seed": settings.seed,
    }
    if settings.best_metric is not None:  # the trainer writes a checkpoint of each evaluation that is the best so far
        arguments |= {"load_best_model_at_end": True, "save_strategy": "best"}
        arguments["metric_for_best_model"] = settings.best_metric
        arguments["greater_is_better"] = settings.best_metric not in ("loss", "perplexity")
    try:
        return TrainingArguments(**{**arguments, **extra})
    except (ValueError, TypeError, ImportError) as error:
        raise _refused(settings, error) from error


def check_training_arguments(settings: Settings, texts: int) -> None:
    """Raises TaskError for what a run would refuse: a batch that its processes cannot share, and values of ``--set``.

    Of those the name, the type, the optimizer, the schedule, the loaders and the compiler are checked.
    """
    team.share_of(settings.batch_size)
    if not settings.set:
        return
    arguments = training_arguments(settings, Path("unused"), texts)
    weight = torch.nn.Parameter(torch.zeros(1))
    try:
        optimizer, options = Trainer.get_optimizer_cls_and_kwargs(arguments)
        optimizer([weight], **options)
        workers, keep = arguments.dataloader_num_workers, arguments.dataloader_persistent_workers
        for size in (arguments.train_batch_size, arguments.eval_batch_size):
            DataLoader([weight], size, num_workers=workers, persistent_workers=keep)
        if arguments.torch_compile:  # compiles nothing yet
            torch.compile(
                torch.nn.Identity(), backend=arguments.torch_compile_backend, mode=arguments.torch_compile_mode
            )
        get_scheduler(
            arguments.lr_scheduler_type,
            torch.optim.SGD([weight], lr=0.1),
            num_warmup_steps=arguments.warmup_steps,
            num_training_steps=max(1, math.ceil(texts / settings.texts_per_step * settings.epochs)),
            scheduler_specific_kwargs=arguments.lr_scheduler_kwargs,
        )
    except (ValueError, TypeError, ImportError, KeyError, RuntimeError) as error:
        raise _refused(settings, error) from error


def _refused(settings: Settings, error: Exception) -> TaskError:
    return TaskError(f"--set {settings.set}: {' '.join(str(error).split())}")
