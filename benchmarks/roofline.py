"""Measures how close the layer is to the machine's memory and product rates.

    python benchmarks/roofline.py [--shapes 512x768x768] [--memory-mib 1024] [--device cpu] [--write]

The ceilings are measured in the same run: the rates of a large copy (bytes read plus written), a large read, a copy
within the cache, and a large product in each dtype. A point is an operation on a layer with an adapter: its
floating-point operations, the bytes it must move (every operand and result once), and its time. "of ceiling" divides
its rate of operations by the roofline at its operations per byte: the product's rate, or the bytes at the large copy's
rate. Decoding goes through a stack of layers larger than the caches, as in bench_decode.py; the operands of the other
operations can be in the cache, which is faster than the large copy.
"""

from __future__ import annotations

import statistics
from dataclasses import dataclass

import torch
from bench_decode import STACK_MIB, Stack
from harness import ceilings, contestants, report
from harness.contestants import FROZEN, LORA_EXT, training_step
from harness.report import Report
from harness.shapes import CPU_SHAPES, CUDA_SHAPES, Shape

FORWARD, TRAINING, DECODE, MERGE = "forward", "forward + backward", "decode", "merge"
DECODE_SHAPES = [Shape(1, 4096, 4096), Shape(64, 4096, 4096)]
DROPOUT = 0.1


@dataclass(frozen=True)
class Work:
    flops: int
    bytes: int


def work(what: str, shape: Shape, rank: int, item: int, adapted: bool) -> Work:
    """Counts the operation's work. item: bytes of an element. The dropout's mask, a bit an element, is not counted."""
    tokens, features, outputs = shape
    x, y, weight = tokens * features, tokens * outputs, features * outputs
    r = rank if adapted else 0
    factors, skinny = r * (features + outputs), 2 * r * tokens * (features + outputs)
    if what == MERGE:
        return Work(2 * rank * weight, item * (2 * weight + factors))
    if what in (FORWARD, DECODE):
        return Work(2 * tokens * weight + skinny, item * (x + weight + y + factors))
    # Backward: grad_y and the weight give grad_x; an adapter also reads x again and writes the factors' gradients.
    backward = y + weight + x + (x + 2 * factors if adapted else 0)
    return Work(4 * tokens * weight + 3 * skinny, item * (x + weight + y + factors + backward))


def measure_ceilings(run: Report) -> dict[str, float]:
    """Measures bytes and floating-point operations a second."""
    args, clock = run.args, run.clock
    rates = {"copy": ceilings.copy_rate(args.memory_mib << 20, args.device, clock)}
    rates["read"] = ceilings.read_rate(args.memory_mib << 20, args.device, clock)
    if not run.on_cuda:  # the GPU's clock empties its cache
        rates["copy_in_cache"] = ceilings.copy_rate(args.cache_kib << 10, args.device, clock)
    for dtype in (torch.float32, torch.bfloat16):
        name = f"matrix_{report.dtype_name(dtype)}"
        rates[name] = ceilings.matrix_rate(dtype, args.matrix, args.device, clock)
    return rates


def measure(what: str, shape: Shape, dtype: torch.dtype, run: Report, rates: dict[str, float]) -> list[dict]:
    rank, device = run.args.rank, run.args.device
    makes = {LORA_EXT: contestants.make_lora_ext}
    x = torch.randn(shape.num_tokens, shape.in_features, dtype=dtype, device=device)
    if what == DECODE:
        stack = Stack(shape[1:], dtype, device, rank, run.args.stack_mib, makes)
        return rows_of(what, shape, dtype, rank, stack.seconds(x, run), rates)
    dropout = DROPOUT if what == TRAINING else 0.0
    modules = contestants.on_same_weights(shape, dtype, device, rank, [dropout], makes)[dropout]
    grad_y = torch.randn(shape.num_tokens, shape.out_features, dtype=dtype, device=device)
    if what == MERGE:
        layer = modules[LORA_EXT].eval()

        def clock(call) -> float:  # times the merge only
            seconds = run.clock(call)
            layer.unmerge()
            return seconds

        seconds = run.interleaved({LORA_EXT: layer.merge}, clock=clock)
    elif what == FORWARD:
        with torch.no_grad():
            seconds = run.interleaved({name: lambda m=module: m(x) for name, module in modules.items()})
    else:
        x.requires_grad_()
        calls = {name: lambda m=module: training_step(m, x, [grad_y]) for name, module in modules.items()}
        seconds = run.interleaved(calls)
    return rows_of(what, shape, dtype, rank, seconds, rates)


def rows_of(
    what: str, shape: Shape, dtype: torch.dtype, rank: int, seconds: dict[str, list[float]], rates: dict[str, float]
) -> list[dict]:
    rows = []
    for name, times in seconds.items():
        needed, median = work(what, shape, rank, dtype.itemsize, name != FROZEN), statistics.median(times)
        intensity = needed.flops / needed.bytes
        ceiling = min(rates[f"matrix_{report.dtype_name(dtype)}"], intensity * rates["copy"])
        rows.append(
            {
                "what": what,
                "contestant": name,
                "shape": list(shape),
                "dtype": report.dtype_name(dtype),
                "rounds": len(times),
                "ms": 1e3 * median,
                "flops_per_byte": intensity,
                "flop_s": needed.flops / median,
                "byte_s": needed.bytes / median,
                "of_ceiling": needed.flops / median / ceiling,
            }
        )
    return rows


def table(rows: list[dict], rates: dict[str, float]) -> str:
    matrix = {name.removeprefix("matrix_"): rate for name, rate in rates.items() if name.startswith("matrix_")}
    moved = (f"{name.replace('_', ' ')} {rate / 1e9:.1f} GB/s" for name, rate in rates.items() if "matrix" not in name)
    products = (f"{name} {rate / 1e9:.0f} GFLOP/s" for name, rate in matrix.items())
    cells = (
        [row["what"], str(Shape(*row["shape"])), row["dtype"], row["contestant"], report.milliseconds(row["ms"])]
        + [f"{row['flops_per_byte']:.1f}", f"{row['flop_s'] / 1e9:.1f}", f"{row['byte_s'] / 1e9:.1f}"]
        + [f"{row['of_ceiling']:.0%}"]
        for row in rows
    )
    columns = ["operation", "tokens x in -> out", "dtype", "contestant", "ms", "FLOP/byte", "GFLOP/s", "GB/s"]
    ceilings_line = f"Ceilings: {', '.join(moved)}; products: {', '.join(products)}."
    return f"{ceilings_line}\n\n{report.markdown([*columns, 'of ceiling'], cells)}"


def main() -> None:
    parser = report.parser(__doc__, "roofline")
    report.add_shapes(parser)
    parser.add_argument("--memory-mib", type=int, default=1024, help="MiB of the large copy")
    parser.add_argument("--cache-kib", type=int, default=512, help="KiB of the copy within the cache")
    parser.add_argument("--stack-mib", type=report.at_least(1), default=STACK_MIB, help="as in bench_decode.py")
    parser.add_argument("--matrix", type=int, default=2048, help="rows and columns of the large product")
    args = parser.parse_args()
    if args.device == "cuda":
        args.matrix = max(args.matrix, 8192)
    run = Report(args, f"Achieved rates against the machine's ceilings, r={args.rank}, dropout {DROPOUT} in training")
    rates = measure_ceilings(run)
    shapes = args.shapes or (CUDA_SHAPES[:3] if run.on_cuda else CPU_SHAPES[1:4])
    operations = [(what, shape) for shape in shapes for what in (FORWARD, TRAINING)]
    small = [args.shapes[0]] if args.shapes else DECODE_SHAPES
    operations += [(DECODE, shape) for shape in small] + [(MERGE, small[0])]
    cases = [(*operation, dtype) for operation in operations for dtype in (torch.float32, torch.bfloat16)]
    rows = run.measure(cases, lambda case: measure(*case, run, rates), lambda rows: table(rows, rates))
    run.finish(rows, table(rows, rates), ceilings=rates)


if __name__ == "__main__":
    main()
