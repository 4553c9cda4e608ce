"""Measures how the cost of an adapter grows with its rank, the tokens of a batch, and the width of the layer.

    python benchmarks/bench_curves.py [--rank 16] [--tokens 512] [--width 1024] [--of-rank 4,64] [--write]

Forward plus backward (to x and the adapter) of square layers, measured as in bench_layer.py. One of the three sizes
varies (over ``--of-rank``, ``--of-tokens``, ``--of-width``); the others stay at ``--rank``, ``--tokens`` and
``--width``. A ratio compares the median with the frozen layer's; the quartiles of the round-by-round ratios follow.
"""

from __future__ import annotations

import torch
from harness import contestants, report
from harness.contestants import FROZEN, training_step
from harness.report import Report
from harness.shapes import Shape

COMPARED = ("lora_ext", "peft")
VALUES = {
    "rank": [4, 8, 16, 32, 64, 128, 256],
    "tokens": [16, 64, 256, 1024, 4096],
    "width": [256, 512, 1024, 2048, 4096],
}


def measure(sizes: dict[str, int], axis: str, dtype: torch.dtype, run: Report) -> dict[str, object]:
    """Measures one point of a curve. sizes: rank, tokens and width; axis: the one that varies."""
    shape, dropout = Shape(sizes["tokens"], sizes["width"], sizes["width"]), run.args.dropout
    makes = {name: contestants.LAYERS[name] for name in COMPARED if name in contestants.LAYERS}
    modules = contestants.on_same_weights(shape, dtype, run.args.device, sizes["rank"], {0.0, dropout}, makes)
    x = torch.randn(shape.num_tokens, shape.in_features, dtype=dtype, device=run.args.device).requires_grad_()
    grad_y = torch.randn(shape.num_tokens, shape.out_features, dtype=dtype, device=run.args.device)
    contestants.check_agreement(modules[0.0], x, [grad_y])
    calls = {name: lambda m=m: training_step(m, x, [grad_y]) for name, m in modules[dropout].items()}
    seconds = run.interleaved(calls)
    return {
        "axis": axis,
        **sizes,
        "dtype": report.dtype_name(dtype),
        **report.against(seconds, FROZEN),
    }


def table(rows: list[dict]) -> str:
    names = report.names_in(rows)
    rows = sorted(rows, key=lambda row: row["dtype"], reverse=True)
    cells = (
        [row["axis"], row["dtype"], *(str(row[size]) for size in VALUES), report.milliseconds(row["frozen_ms"])]
        + report.ratio_cells(row, names)
        for row in rows
    )
    return report.markdown(["varied", "dtype", *VALUES, "frozen, ms", *names], cells)


def main() -> None:
    parser = report.parser(__doc__, "curves")
    parser.add_argument("--dropout", type=float, default=0.1)
    parser.add_argument("--tokens", type=int, default=512)
    parser.add_argument("--width", type=int, default=1024)
    for axis, values in VALUES.items():
        parser.add_argument(f"--of-{axis}", type=lambda text: [int(part) for part in text.split(",")], default=values)
    args = parser.parse_args()
    run = Report(args, f"Forward + backward against the frozen layer, one size varied, dropout {args.dropout}")
    fixed = {axis: getattr(args, axis) for axis in VALUES}
    cases = [
        (fixed | {axis: value}, axis, dtype)
        for axis in VALUES
        for value in getattr(args, f"of_{axis}")
        for dtype in (torch.float32, torch.bfloat16)
    ]
    rows = run.measure(cases, lambda case: [measure(*case, run)], table)
    run.finish(rows, table(rows), fixed=fixed)


if __name__ == "__main__":
    main()
