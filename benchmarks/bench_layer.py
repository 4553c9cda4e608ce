"""Measures a LoRA linear layer and its peers against their frozen base, in inference and in training.

    python benchmarks/bench_layer.py [--device cpu] [--dropout 0.1] [--rank 16] [--shapes 512x768x3072]
        [--float32-factors] [--write]

Every contestant is its public module, with autograd and Python, on the same weights and inputs. Contestants are timed
only if they agree on outputs and gradients (without dropout). Three tables: the forward without autograd, and forward
plus backward (to x and the adapter) with and without dropout. A ratio compares the median with the frozen layer's (its
backward goes to x); the quartiles of the round-by-round ratios follow.

Rivals (--rivals: Unsloth, Axolotl, LoRAFusion) have tables of their own, without a bias and in bfloat16 only: they are
imported only there, because importing them changes PEFT.

torch.compile of the hand-written layer is a contestant at some shapes, because each takes seconds to compile. On a GPU
the time is that between two CUDA events, after a flush of the L2 cache (timing.py).
"""

from __future__ import annotations

import math

import torch
from harness import contestants, report, rivals
from harness.contestants import COMPILED, FROZEN, training_step
from harness.report import Report
from harness.shapes import CPU_SHAPES, CUDA_SHAPES, Shape
from torch import Tensor, nn

FORWARD, TRAINING = "forward", "forward + backward"


def measure(shape: Shape, dtype: torch.dtype, run: Report, with_compile: bool) -> list[dict[str, object]]:
    """Measures a shape; returns one row for each pass, in the order of the tables."""
    dropouts = sorted({0.0, run.args.dropout})
    if run.args.rivals:
        options = (shape, dtype, run.args.device, run.args.rank)
        modules = rivals.on_same_weights(*options, dropouts, run.args.rivals)
        return rows_of(shape, dtype, run, modules)
    if with_compile:
        contestants.forget_compiled()
    makes = contestants.LAYERS | ({COMPILED: contestants.make_compiled} if with_compile else {})
    if run.args.float32_factors and dtype.itemsize == 2:
        for name in (name for name in (contestants.LORA_EXT, "peft") if name in contestants.LAYERS):
            makes[f"{name}, float32 factors"] = contestants.with_float32_factors(contestants.LAYERS[name])
    modules = contestants.on_same_weights(shape, dtype, run.args.device, run.args.rank, dropouts, makes)
    x, grad_ys = random_x_and_grad_y(shape, dtype, run)
    if with_compile and (reason := contestants.why_not_compiled([m[COMPILED] for m in modules.values()], x, grad_ys)):
        print(f"{COMPILED}: not measured at {shape}, {reason}", flush=True)
        for by_contestant in modules.values():
            del by_contestant[COMPILED]
    contestants.check_agreement(modules[0.0], x, grad_ys)
    return rows_of(shape, dtype, run, modules)


def random_x_and_grad_y(shape: Shape, dtype: torch.dtype, run: Report) -> tuple[Tensor, list[Tensor]]:
    x = torch.randn(shape.num_tokens, shape.in_features, dtype=dtype, device=run.args.device).requires_grad_()
    return x, [torch.randn(shape.num_tokens, shape.out_features, dtype=dtype, device=run.args.device)]


def rows_of(
    shape: Shape, dtype: torch.dtype, run: Report, modules: dict[float, dict[str, nn.Module]]
) -> list[dict[str, object]]:
    """Measures the modules. modules: by dropout, then by contestant."""
    dropouts = sorted(modules)
    x, grad_ys = random_x_and_grad_y(shape, dtype, run)
    calls = {(FORWARD, 0.0): {name: lambda m=m: m(x) for name, m in modules[0.0].items()}}
    for p in reversed(dropouts):
        calls[TRAINING, p] = {name: lambda m=m: training_step(m, x, grad_ys) for name, m in modules[p].items()}
    rows = []
    for (what, dropout), by_contestant in calls.items():
        with torch.set_grad_enabled(what == TRAINING):
            seconds = run.interleaved(by_contestant, parts=len(calls))
        row: dict[str, object] = {"pass": what, "dropout": dropout}
        row |= {"shape": list(shape), "dtype": report.dtype_name(dtype), **report.against(seconds, FROZEN)}
        rows.append(row)
    return rows


def table(rows: list[dict]) -> str:
    """Formats a table for each pass, float32 first."""
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
    parser.add_argument("--float32-factors", action="store_true", help="add 16-bit layers with float32 factors")
    parser.add_argument(
        "--rivals",
        action="store_true",
        help="measure the rivals that are installed (harness/rivals.py) in place of PEFT",
    )
    args = parser.parse_args()
    run = Report(args, f"One layer against the frozen layer, r={args.rank}")
    cases = run.shape_cases(CPU_SHAPES)
    # Quick cases first: slow ones use the time that they leave.
    cases.sort(key=lambda case: math.prod(case[1]) * case[0].itemsize)
    compiled = {CPU_SHAPES[1], CPU_SHAPES[3]} if not args.shapes else set(args.shapes)
    if run.on_cuda and not args.shapes:
        # Other dtypes only at the first shape: time is short, and bfloat16 is the usual dtype.
        cases = [(dtype, CUDA_SHAPES[0]) for dtype in (torch.bfloat16, torch.float16, torch.float32)]
        cases += [(torch.bfloat16, shape) for shape in CUDA_SHAPES[1:]]
        compiled = {CUDA_SHAPES[0]}
    if args.rivals:
        args.rivals = rivals.load_all()
        cases = [(dtype, shape) for dtype, shape in cases if dtype == torch.bfloat16][: None if args.shapes else 3]
        if not args.rivals:
            print("no rival can be measured")
            return
    rows: list[dict] = []
    for dtype, shape in run.cases(cases):
        rows += measure(shape, dtype, run, with_compile=shape in compiled and not args.no_compile)
        print(f"{shape}, {report.dtype_name(dtype)}: measured, {run.elapsed():.0f} s so far", flush=True)
        run.save(rows)
    run.finish(rows, table(rows))


if __name__ == "__main__":
    main()
