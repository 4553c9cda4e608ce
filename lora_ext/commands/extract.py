"""``lora-ext extract``: makes an adapter from the difference of two checkpoints."""

from __future__ import annotations

from pathlib import Path

from lora_ext.checkpoints import extract
from lora_ext.commands.options import Parser, dtype, refusing
from lora_ext.commands.results import columns, tell, to_json


def main(argv: list[str]) -> None:
    parser = Parser(
        prog="lora-ext extract",
        description="Approximates the changes of fine-tuning by low-rank matrices, and shows the errors.",
    )
    add = parser.add_argument
    add("--base", type=Path, required=True, metavar="DIR", help="the checkpoint before fine-tuning")
    add("--tuned", type=Path, required=True, metavar="DIR", help="the checkpoint after fine-tuning")
    add("--out", type=Path, required=True, metavar="DIR", help="new directory for the adapter, in PEFT's format")
    add("--r", type=int, default=16, dest="rank", metavar="RANK", help="rank of the layers")
    add("--fan-in-fan-out", action="store_true", help="matrices are [in, out], as in Conv1D of GPT-2")
    add("--dtype", type=dtype, default="float32", help="dtype of the factors: float32, bfloat16 or float16")
    add("--normalise", action="store_true", help="one rank for all layers, for engines that read no rank_pattern")
    add("--json", action="store_true", help="print the result as JSON")
    options = vars(parser.parse_args(argv))
    as_json = options.pop("json")
    with refusing(""):
        report = extract(**options, show_progress=True)
    if as_json:
        print(to_json(report), end="")
        return
    rows = [["layer", "r", "norm", "relative error"]]
    rows += [[path, str(one.r), f"{one.norm:.3g}", f"{one.error:.2e}"] for path, one in report.layers.items()]
    tell(columns([*rows, ["all", "", "", f"{report.error:.2e}"]]))
    saved = f", saved in full: {', '.join(report.saved)}" if report.saved else ""
    tell(
        f"{options['out']}: {len(report.layers)} layers adapted{saved}; {report.unchanged} tensors do not differ; "
        f"{report.nbytes / 1e6:.1f} MB, {report.seconds:.1f} s"
    )
