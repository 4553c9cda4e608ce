"""``lora-ext compare``"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from typing import Any

from lora_ext.cli import training
from lora_ext.cli.formatter import HelpFormatter
from lora_ext.tasks.finetune.settings import COMPARE_FILE

_WITHOUT = ("method", "seed")
_METHODS = [
    "full",
    "head-only",
    "bitfit",
    "prefix-embed",
    "prefix-layer",
    "adapter-h",
    "adapter-l",
    "adapter-p",
    "adapter-drop",
    "lora",
    "lora+prefix-embed",
    "lora+prefix-layer",
]


def add_parser(commands: argparse._SubParsersAction) -> None:
    parser = commands.add_parser(
        "compare",
        help="fine-tune with several methods from several seeds: accuracy, time, memory, bytes",
        description="Fine-tunes with several methods, each from several seeds; compares accuracy, parameters, time, "
        "memory, bytes on disk and latency. A method may carry options of its own: lora:r=4:learning-rate=2e-3. One "
        "that the checkpoint does not suit is left out, and the exit status is 3.",
        formatter_class=HelpFormatter,
    )
    add = parser.add_argument
    add("--methods", nargs="+", default=_METHODS, metavar="METHOD", help="which, in the order of the table")
    without = "of these, or of a comparison that is resumed, leave some out"
    add("--without", nargs="+", default=[], metavar="METHOD", help=without)
    add("--seeds", type=training.integers, default=[0, 1, 2], metavar="0,1,2", help="each method is trained from each")
    training.add_options(parser, _WITHOUT)
    training.add_jobs(parser)
    training.add_threads(parser)
    training.add_out(parser, "compare.json, compare.md, compare.png, and every run in runs/")
    parser.set_defaults(run=run)


_EXIT_LEFT_OUT = 3


def run(args: argparse.Namespace, parse_again: Callable[..., argparse.Namespace]) -> int:
    if args.resume:
        args = training.with_saved(args, parse_again, COMPARE_FILE, {"methods": str, "seeds": int})
    training.check_installed("compare")
    training.use_threads(args.threads)
    from lora_ext.tasks.comparison.compare import compare

    options: dict[str, Any] = training.options_of(args, _WITHOUT)
    with training.saying_how_to_resume("compare", args.out, COMPARE_FILE, args.resume, args.jobs):
        methods = training.without(args.methods, args.without)
        result = compare(methods, args.seeds, options, args.out, jobs=args.jobs, **training.mode(args))
    return _EXIT_LEFT_OUT if result["left_out"] else 0
