"""``lora-ext finetune``"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from dataclasses import asdict

from lora_ext.cli import config_file, training
from lora_ext.cli.formatter import HelpFormatter
from lora_ext.tasks import TaskError
from lora_ext.tasks.finetune.settings import SETTINGS_FILE, Settings, saved_threads


def add_parser(commands: argparse._SubParsersAction) -> None:
    parser = commands.add_parser(
        "finetune",
        help="fine-tune a text classifier, and report its accuracy and cost",
        description="Fine-tunes a text classifier. Without --model and --data: the demo model on the demo reviews.",
        formatter_class=HelpFormatter,
    )
    config_file.add_config(parser)
    training.add_options(parser)
    training.add_threads(parser)
    parser.add_argument("--no-measure", dest="measure", action="store_false", help="leave out the timing at the end")
    training.add_out(parser, "the adapter, metrics, loss curve and predictions")
    parser.set_defaults(run=run)


def run(args: argparse.Namespace, parse_again: Callable[..., argparse.Namespace]) -> None:
    if args.resume:
        saved = asdict(Settings.load(args.out))
        args = parse_again(**saved)  # options of the run need not be repeated ...
        given = training.options_of(args)
        if changed := [name for name, value in saved.items() if given[name] != value]:
            were = ", ".join(f"--{name.replace('_', '-')} {saved[name]}, now {given[name]}" for name in changed)
            raise TaskError(f"--resume: the run in {args.out} was started with {were}")  # ... and must not change
    settings = Settings(**training.options_of(args))
    training.check_installed("finetune")
    training.use_threads(args.threads, saved_threads(args.out) if args.resume else None)
    from lora_ext.tasks.finetune.run import finetune  # imports transformers, which takes seconds

    with training.saying_how_to_resume("finetune", args.out, SETTINGS_FILE, args.resume):
        finetune(settings, args.out, measure=args.measure, **training.mode(args))
