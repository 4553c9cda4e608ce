"""Times the products of a LoRA layer one by one, without the base product and autograd.

    python benchmarks/bench_stages.py [--rank 16] [--threads 1] [--shapes 1536x384x384] [--device cpu] [--write]

Each stage calls the op ``lora_delta_`` or its backward for that stage only, so its time includes the op's overhead (the
column "op"). ``grad_A`` and ``grad_x`` include ``grad_xa``, as in training. "mask" is that of dropout 0.1; "forward"
and "backward" are all stages with it. Microseconds; GFLOP/s are the operations of the six skinny products by the sum of
the columns "forward" and "backward". benchmarks/NOTES.md predicts the times.
"""

from __future__ import annotations

import statistics

import torch
from harness import report
from harness.report import Report
from harness.shapes import Shape

SHAPES = [Shape(1536, 384, 384), Shape(512, 768, 768), Shape(1024, 2048, 2048)]
DROPOUT = 0.1


def stages(shape: Shape, dtype: torch.dtype, device: str, rank: int) -> dict[str, object]:
    """Returns the calls by name."""
    num_tokens, in_features, out_features = shape

    def random(*size: int) -> torch.Tensor:
        return torch.randn(*size, device=device).to(dtype)

    x, y, grad_y = random(num_tokens, in_features), random(num_tokens, out_features), random(num_tokens, out_features)
    A, B = random(rank, in_features) / in_features**0.5, random(out_features, rank) / 10
    seed = torch.tensor(0, device=device)
    narrow = 16  # features of a side that a stage does not measure
    x_narrow, y_narrow, A_narrow, B_narrow = (
        x[:, :narrow].contiguous(),
        y[:, :narrow].contiguous(),
        A[:, :narrow],
        B[:narrow],
    )
    ops = torch.ops.lora_ext
    mask = ops.lora_dropout_mask(seed, num_tokens, in_features, DROPOUT)
    xa = torch.randn(num_tokens, rank, device=device)

    def forward(y, x, A, B, p=0.0):
        return lambda: ops.lora_delta_.default(y, x, A, B, 1.0, p, seed if p else None)

    def backward(want_x, want_A, want_B, p=0.0):
        return lambda: ops.lora_linear_backward.default(
            grad_y, x, None, A, B, xa, mask if p else None, 1.0, p, (want_x, want_A, want_B)
        )

    return {
        "op": forward(y_narrow[:1], x_narrow[:1], A_narrow, B_narrow),
        "mask": lambda: ops.lora_dropout_mask(seed, num_tokens, in_features, DROPOUT),
        "shrink": forward(y_narrow, x, A, B_narrow),
        "expand": forward(y, x_narrow, A_narrow, B),
        "grad_B": backward(False, False, True),
        "grad_A": backward(False, True, False),
        "grad_x": backward(True, False, False),
        "forward": forward(y, x, A, B, DROPOUT),
        "backward": backward(True, True, True, DROPOUT),
    }


def measure(dtype: torch.dtype, shape: Shape, run: Report) -> dict[str, object]:
    with torch.no_grad():
        seconds = run.interleaved(stages(shape, dtype, run.args.device, run.args.rank))
    median = {name: statistics.median(times) for name, times in seconds.items()}
    flops = 6 * shape.num_tokens * run.args.rank * (shape.in_features + shape.out_features)
    return {
        "shape": list(shape),
        "dtype": report.dtype_name(dtype),
        "us": {name: 1e6 * value for name, value in median.items()},
        "gflop_s": flops / (median["forward"] + median["backward"]) / 1e9,
    }


def table(rows: list[dict]) -> str:
    names = list(rows[0]["us"])
    cells = (
        [
            str(Shape(*row["shape"])),
            row["dtype"],
            *(f"{row['us'][name]:.0f}" for name in names),
            f"{row['gflop_s']:.0f}",
        ]
        for row in rows
    )
    return report.markdown(["tokens x in -> out", "dtype", *names, "GFLOP/s"], cells)


def main() -> None:
    parser = report.parser(__doc__, "stages")
    report.add_shapes(parser)
    args = parser.parse_args()
    run = Report(args, f"The adapter's stages, r={args.rank}, microseconds")
    rows = [measure(*case, run) for case in run.cases(run.shape_cases(SHAPES))]
    run.finish(rows, table(rows))


if __name__ == "__main__":
    main()
