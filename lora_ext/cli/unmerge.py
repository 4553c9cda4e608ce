"""``lora-ext unmerge``"""

from __future__ import annotations

import argparse
import dataclasses
import json
from collections.abc import Callable
from pathlib import Path

from . import files


def add_parser(commands: argparse._SubParsersAction) -> None:
    parser = commands.add_parser(
        "unmerge",
        help="restore the base of a merged checkpoint",
        description=(
            "Restores every bit of the base from what `merge --record` kept. Without a record, --adapter subtracts the "
            "update, which is rounded."
        ),
    )
    add = parser.add_argument
    add("--merged", type=Path, required=True, metavar="DIR", help="the merged checkpoint")
    add("--adapter", dest="adapters", type=Path, nargs="+", action="extend", default=[], metavar="DIR", help="subtract")
    add("--out", type=Path, required=True, metavar="DIR", help="gets the base, when it is complete")
    files.add_fan_in_fan_out(parser)
    files.add_writing(parser)
    parser.set_defaults(run=run)


def run(args: argparse.Namespace, parse_again: Callable[..., argparse.Namespace]) -> None:
    from ..offline.unmerge import unmerge

    with files.mistakes():
        report = unmerge(
            args.merged,
            args.out,
            adapters=args.adapters,
            fan_in_fan_out=args.fan_in_fan_out,
            verify=args.verify,
            overwrite=args.overwrite,
            allow_pickle=args.allow_pickle,
            show_progress=True,
        )
    if args.json:
        print(json.dumps(dataclasses.asdict(report), indent=2))
        return
    how = "restored to the bit" if report.exact else "unmerged by subtraction, rounded: not the base's bits"
    print(
        f"{args.out}: {report.tensors} tensors {how}; {report.nbytes / 1e9:.2f} GB in {report.files} files, "
        f"{report.seconds:.1f} s"
    )
