"""Measures layers with high ranks against PEFT and against the library's own skinny products.

    python benchmarks/bench_ranks.py [--ranks 64,256] [--shapes 1024x1024x1024] [--write]

Forward plus backward, to x and the adapter. "library" is the frozen layer with the skinny products by torch.mm, in one
autograd function, with PyTorch's dropout: a layer that leaves all products to the library. "operations" are those of a
layer with an adapter, times the frozen layer's. At the rate of the frozen layer's they would take "least / peft" of
PEFT's time.

One thread, processor time (not elapsed time: other processes matter less).
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable

import torch
from harness import contestants, report
from harness.contestants import ALPHA_OVER_R, FROZEN, LORA_EXT, training_step
from harness.report import Report
from harness.shapes import Shape
from harness.timing import ratio
from torch import Tensor, nn

SHAPES = [Shape(1024, 1024, 1024), Shape(1024, 2048, 2048), Shape(512, 4096, 4096)]
LIBRARY = "library"


class _LibraryProducts(torch.autograd.Function):
    """``base + ALPHA_OVER_R * dropout(x) @ A.T @ B.T``, its skinny products by torch.mm."""

    @staticmethod
    def forward(ctx, x: Tensor, base: nn.Linear, A: Tensor, B: Tensor, p: float) -> Tensor:
        dropped, kept = torch.native_dropout(x, p, True) if p else (x, None)
        xa = dropped @ A.T
        ctx.save_for_backward(dropped, A, B, xa, *([kept] if p else []))
        ctx.weight, ctx.p = base.weight, p
        return base(x).addmm_(xa, B.T, alpha=ALPHA_OVER_R)

    @staticmethod
    def backward(ctx, grad_y: Tensor) -> tuple[Tensor | None, ...]:
        dropped, A, B, xa, *kept = ctx.saved_tensors
        grad_xa = (grad_y @ B).mul_(ALPHA_OVER_R)
        grad_B = (grad_y.T @ xa).mul_(ALPHA_OVER_R)
        grad_A = grad_xa.T @ dropped
        grad_x = grad_y @ ctx.weight
        if ctx.p:
            grad_x.add_((grad_xa @ A).mul_(kept[0]), alpha=1 / (1 - ctx.p))
        else:
            grad_x.addmm_(grad_xa, A)
        return grad_x, None, grad_A, grad_B, None


class LibraryLayer(nn.Module):
    def __init__(self, base: nn.Linear, A: Tensor, B: Tensor, dropout: float) -> None:
        super().__init__()
        self.base, self.dropout = base, dropout
        self.lora_A, self.lora_B = nn.Parameter(A.clone()), nn.Parameter(B.clone())

    def forward(self, x: Tensor) -> Tensor:
        return _LibraryProducts.apply(x, self.base, self.lora_A, self.lora_B, self.dropout)


def processor_time(call: Callable[[], object]) -> float:
    begin = time.process_time()
    call()
    return time.process_time() - begin


def of_frozen(shape: Shape, rank: int) -> float:
    """Returns the operations of a layer with an adapter, times the frozen layer's (forward and backward)."""
    _, k, n = shape
    return 1 + 3 * rank * (k + n) / (2 * k * n)


def measure(shape: Shape, dtype: torch.dtype, rank: int, run: Report) -> list[dict]:
    names = {"peft": contestants.make_peft, LORA_EXT: contestants.make_lora_ext, LIBRARY: LibraryLayer}
    modules = contestants.on_same_weights(shape, dtype, "cpu", rank, [0.0, run.args.dropout], names)
    x = torch.randn(shape.num_tokens, shape.in_features, dtype=dtype).requires_grad_()
    grad_ys = [torch.randn(shape.num_tokens, shape.out_features, dtype=dtype)]
    contestants.check_agreement(modules[0.0], x, grad_ys)
    rows = []
    for dropout, by_name in modules.items():
        calls = {name: lambda m=m: training_step(m, x, grad_ys) for name, m in by_name.items()}
        seconds = run.interleaved(calls, parts=len(modules), clock=processor_time)
        row = {"shape": list(shape), "dtype": report.dtype_name(dtype), "rank": rank, "dropout": dropout}
        row |= {"operations": of_frozen(shape, rank), **report.against(seconds, FROZEN)}
        row["ours"] = {name: ratio(seconds[LORA_EXT], seconds[name]) for name in ("peft", LIBRARY)}
        row["least_of_peft"] = row["operations"] * statistics.median(
            a / b for a, b in zip(seconds[FROZEN], seconds["peft"], strict=True)
        )
        rows.append(row)
    return rows


def table(rows: list[dict]) -> str:
    columns = ["tokens x in -> out", "r", "dtype", "dropout", "frozen, ms", "operations", LORA_EXT, "peft", LIBRARY]
    columns += ["ours / peft", "least / peft", "ours / library"]
    cells = []
    for row in rows:
        cells.append(
            [str(Shape(*row["shape"])), str(row["rank"]), row["dtype"], f"{row['dropout']:g}"]
            + [report.milliseconds(row["frozen_ms"]), f"{row['operations']:.2f}"]
            + [f"{row['ratio'][name][0]:.2f}" for name in (LORA_EXT, "peft", LIBRARY)]
            + [report.ratio_cell(row["ours"]["peft"]), f"{row['least_of_peft']:.2f}"]
            + [report.ratio_cell(row["ours"][LIBRARY])]
        )
    return report.markdown(columns, cells)


def main() -> None:
    parser = report.parser(__doc__, "ranks")
    parser.set_defaults(threads=1)
    report.add_shapes(parser)
    parser.add_argument("--dropout", type=float, default=0.05)
    parser.add_argument("--ranks", type=lambda text: [int(rank) for rank in text.split(",")], default=[64, 128, 256])
    args = parser.parse_args()
    run = Report(args, "High ranks, forward + backward, times the frozen layer, processor time")
    cases = [(*case, rank) for case in run.shape_cases(SHAPES) for rank in args.ranks]
    rows = run.measure(cases, lambda case: measure(case[1], case[0], case[2], run), table)
    run.finish(rows, table(rows))


if __name__ == "__main__":
    main()
