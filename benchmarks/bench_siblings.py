"""Measures LoRA layers that read one x (q/k/v), in one op and as separate layers, against their frozen bases.

    python benchmarks/bench_siblings.py [--dropout 0.1] [--rank 16] [--shapes 8192x4096x4096+1024+1024] [--write]

Layers on the same x, forward plus backward to x and the adapters, with autograd and Python. Contestants are timed
only if they agree on outputs and gradients (without dropout). A ratio compares the median with that of the frozen
layers (forward plus backward to x); the quartiles of the round-by-round ratios follow. The last column is the op's cost
beyond the frozen layers, divided by that of separate layers.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable

import torch
from harness import contestants, siblings
from harness.contestants import ALPHA_OVER_R, FROZEN
from harness.report import Report
from harness.shapes import SiblingShape
from harness.siblings import Row, Separate
from torch import Tensor, nn

from lora_ext import functional


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


def measure(dtype: torch.dtype, shape: SiblingShape, run: Report) -> Row:
    args, in_features, widths = run.args, shape.in_features, shape.out_features
    kwargs = {"dtype": dtype, "device": args.device}
    frozen, x, grad_ys = siblings.frozen_case(dtype, shape, args.device)
    bases = list(frozen.layers)
    As = [torch.randn(args.rank, in_features, **kwargs) / in_features**0.5 for _ in widths]
    Bs = [torch.randn(width, args.rank, **kwargs) * 0.1 for width in widths]

    contestants.check_agreement({name: make(bases, As, Bs, 0.0) for name, make in CONTESTANTS.items()}, x, grad_ys)
    modules = {FROZEN: frozen} | {name: make(bases, As, Bs, args.dropout) for name, make in CONTESTANTS.items()}

    seconds = siblings.training_seconds(run, modules, x, grad_ys)
    median = {name: statistics.median(times) for name, times in seconds.items()}
    overhead = (median["siblings"] - median[FROZEN]) / (median["separate"] - median[FROZEN])
    return siblings.row(dtype, shape, run, seconds) | {"overhead": overhead}


def table(rows: list[Row]) -> str:
    return siblings.table(rows, ["overhead"], lambda row: [f"{row['overhead']:.2f}"])


def main() -> None:
    args = siblings.parser(__doc__, "siblings").parse_args()
    siblings.run_cases(args, "Layers on one x, forward + backward against the frozen layers", measure, table)


if __name__ == "__main__":
    main()
