"""``lora-ext merge``: merges adapters into a checkpoint on disk."""

from __future__ import annotations

import argparse
from pathlib import Path

from lora_ext.checkpoints import merge
from lora_ext.commands.options import Parser, dtype, refusing, size
from lora_ext.commands.results import tell, to_json


def main(argv: list[str]) -> None:
    args = _parser().parse_args(argv)
    with refusing("", RuntimeError):
        report = merge(
            args.base,
            args.adapter,
            args.out,
            dtype=args.dtype,
            shard_bytes=args.shard_size,
            fan_in_fan_out=args.fan_in_fan_out,
            untie=args.untie,
            verify=args.verify,
            overwrite=args.overwrite,
            allow_pickle=args.allow_pickle,
            show_progress=True,
        )
    if args.json:
        print(to_json(report), end="")
        return
    added = f" ({report.added} of them new)" if report.added else ""
    tell(
        f"{args.out}: {report.merged} tensors merged, {report.replaced} replaced{added}, {report.copied} copied; "
        f"{report.nbytes / 1e9:.2f} GB in {report.files} files, {report.seconds:.1f} s"
        + (", verified" if report.verified else "")
    )
    if report.kept:
        tell(f"{report.kept} of the files were kept from a run that did not end")
    if report.skipped:
        tell(f"not copied, as they hold the base's weights: {', '.join(report.skipped)}")


def _parser() -> Parser:
    parser = Parser(
        prog="lora-ext merge",
        description=(
            "Merges adapters into a checkpoint of safetensors files, and holds some rows of a tensor in memory at a "
            "time. The same command continues a run that was killed."
        ),
    )
    add = parser.add_argument
    add("--base", type=Path, required=True, metavar="DIR", help="the checkpoint: a directory, or one safetensors file")
    add(
        "--adapter",
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
    add("--dtype", type=dtype, help="convert floating-point tensors: float32, bfloat16, float16 or float64")
    add("--shard-size", type=size, metavar="SIZE", help="largest size of a file (5GB); default: the base's files")
    add(
        "--fan-in-fan-out",
        action=argparse.BooleanOptionalAction,
        help="layout of square weights that no other weight decides: [in, out] as in Conv1D, or [out, in]",
    )
    add("--untie", action="store_true", help="store tied weights apart if the adapter changes one of them")
    add("--verify", action="store_true", help="read the result back and compare every bit with a second computation")
    add("--overwrite", action="store_true", help="replace the checkpoint in --out")
    add("--allow-pickle", action="store_true", help="read adapter_model.bin, if it holds only tensors")
    add("--json", action="store_true", help="print the report as JSON")
    return parser
