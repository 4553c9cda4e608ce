"""Measures the host time of one call of a layer (Python, autograd, dispatcher) against the frozen layer and PEFT.

    python benchmarks/bench_host.py [--device cpu] [--write]

One token and 64 features, where the arithmetic takes no time, in batches of 200 calls: microseconds of processor time
(not elapsed time: other processes matter less) on one thread. On a GPU, elapsed time with its launches, because
autograd launches from another thread; the kernels are shorter than that. The forward without autograd, and forward
plus backward (to x and the adapter; the frozen layer's to x) with and without dropout. A ratio is that of the medians;
the quartiles of the round-by-round ratios follow.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable

import torch
from harness import contestants, report
from harness.contestants import FROZEN, LAYERS, training_step
from harness.report import Report
from harness.shapes import Shape
from harness.timing import ratio

CALLS = 200
SHAPE = Shape(1, 64, 64)
PASSES = {"forward": 0.0, "forward + backward": 0.0, "forward + backward, dropout 0.1": 0.1}


def processor_time(call: Callable[[], object]) -> float:
    """Seconds of this thread for one call. The backward runs on the thread that asks for it."""
    begin = time.thread_time_ns()
    for _ in range(CALLS):
        call()
    return (time.thread_time_ns() - begin) / CALLS * 1e-9


def elapsed_time(call: Callable[[], object]) -> float:
    """Seconds of one call, without waiting for the GPU between calls."""
    torch.cuda.synchronize()
    begin = time.perf_counter()
    for _ in range(CALLS):
        call()
    seconds = time.perf_counter() - begin
    torch.cuda.synchronize()
    return seconds / CALLS


def main() -> None:
    parser = report.parser(__doc__, "host")
    parser.set_defaults(threads=1)
    args = parser.parse_args()
    run = Report(args, f"Host time of one call, {SHAPE}, r={args.rank}")
    # bfloat16 is the usual dtype of a GPU, and has other kernels than float32.
    options = {"dtype": torch.bfloat16 if run.on_cuda else torch.float32, "device": args.device}
    modules = contestants.on_same_weights(SHAPE, *options.values(), args.rank, {*PASSES.values()}, LAYERS)
    x, grad_y = torch.randn(1, 64, requires_grad=True, **options), torch.randn(1, 64, **options)
    contestants.check_agreement(modules[0.0], x, [grad_y])
    rows = []
    for what, dropout in run.cases(list(PASSES.items())):
        trains = what != "forward"
        calls = {
            name: (lambda m=m: training_step(m, x, [grad_y])) if trains else (lambda m=m: m(x))
            for name, m in modules[dropout].items()
        }
        with torch.set_grad_enabled(trains):
            seconds = run.interleaved(calls, clock=elapsed_time if run.on_cuda else processor_time)
        microseconds = {name: 1e6 * statistics.median(times) for name, times in seconds.items()}
        ratios = {name: ratio(times, seconds[FROZEN]) for name, times in seconds.items() if name != FROZEN}
        rows.append({"pass": what, "microseconds": microseconds, "ratio": ratios})
        run.save(rows)
    names = list(modules[0.0])
    cells = (
        [row["pass"]]
        + [f"{row['microseconds'][name]:.1f}" for name in names]
        + [report.ratio_cell(row["ratio"]["lora_ext"])]
        for row in rows
    )
    columns = ["microseconds a call", *names, "lora_ext, times frozen"]
    run.finish(rows, report.markdown(columns, cells))


if __name__ == "__main__":
    main()
