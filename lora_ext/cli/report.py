"""``lora-ext report``"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from pathlib import Path

from lora_ext.cli import files, training


def add_parser(commands: argparse._SubParsersAction) -> None:
    parser = commands.add_parser(
        "report",
        help="show the results of finetune, compare, sweep, analyze and plan on one HTML page",
        description="Shows the results of finetune, compare, sweep, analyze and plan in a directory and below on one "
        "HTML page, which needs no other file and no network.",
    )
    add = parser.add_argument
    add("directory", type=Path, metavar="DIR", help="--out of one of these commands, or a directory with several")
    add(
        "--out",
        type=Path,
        metavar="FILE",
        help="the page; replaces an earlier report (default: DIR/report.html)",
    )
    add("--title", metavar="TEXT", help="title of the page (default: the directory's name)")
    parser.set_defaults(run=run)


def run(args: argparse.Namespace, parse_again: Callable[..., argparse.Namespace]) -> None:
    training.check_installed("report", "report", ["jinja2", "matplotlib"])
    from lora_ext.tasks.report import write_report

    write_report(args.directory, args.out, args.title, say=files.say)
