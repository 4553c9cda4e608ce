"""``lora-ext sweep``"""

from __future__ import annotations

import argparse
from collections.abc import Callable

from lora_ext.cli import config_file, training
from lora_ext.cli.formatter import HelpFormatter
from lora_ext.tasks.finetune.settings import SWEEP_FILE

_WITHOUT = ("method", "seed", "r", "target_modules")
_WITHOUT += ("bottleneck_size", "drop_layers", "prefix_length", "infix_length")  # of other methods


def add_parser(commands: argparse._SubParsersAction) -> None:
    parser = commands.add_parser(
        "sweep",
        help="fine-tune with LoRA of several ranks on several sets of weights",
        description="Fine-tunes with LoRA of several ranks on several sets of weights, each from several seeds; and on "
        "every set at one number of parameters. Winners are marked where they exceed the spread over the seeds.",
        formatter_class=HelpFormatter,
    )
    add = parser.add_argument
    add("--ranks", type=training.integers, default=[1, 2, 4, 8, 64], metavar="1,2,4", help="ranks of the adapters")
    targets = "sets of weights, separated by ;, each as finetune's --target-modules"
    add("--targets", type=sets, default=["q", "q,v", "q,k,v,o", "all-linear"], metavar="q;q,v", help=targets)
    add(
        "--budget",
        type=int,
        metavar="N",
        help="number of parameters to compare sets at; default: the first set's at rank 8, or the widest's at rank 1",
    )
    add("--seeds", type=training.integers, default=[0, 1, 2], metavar="0,1,2", help="seeds to train each cell from")
    config_file.add_config(parser)
    training.add_options(parser, _WITHOUT)
    training.add_launch(parser)
    training.add_threads(parser)
    training.add_out(parser, "sweep.json, sweep.md, sweep.png, and every run in runs/")
    parser.set_defaults(run=run)


def run(args: argparse.Namespace, parse_again: Callable[..., argparse.Namespace]) -> None:
    if args.resume:
        args = training.with_saved(args, parse_again, SWEEP_FILE, {"ranks": int, "targets": str, "seeds": int})
    training.check_installed("sweep")
    training.use_threads(args.threads)
    launch = training.launch_of(args)
    from lora_ext.tasks.comparison.sweep import sweep

    with training.saying_how_to_resume("sweep", args.out, SWEEP_FILE, args.resume, launch):
        sweep(
            args.ranks,
            args.targets,
            args.seeds,
            training.options_of(args, _WITHOUT),
            args.out,
            budget=args.budget,
            launch=launch,
            **training.mode(args),
        )


def sets(text: str) -> list[str]:
    found = [part.strip() for part in text.split(";") if part.strip()]
    if not found:
        raise argparse.ArgumentTypeError(f"{text!r}, want sets of weights such as 'q;q,v'")
    return found
