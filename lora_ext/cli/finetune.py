"""``lora-ext finetune``"""

from __future__ import annotations

import argparse
import importlib.util
import shlex
import sys
from collections.abc import Callable
from dataclasses import asdict, fields
from pathlib import Path

from ..methods import METHODS
from ..tasks import TaskError
from ..tasks.settings import Settings
from .formatter import HelpFormatter


def add_parser(commands: argparse._SubParsersAction) -> None:
    parser = commands.add_parser(
        "finetune",
        help="fine-tune a text classifier, and report what it cost and gave",
        description="Fine-tunes a text classifier. Without --model and --data: the demo model on the demo reviews.",
        formatter_class=HelpFormatter,
    )
    add = parser.add_argument
    add("--model", metavar="PATH_OR_ID", help="a directory or hub id that transformers loads; else the demo model")
    add("--data", metavar="FILE", help=".csv, .tsv or .jsonl with a text and a label column; else the demo reviews")
    add("--eval-file", metavar="FILE", help="test on this file, in place of a part of --data")
    add("--text-column", metavar="NAME", help="column of the texts")
    add("--label-column", metavar="NAME", help="column of the labels, strings or integers")
    add("--validation-split", type=float, metavar="FRACTION", help="part of --data to evaluate on after each epoch")
    add("--test-split", type=float, metavar="FRACTION", help="part of --data held out until the end")
    add("--method", metavar="NAME", help=f"{', '.join(METHODS)}, or several joined by +, as lora+prefix-embed")
    add("--r", type=int, metavar="RANK", help="rank of the adapters")
    add("--lora-alpha", type=float, metavar="ALPHA", help="the update is scaled by ALPHA / RANK")
    add("--lora-dropout", type=float, metavar="P", help="dropout on the adapters' input")
    add(
        "--target-modules",
        metavar="NAMES",
        help="layers to adapt: of q,k,v,o; or module names; or all-linear; or a regex",
    )
    add("--modules-to-save", metavar="NAMES", help="modules to train in full beside the head")
    add("--bottleneck-size", type=int, metavar="SIZE", help="hidden features of adapter-h, -l, -p and -drop")
    add("--drop-layers", type=int, metavar="N", help="lower layers without adapter-drop's adapters; else 5 of 12")
    add(
        "--prefix-length",
        type=int,
        metavar="TOKENS",
        help="trained tokens in front of the input: prefix-embed, -layer",
    )
    add("--infix-length", type=int, metavar="TOKENS", help="trained tokens behind it")
    add("--epochs", type=float, help="passes over the training texts")
    add("--batch-size", type=int, help="texts a step")
    add("--learning-rate", type=float, help="peak; falls linearly to 0; else the method's own default")
    add("--warmup", type=float, metavar="FRACTION", help="part of the steps in which the learning rate rises")
    add("--max-length", type=int, metavar="TOKENS", help="longer texts are cut")
    add("--seed", type=int, help="of the new head, the adapters, the order of the texts and dropout")
    parser.set_defaults(**asdict(Settings()) | {"learning_rate": None})
    add("--out", type=Path, required=True, metavar="DIR", help="gets the adapter, metrics, loss curve and predictions")
    add("--resume", action="store_true", help="continue the run in --out from its last checkpoint")
    add("--overwrite", action="store_true", help="replace the run in --out")
    parser.set_defaults(run=run)


def run(args: argparse.Namespace, parse_again: Callable[..., argparse.Namespace]) -> None:
    saved = None
    if args.resume:
        saved = Settings.load(args.out)
        args = parse_again(**asdict(saved))  # nobody need repeat what the run was started with ...
    for name in ("data", "eval_file"):  # a resumed run may start in another directory
        if (path := getattr(args, name)) is not None:
            setattr(args, name, str(Path(path).resolve()))
    settings = Settings(**{field.name: getattr(args, field.name) for field in fields(Settings)})
    if saved is not None and settings != saved:
        changed = ", ".join(
            f"--{name.replace('_', '-')} {value}, now {asdict(settings)[name]}"
            for name, value in asdict(saved).items()
            if asdict(settings)[name] != value
        )
        raise TaskError(f"--resume: the run in {args.out} was started with {changed}")  # ... or may change it
    missing = [name for name in ("transformers", "accelerate", "matplotlib") if importlib.util.find_spec(name) is None]
    if missing:
        raise TaskError(f"finetune needs {', '.join(missing)}: pip install 'lora_ext[finetune]'")
    from ..tasks.finetune import finetune  # imports transformers, which takes seconds

    try:
        finetune(settings, args.out, resume=args.resume, overwrite=args.overwrite)
    except KeyboardInterrupt:
        if any(args.out.glob("checkpoints/checkpoint-*")):
            print(f"\nto continue: lora-ext finetune --resume --out {shlex.quote(str(args.out))}", file=sys.stderr)
        raise
