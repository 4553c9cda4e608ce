"""``lora-ext extract``"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from pathlib import Path

from lora_ext.cli import files
from lora_ext.cli.formatter import HelpFormatter


def add_parser(commands: argparse._SubParsersAction) -> None:
    parser = commands.add_parser(
        "extract",
        help="make an adapter from the difference of two checkpoints",
        description=(
            "Approximates the changes of fine-tuning by matrices of low rank, and shows the error at each rank."
        ),
        formatter_class=HelpFormatter,
    )
    add = parser.add_argument
    add("--base", type=Path, required=True, metavar="DIR", help="the checkpoint before fine-tuning")
    add("--tuned", type=Path, required=True, metavar="DIR", help="the checkpoint after fine-tuning")
    add(
        "--out",
        type=Path,
        required=True,
        metavar="DIR",
        help="directory for the adapter, in PEFT's format, and extract.json",
    )
    add("--r", type=int, default=16, metavar="RANK", help="largest rank of a layer")
    add(
        "--energy",
        type=float,
        metavar="PART",
        help="give each layer the smallest rank that keeps this part of the squared norm",
    )
    add(
        "--target-modules",
        metavar="NAMES",
        help="layers to adapt: q_proj,v_proj; default: all matrices except embeddings",
    )
    add("--no-save-others", action="store_true", help="make other differences an error; default: save them in full")
    add("--fan-in-fan-out", action="store_true", help="matrices are [in, out], as in Conv1D of GPT-2")
    add("--dtype", type=files.dtype, default="float32", help="dtype of the factors: float32, bfloat16 or float16")
    add("--overwrite", action="store_true", help="replace the adapter in --out")
    add("--json", action="store_true", help="print the result as JSON")
    parser.set_defaults(run=run)


def run(args: argparse.Namespace, parse_again: Callable[..., argparse.Namespace]) -> None:
    from lora_ext.checkpoints import extract

    with files.mistakes():
        report = extract(
            args.base,
            args.tuned,
            args.out,
            rank=args.r,
            energy=args.energy,
            target_modules=args.target_modules and [name.strip() for name in args.target_modules.split(",")],
            save_others=not args.no_save_others,
            fan_in_fan_out=args.fan_in_fan_out,
            dtype=args.dtype,
            overwrite=args.overwrite,
            show_progress=True,
        )
    if args.json:
        files.print_json(report)
        return
    ranks = list(report.errors)
    rows = [["relative error at rank", *map(str, ranks)]]
    for path, layer in report.layers.items():
        rows.append([path, *(f"{layer.errors[rank]:.2e}" if rank in layer.errors else "" for rank in ranks)])
    rows.append(["all", *(f"{error:.2e}" for error in report.errors.values())])
    files.tell(files.table(rows))
    saved = f", saved in full: {', '.join(report.saved)}" if report.saved else ""
    files.tell(
        f"{args.out}: {len(report.layers)} layers adapted{saved}; {report.unchanged} tensors do not differ; "
        f"{report.nbytes / 1e6:.1f} MB, {report.seconds:.1f} s"
    )
