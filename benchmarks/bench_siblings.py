"""Measures LoRA layers that read one x (q/k/v), in one op and as separate layers, against their frozen bases.

    python benchmarks/bench_siblings.py [--dropout 0.1] [--rank 16] [--shapes 8192x4096x4096+1024+1024] [--write]

Layers on the same x, forward plus backward to x and the adapters, with autograd and Python. Contestants are timed
only if they agree on outputs and gradients (without dropout). A ratio compares the median with that of the frozen
layers (forward plus backward to x); the quartiles of the round-by-round ratios follow. The last column is the op's cost
beyond the frozen layers, divided by that of separate layers.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable, Iterable

import torch
from harness import contestants, report
from harness.contestants import ALPHA_OVER_R, FROZEN, training_step
from harness.report import Report
from harness.shapes import LLAMA_SIBLINGS, SIBLING_SHAPES, SiblingShape
from torch import Tensor, nn

from lora_ext import functional


class Separate(nn.Module):
    """Layers called one after the other."""

    def __init__(self, layers: Iterable[nn.Module]) -> None:
        super().__init__()
        self.layers = nn.ModuleList(layers)

    def forward(self, x: Tensor) -> list[Tensor]:
        return [layer(x) for layer in self.layers]


class Siblings(nn.Module):
    """Layers computed in one op."""

    def __init__(self, bases: list[nn.Linear], As: list[Tensor], Bs: list[Tensor], dropout: float) -> None:
        super().__init__()
        self.bases, self.dropout = bases, dropout
        self.lora_As = nn.ParameterList(A.clone() for A in As)
        self.lora_Bs = nn.ParameterList(B.clone() for B in Bs)

    def forward(self, x: Tensor) -> list[Tensor]:
        weights, biases = [base.weight for base in self.bases], [base.bias for base in self.bases]
        scalings = [ALPHA_OVER_R] * len(weights)
        return functional.lora_linear_siblings(
            x, weights, biases, list(self.lora_As), list(self.lora_Bs), scalings, self.dropout
        )


def separate(make: Callable[..., nn.Module]) -> Callable[..., nn.Module]:
    return lambda bases, As, Bs, dropout: Separate(
        make(base, A, B, dropout) for base, A, B in zip(bases, As, Bs, strict=True)
    )


CONTESTANTS: dict[str, Callable[..., nn.Module]] = {"siblings": Siblings} | {
    "separate" if name == contestants.LORA_EXT else name: separate(make) for name, make in contestants.LAYERS.items()
}


def measure(dtype: torch.dtype, shape: SiblingShape, run: Report) -> dict[str, object]:
    num_tokens, in_features, widths = shape
    args = run.args
    kwargs = {"dtype": dtype, "device": args.device}
    x = torch.randn(num_tokens, in_features, **kwargs).requires_grad_()
    grad_ys = [torch.randn(num_tokens, width, **kwargs) for width in widths]
    bases = [nn.Linear(in_features, width, **kwargs).requires_grad_(False) for width in widths]
    As = [torch.randn(args.rank, in_features, **kwargs) / in_features**0.5 for _ in widths]
    Bs = [torch.randn(width, args.rank, **kwargs) * 0.1 for width in widths]

    contestants.check_agreement({name: make(bases, As, Bs, 0.0) for name, make in CONTESTANTS.items()}, x, grad_ys)
    modules = {FROZEN: Separate(bases)} | {
        name: make(bases, As, Bs, args.dropout) for name, make in CONTESTANTS.items()
    }

    seconds = run.interleaved({name: lambda m=module: training_step(m, x, grad_ys) for name, module in modules.items()})
    median = {name: statistics.median(times) for name, times in seconds.items()}
    return {
        "shape": [num_tokens, in_features, *widths],
        "dropout": args.dropout,
        "dtype": report.dtype_name(dtype),
        **report.against(seconds, FROZEN),
        "overhead": (median["siblings"] - median[FROZEN]) / (median["separate"] - median[FROZEN]),
    }


def table(rows: list[dict]) -> str:
    names = report.names_in(rows)
    cells = (
        [
            str(SiblingShape(*row["shape"][:2], tuple(row["shape"][2:]))),
            row["dtype"],
            report.milliseconds(row["frozen_ms"]),
        ]
        + report.ratio_cells(row, names)
        + [f"{row['overhead']:.2f}"]
        for row in rows
    )
    return report.markdown(["tokens x in -> out of each", "dtype", "frozen, ms", *names, "overhead"], cells)


def main() -> None:
    parser = report.parser(__doc__, "siblings")
    report.add_shapes(parser, SiblingShape.parse, "TOKENSxINxOUT+OUT+OUT")
    parser.add_argument("--dropout", type=float, default=0.1)
    args = parser.parse_args()
    title = "Layers on one x, forward + backward against the frozen layers"
    run = Report(args, f"{title}, r={args.rank}, dropout {args.dropout}")
    cases = run.shape_cases(SIBLING_SHAPES)
    if run.on_cuda and not args.shapes:
        cases = [(torch.bfloat16, shape) for shape in LLAMA_SIBLINGS]
    rows = run.measure(cases, lambda case: [measure(*case, run)], table)
    run.finish(rows, table(rows))


if __name__ == "__main__":
    main()
