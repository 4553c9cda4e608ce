"""``lora-ext plan``"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable
from dataclasses import fields
from pathlib import Path

from lora_ext.cli import files, training
from lora_ext.cli.formatter import HelpFormatter
from lora_ext.planner import OPTIMIZERS, WEIGHT_DTYPES
from lora_ext.tasks import TaskError
from lora_ext.tasks.finetune.defaults import USUAL
from lora_ext.tasks.finetune.quantize import QUANTIZE
from lora_ext.tasks.finetune.settings import Settings

_ABBREVIATIONS = {"fp32": "float32", "bf16": "bfloat16", "fp16": "float16"}
_TRAINING = ("model", "method", "r", "lora_alpha", "lora_dropout", "target_modules", "modules_to_save")
_TRAINING += ("bottleneck_size", "drop_layers", "prefix_length", "infix_length", "batch_size")
_TRAINING += ("accumulation_steps", "gradient_checkpointing", "precision")


def add_parser(commands: argparse._SubParsersAction) -> None:
    parser = commands.add_parser(
        "plan",
        help="estimate the memory and disk of a method, and what makes it fit",
        description="Counts the memory of training by running a step without data and without weights, and compares "
        "the method with full fine-tuning. Without --model: the demo model.",
        formatter_class=HelpFormatter,
    )
    add = parser.add_argument
    training.add_options(parser, tuple(field.name for field in fields(Settings) if field.name not in _TRAINING))
    add(
        "--seq-len", type=int, default=Settings.max_length, metavar="TOKENS", help="tokens a text, none of them padding"
    )
    add("--task", help="classification or causal-lm; default: as in the config")
    labels = "classes of a classifier; default: as in the config, or 2"
    add("--num-labels", type=training.at_least_1, metavar="N", help=labels)
    add("--dtype", default="float32", type=lambda text: _ABBREVIATIONS.get(text, text), help=", ".join(WEIGHT_DTYPES))
    add("--optimizer", default="adamw", help=", ".join(OPTIMIZERS))
    texts = "number of training texts, each of --seq-len tokens: says whether the adapter is large enough for them"
    add("--texts", type=training.at_least_1, metavar="N", help=texts)
    add("--attention", choices=["sdpa", "eager"], help="the implementation; default: the choice of transformers")
    add("--device", default="cuda", choices=["cuda", "cpu"], help="device that training would run on")
    add(
        "--gpu-memory",
        type=files.size,
        metavar="SIZE",
        help="memory of the GPU, such as 80GB or 80GiB: says whether training fits",
    )
    zero_too = lambda text: 0 if text == "0" else files.size(text)  # noqa: E731
    add(
        "--reserve",
        type=zero_too,
        default="1GB",
        metavar="SIZE",
        help="part of the GPU's memory that tensors cannot use",
    )
    add("--devices", type=training.at_least_1, metavar="N", help="predict memory, traffic and time of a step on N GPUs")
    groups = "GPUs that split each layer (tensor parallelism); the others shard weights (FSDP2)"
    add("--tensor-parallel", type=training.at_least_1, default=1, metavar="M", help=groups)
    add("--disk", type=files.size, metavar="SIZE", help="size of a disk: says how many checkpoints fit")
    add("--out", type=Path, metavar="DIR", help="directory for plan.json, plan.md and plan.png")
    add("--overwrite", action="store_true", help="replace the plan in --out")
    add("--json", action="store_true", help="print the plan as JSON")
    parser.set_defaults(run=run)


def run(args: argparse.Namespace, parse_again: Callable[..., argparse.Namespace]) -> None:
    training.check_installed("plan", names=["transformers"])
    from lora_ext.tasks.plan import results
    from lora_ext.tasks.plan.models import read_config, task_of
    from lora_ext.tasks.plan.run import PlanSettings, plan  # imports transformers, which takes seconds

    if args.seq_len < 1:
        raise TaskError(f"--seq-len is {args.seq_len}, want at least 1")
    if args.accumulation_steps < 1:
        raise TaskError(f"--accumulation-steps is {args.accumulation_steps}, want at least 1")
    training_options = {name: getattr(args, name) for name in _TRAINING}
    if args.target_modules is None and args.method == "lora":  # finetune's default with this task
        task = args.task or task_of(read_config(args.model))
        training_options["target_modules"] = None if task == "classification" else USUAL["target_modules"]
    if args.method == "lora" and args.dtype in QUANTIZE:
        training_options["quantize"] = args.dtype  # on which finetune's other defaults depend
    finetune = Settings(**training_options, max_length=args.seq_len)
    names = (
        "task",
        "num_labels",
        "attention",
        "dtype",
        "optimizer",
        "device",
        "gpu_memory",
        "reserve",
        "disk",
        "texts",
        "devices",
        "tensor_parallel",
    )
    options = {name: getattr(args, name) for name in names}
    options["accumulation_steps"] = finetune.accumulation_steps
    options["gradient_checkpointing"] = finetune.gradient_checkpointing != "no"
    say = lambda line: print(line, file=sys.stderr)  # noqa: E731  standard output is the plan
    result = plan(PlanSettings(finetune, **options), args.out, overwrite=args.overwrite, say=say)
    if args.json:
        files.print_json(result)
        return
    files.tell("\n".join([results.title(result), files.table(results.rows(result)), *results.notes(result)]))
