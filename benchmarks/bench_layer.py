"""What does a LoRA linear layer cost beyond its frozen base, in inference and in training? Against it and the peers.

    python benchmarks/bench_layer.py [--device cpu] [--dropout 0.1] [--rank 16] [--shapes 512x768x3072] [--write]

Every contestant goes through its public module, autograd and Python included, on the same weights and inputs. They must
agree on outputs and gradients (without dropout) before any is timed. Three tables: the forward without autograd, and
forward plus backward (to x and the adapter) with and without dropout. A ratio is that of the medians to the frozen
layer's (its backward goes to x), with the quartiles of the round-by-round ratios behind it.

torch.compile of the hand-written layer is a contestant at some shapes; it takes seconds for each. On a GPU the time is
the one between two CUDA events with the second-level cache flushed before (timing.py).
"""

from __future__ import annotations

import json
import math
import statistics
from pathlib import Path

import torch
from harness import contestants, report
from harness.contestants import COMPILED, FROZEN, training_step
from harness.report import Report
from harness.shapes import CPU_SHAPES, CUDA_SHAPES, Shape
from harness.timing import ratio

FORWARD, TRAINING = "forward", "forward + backward"


def measure(shape: Shape, dtype: torch.dtype, run: Report, with_compile: bool) -> list[dict[str, object]]:
    """One row for each pass; the order is that of the tables."""
    dropouts = sorted({0.0, run.args.dropout})
    if with_compile:
        contestants.forget_compiled()
    makes = contestants.LAYERS | ({COMPILED: contestants.make_compiled} if with_compile else {})
    modules = contestants.on_same_weights(shape, dtype, run.args.device, run.args.rank, dropouts, makes)
    x = torch.randn(shape.num_tokens, shape.in_features, dtype=dtype, device=run.args.device).requires_grad_()
    grad_y = torch.randn(shape.num_tokens, shape.out_features, dtype=dtype, device=run.args.device)
    contestants.check_agreement(modules[0.0], x, [grad_y])

    calls = {(FORWARD, 0.0): {name: lambda m=m: m(x) for name, m in modules[0.0].items()}}
    for p in reversed(dropouts):
        calls[TRAINING, p] = {name: lambda m=m: training_step(m, x, [grad_y]) for name, m in modules[p].items()}
    rows = []
    for (what, dropout), of_contestants in calls.items():
        with torch.set_grad_enabled(what == TRAINING):
            seconds = run.interleaved(of_contestants, parts=len(calls))
        row: dict[str, object] = {"pass": what, "dropout": dropout}
        row |= {"shape": list(shape), "dtype": report.dtype_name(dtype), "rounds": len(seconds[FROZEN])}
        row["frozen_ms"] = 1e3 * statistics.median(seconds[FROZEN])
        row["ratio"] = {name: ratio(times, seconds[FROZEN]) for name, times in seconds.items() if name != FROZEN}
        rows.append(row)
    return rows


def table(rows: list[dict]) -> str:
    """A table for each pass, float32 first."""
    names, parts = report.names_in(rows), []
    rows = sorted(rows, key=lambda row: row["dtype"], reverse=True)
    for what, dropout in dict.fromkeys((row["pass"], row["dropout"]) for row in rows):
        of_pass = [row for row in rows if (row["pass"], row["dropout"]) == (what, dropout)]
        cells = (
            [str(Shape(*row["shape"])), row["dtype"], report.milliseconds(row["frozen_ms"])]
            + report.ratio_cells(row, names)
            for row in of_pass
        )
        columns = ["tokens x in -> out", "dtype", "frozen, ms", *names]
        title = what if what == FORWARD else f"{what}, dropout {dropout:g}"
        parts.append(f"{title}, times the frozen layer's:\n\n{report.markdown(columns, cells)}")
    return "\n\n".join(parts)


def main() -> None:
    parser = report.parser(__doc__, "layer")
    report.add_shapes(parser)
    parser.add_argument("--dropout", type=float, default=0.1)
    parser.add_argument("--no-compile", action="store_true", help="leave torch.compile out")
    parser.add_argument("--json", type=Path, help="also write the rows there, each as soon as it is measured")
    args = parser.parse_args()
    run = Report(args, f"One layer against the frozen layer, r={args.rank}")
    cases = [(dtype, shape) for dtype in (torch.float32, torch.bfloat16) for shape in args.shapes or CPU_SHAPES]
    cases.sort(
        key=lambda case: math.prod(case[1]) * case[0].itemsize
    )  # what quick cases leave of their time, slow ones use
    compiled = {CPU_SHAPES[1], CPU_SHAPES[3]} if not args.shapes else set(args.shapes)
    if run.on_cuda and not args.shapes:
        # The second dtype only at the first shape: there time is short, and the 16-bit types are what is used.
        cases = [(dtype, CUDA_SHAPES[0]) for dtype in (torch.bfloat16, torch.float16, torch.float32)]
        cases += [(torch.bfloat16, shape) for shape in CUDA_SHAPES[1:]]
        compiled = {CUDA_SHAPES[0]}
    rows: list[dict] = []
    for dtype, shape in run.cases(cases):
        rows += measure(shape, dtype, run, with_compile=shape in compiled and not args.no_compile)
        print(f"{shape}, {report.dtype_name(dtype)}: measured, {run.elapsed():.0f} s so far", flush=True)
        if args.json:
            args.json.write_text(json.dumps(rows, indent=1) + "\n")
    run.finish(rows, table(rows))


if __name__ == "__main__":
    main()
