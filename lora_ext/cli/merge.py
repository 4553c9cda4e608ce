"""``lora-ext merge``"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from pathlib import Path

from lora_ext.cli import files


def add_parser(commands: argparse._SubParsersAction) -> None:
    parser = commands.add_parser(
        "merge",
        help="merge adapters into a checkpoint on disk",
        description=(
            "Merges adapters into a checkpoint of safetensors files, and holds some rows of a tensor in memory at a "
            "time. The same command continues a run that was killed."
        ),
    )
    add = parser.add_argument
    add("--base", type=Path, required=True, metavar="DIR", help="the checkpoint: a directory, or one safetensors file")
    add(
        "--adapter",
        dest="adapters",
        type=Path,
        required=True,
        nargs="+",
        action="extend",
        metavar="DIR",
        help="in PEFT's format; several are added in this order, and the sum is rounded once",
    )
    add(
        "--out",
        type=Path,
        required=True,
        metavar="DIR",
        help="directory for the merged checkpoint; appears when it is complete",
    )
    add("--dtype", type=files.dtype, help="convert floating-point tensors: float32, bfloat16, float16 or float64")
    add("--shard-size", type=files.size, metavar="SIZE", help="largest size of a file (5GB); default: the base's files")
    files.add_fan_in_fan_out(parser)
    add("--untie", action="store_true", help="store tied weights apart if the adapter changes one of them")
    add("--record", action="store_true", help="keep the bits that rounding loses in OUT/merge_record, for unmerge")
    files.add_writing(parser)
    parser.set_defaults(run=run)


def run(args: argparse.Namespace, parse_again: Callable[..., argparse.Namespace]) -> None:
    from lora_ext.checkpoints import merge

    with files.mistakes():
        report = merge(
            args.base,
            args.adapters,
            args.out,
            dtype=args.dtype,
            shard_bytes=args.shard_size,
            fan_in_fan_out=args.fan_in_fan_out,
            untie=args.untie,
            record=args.record,
            verify=args.verify,
            overwrite=args.overwrite,
            allow_pickle=args.allow_pickle,
            show_progress=True,
        )
    if args.json:
        files.print_json(report)
        return
    added = f" ({report.added} of them new)" if report.added else ""
    files.tell(
        f"{args.out}: {report.merged} tensors merged, {report.replaced} replaced{added}, {report.copied} copied; "
        f"{report.nbytes / 1e9:.2f} GB in {report.files} files, {report.seconds:.1f} s"
        + (", verified" if report.verified else "")
    )
    if report.kept:
        files.tell(f"{report.kept} of the files were kept from a run that did not end")
    if report.skipped:
        files.tell(f"not copied, as they hold the base's weights: {', '.join(report.skipped)}")
