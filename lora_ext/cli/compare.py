"""``lora-ext compare``"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from typing import Any

from lora_ext.cli import config_file, training
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
        "memory, bytes on disk and latency. A method may have its own options, as in lora:r=4:learning-rate=2e-3. "
        "name= gives it a short name, which tables, charts and the directories of its runs use: "
        "lora:r=16:epochs=4:name=long. A name has at most 40 letters, digits and . _ + -, is used once, "
        "and stays when the comparison is resumed. A method that does not suit the checkpoint is left out, and the "
        "exit status is 3.",
        formatter_class=HelpFormatter,
    )
    add = parser.add_argument
    add("--methods", nargs="+", default=_METHODS, metavar="METHOD", help="methods, in the order of the table")
    without = "leave out some of these, or of a comparison that is resumed; by name where they have one"
    add("--without", nargs="+", default=[], metavar="METHOD", help=without)
    add("--seeds", type=training.integers, default=[0, 1, 2], metavar="0,1,2", help="seeds to train each method from")
    config_file.add_config(parser)
    training.add_options(parser, _WITHOUT)
    training.add_launch(parser)
    training.add_threads(parser)
    training.add_out(parser, "compare.json, compare.md, compare.png, and every run in runs/")
    parser.set_defaults(run=run)


_EXIT_LEFT_OUT = 3


def run(args: argparse.Namespace, parse_again: Callable[..., argparse.Namespace]) -> int:
    if args.resume:
        args = training.with_saved(args, parse_again, COMPARE_FILE, {"methods": str, "seeds": int})
    training.check_installed("compare")
    training.use_threads(args.threads)
    launch = training.launch_of(args)
    from lora_ext.tasks.comparison.compare import compare
    from lora_ext.tasks.comparison.method_spec import without

    options: dict[str, Any] = training.options_of(args, _WITHOUT)
    with training.saying_how_to_resume("compare", args.out, COMPARE_FILE, args.resume, launch):
        methods = without(args.methods, args.without)
        result = compare(methods, args.seeds, options, args.out, launch=launch, **training.mode(args))
    return _EXIT_LEFT_OUT if result["left_out"] else 0
