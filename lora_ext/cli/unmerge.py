"""``lora-ext unmerge``"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from pathlib import Path

from lora_ext._common.printable import listed
from lora_ext.cli import files

_EXIT_NOT_EXACT = 1


def add_parser(commands: argparse._SubParsersAction) -> None:
    parser = commands.add_parser(
        "unmerge",
        help="restore the base of a merged checkpoint",
        description=(
            "Restores every bit of the base from the record of `merge --record`, or writes nothing. Exits with 1 if a "
            "file next to the weights is not the base's any more. Without a record, --adapter subtracts the update, "
            "and the result is rounded."
        ),
    )
    add = parser.add_argument
    add("--merged", type=Path, required=True, metavar="DIR", help="the merged checkpoint")
    add(
        "--adapter",
        dest="adapters",
        type=Path,
        nargs="+",
        action="extend",
        default=[],
        metavar="DIR",
        help="subtract this adapter",
    )
    add("--out", type=Path, required=True, metavar="DIR", help="directory for the base; appears when it is complete")
    files.add_fan_in_fan_out(parser)
    files.add_writing(parser)
    parser.set_defaults(run=run)


def run(args: argparse.Namespace, parse_again: Callable[..., argparse.Namespace]) -> int:
    from lora_ext.checkpoints import unmerge

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
    not_restored = not report.exact and not args.adapters
    if args.json:
        files.print_json(report)
        return _EXIT_NOT_EXACT if not_restored else 0
    how = "restored to the bit" if not args.adapters else "unmerged by subtraction, rounded: not the base's bits"
    files.tell(
        f"{args.out}: {report.tensors} tensors {how}; {report.nbytes / 1e9:.2f} GB in {report.files} files, "
        f"{report.seconds:.1f} s"
    )
    if not_restored:
        files.tell(f"not exact, because other files are not those of the base:{listed(report.because)}")
    return _EXIT_NOT_EXACT if not_restored else 0
