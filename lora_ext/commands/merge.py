"""``lora-ext merge``: merges adapters into a checkpoint on disk."""

from __future__ import annotations

import argparse
from pathlib import Path

from lora_ext.checkpoints import merge
from lora_ext.commands.options import Parser, dtype, refusing
from lora_ext.commands.results import tell, to_json
from lora_ext.merging.errors import poorly_kept


def main(argv: list[str]) -> None:
    parser = Parser(
        prog="lora-ext merge",
        description="Merges adapters into a checkpoint of safetensors files, and holds 8 MB of it in memory at a time.",
    )
    add = parser.add_argument
    add("--base", type=Path, required=True, metavar="DIR", help="the checkpoint: a directory, or one safetensors file")
    several = {"nargs": "+", "action": "extend", "dest": "adapters", "metavar": "DIR"}
    text = "in PEFT's format; several are added in this order, and the sum is rounded once"
    add("--adapter", type=Path, required=True, **several, help=text)
    add("--weights", type=float, nargs="+", metavar="W", help="factor of each adapter's updates; default: 1")
    add("--out", type=Path, required=True, metavar="DIR", help="new directory; appears when it is complete")
    add("--dtype", type=dtype, help="convert floating-point tensors: float32, bfloat16, float16 or float64")
    text = "layout of square weights that no other weight decides: [in, out] as in Conv1D, or [out, in]"
    add("--fan-in-fan-out", action=argparse.BooleanOptionalAction, help=text)
    text = "stochastic: up or down at random, which keeps updates that are small against the weights' resolution"
    add("--rounding", choices=("nearest", "stochastic"), default="nearest", help=text)
    add("--seed", type=int, default=0, metavar="N", help="of --rounding stochastic (default: 0)")
    add("--json", action="store_true", help="print the report as JSON")
    options = vars(parser.parse_args(argv))
    as_json = options.pop("json")
    with refusing(""):
        report = merge(**options, show_progress=True)
    if as_json:
        print(to_json(report), end="")
        return
    added = f" ({report.added} of them new)" if report.added else ""
    tell(
        f"{options['out']}: {report.merged} tensors merged, {report.replaced} replaced{added}, {report.copied} copied; "
        f"{report.nbytes / 1e9:.2f} GB in {report.files} files, {report.seconds:.1f} s"
    )
    remedy = "--rounding stochastic keeps it in the mean, and --dtype float32 whole"
    if line := poorly_kept(report.kept, remedy):
        tell(line)
    if report.skipped:
        tell(f"not copied, as they hold the base's weights: {', '.join(report.skipped)}")
