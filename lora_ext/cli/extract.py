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
        help="make an adapter of the difference of two checkpoints",
        description=(
            "Approximates what fine-tuning changed by matrices of low rank, and says how much is left at each rank."
        ),
        formatter_class=HelpFormatter,
    )
    add = parser.add_argument
    add("--base", type=Path, required=True, metavar="DIR", help="the checkpoint that was tuned")
    add("--tuned", type=Path, required=True, metavar="DIR", help="what became of it")
    add("--out", type=Path, required=True, metavar="DIR", help="gets the adapter, in PEFT's format, and extract.json")
    add("--r", type=int, default=16, metavar="RANK", help="of the adapter; at most")
    add(
        "--energy",
        type=float,
        metavar="PART",
        help="smallest rank of each layer that keeps this part of the square norm",
    )
    add("--target-modules", metavar="NAMES", help="layers to adapt: q_proj,v_proj; else all matrices but embeddings")
    add("--no-save-others", action="store_true", help="other differences are an error; else saved in full")
    add("--fan-in-fan-out", action="store_true", help="matrices are [in, out], as in Conv1D of GPT-2")
    add("--dtype", type=files.dtype, default="float32", help="of the factors: float32, bfloat16 or float16")
    add("--overwrite", action="store_true", help="replace the adapter in --out")
    add("--json", action="store_true", help="print what was found as JSON")
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
            target_modules=None if args.target_modules is None else args.target_modules.split(","),
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
