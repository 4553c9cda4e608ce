"""``lora-ext finetune``"""

from __future__ import annotations

import argparse
import shlex
import sys
from collections.abc import Callable
from dataclasses import asdict

from ..tasks import TaskError
from ..tasks.settings import Settings
from . import training
from .formatter import HelpFormatter


def add_parser(commands: argparse._SubParsersAction) -> None:
    parser = commands.add_parser(
        "finetune",
        help="fine-tune a text classifier, and report what it cost and gave",
        description="Fine-tunes a text classifier. Without --model and --data: the demo model on the demo reviews.",
        formatter_class=HelpFormatter,
    )
    training.add_options(parser)
    training.add_out(parser, "the adapter, metrics, loss curve and predictions")
    parser.set_defaults(run=run)


def run(args: argparse.Namespace, parse_again: Callable[..., argparse.Namespace]) -> None:
    if args.resume:
        saved = asdict(Settings.load(args.out))
        args = parse_again(**saved)  # nobody need repeat what the run was started with ...
        given = training.options_of(args)
        if changed := [name for name, value in saved.items() if given[name] != value]:
            were = ", ".join(f"--{name.replace('_', '-')} {saved[name]}, now {given[name]}" for name in changed)
            raise TaskError(f"--resume: the run in {args.out} was started with {were}")  # ... or may change it
    settings = Settings(**training.options_of(args))
    training.check_installed("finetune")
    from ..tasks.finetune import finetune  # imports transformers, which takes seconds

    try:
        finetune(settings, args.out, **training.mode(args))
    except KeyboardInterrupt:
        if any(args.out.glob("checkpoints/checkpoint-*/trainer_state.json")):
            print(f"\nto continue: lora-ext finetune --resume --out {shlex.quote(str(args.out))}", file=sys.stderr)
        raise
