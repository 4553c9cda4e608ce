"""Measures a bottleneck adapter on LoRA's kernels against two linear layers of PyTorch.

    python benchmarks/bench_bottleneck.py [--size 16] [--rounds 60] [--device cpu] [--write]

x + up(relu(down(x))) with biases: forward without autograd, and forward plus backward to x and all weights, with
autograd and Python. Contestants are timed only if they agree on outputs and gradients. A ratio compares the median
with that of the two linear layers; the quartiles of the round-by-round ratios follow.
"""

from __future__ import annotations

import statistics

import torch
from harness import contestants, report
from harness.contestants import COMPILED, training_step
from harness.report import Report
from harness.shapes import Shape
from harness.timing import ratio
from torch import Tensor, nn

from lora_ext import functional

PLAIN = "two linear layers"
LORA_EXT = contestants.LORA_EXT
# MiniLM's and BERT's widths at fine-tuning batches, then decoders' widths.
SHAPES = [Shape(1536, 384, 384), Shape(512, 768, 768), Shape(1024, 2048, 2048), Shape(2048, 4096, 4096)]


class Plain(nn.Module):
    def __init__(self, down: nn.Linear, up: nn.Linear) -> None:
        super().__init__()
        self.down, self.up = down, up

    def forward(self, x: Tensor) -> Tensor:
        return x + self.up(nn.functional.relu(self.down(x)))


class Ours(Plain):
    def forward(self, x: Tensor) -> Tensor:
        return functional.bottleneck(x, self.down.weight, self.down.bias, self.up.weight, self.up.bias)


def check_agreement(modules: dict[str, nn.Module], x: Tensor, grad_y: Tensor) -> None:
    """Raises SystemExit if a contestant's output or gradients differ from those of two linear layers in float64."""
    exact = Plain(*(nn.Linear(*w.shape[::-1]) for w in (modules[PLAIN].down.weight, modules[PLAIN].up.weight)))
    exact.load_state_dict(modules[PLAIN].state_dict())
    contestants_by_name = {"exact": exact.double().to(x.device), **modules}
    expected: list[Tensor] = []
    for name, module in contestants_by_name.items():
        leaf = x.detach().to(next(module.parameters()).dtype).requires_grad_()
        y = module(leaf)
        results = [y, *torch.autograd.grad(y, [leaf, *module.parameters()], grad_y.to(y.dtype))]
        expected = expected or results
        for ours, wanted in zip(results, expected, strict=True):
            error = (torch.linalg.vector_norm(ours - wanted) / torch.linalg.vector_norm(wanted)).item()
            # relu's gradient changes where rounding flips a hidden feature's sign; that happens for few features.
            if not error <= 3 * contestants.TOLERANCE[x.dtype]:
                raise SystemExit(f"{name} is off by {error:.2e} on {tuple(ours.shape)}: not timed")


def measure(dtype: torch.dtype, shape: Shape, run: Report) -> dict[str, object]:
    num_tokens, features, out_features = shape
    if features != out_features:
        raise SystemExit(f"--shapes {shape}: a bottleneck's residual is its input, want OUT equal to IN")
    options = {"dtype": dtype, "device": run.args.device}
    x = torch.randn(num_tokens, features, **options).requires_grad_()
    grad_y = torch.randn(num_tokens, features, **options)
    down, up = nn.Linear(features, run.args.size, **options), nn.Linear(run.args.size, features, **options)
    plain = Plain(down, up)
    modules = {PLAIN: plain, LORA_EXT: Ours(down, up)}
    check_agreement(modules, x, grad_y)
    modules[COMPILED] = torch.compile(plain, fullgraph=True, dynamic=False)

    steps = {name: lambda m=module: training_step(m, x, [grad_y]) for name, module in modules.items()}
    training = run.interleaved(steps, parts=2)
    with torch.inference_mode():
        forward = run.interleaved({name: lambda m=module: m(x) for name, module in modules.items()}, parts=2)
    contestants.forget_compiled()
    row: dict[str, object] = {"shape": list(shape), "dtype": report.dtype_name(dtype)}
    for what, seconds in (("forward", forward), ("training", training)):
        row[f"{what}_ms"] = 1e3 * statistics.median(seconds[PLAIN])
        row[what] = {name: ratio(seconds[name], seconds[PLAIN]) for name in modules if name != PLAIN}
    return row


def table(rows: list[dict]) -> str:
    cells = []
    for row in rows:
        line = [f"{row['shape'][0]} x {row['shape'][1]}", row["dtype"]]
        for what in ("forward", "training"):
            line += [
                report.milliseconds(row[f"{what}_ms"]),
                *report.ratio_cells({"ratio": row[what]}, (LORA_EXT, COMPILED)),
            ]
        cells.append(line)
    heading = ["tokens x features", "dtype"]
    for what in ("forward", "forward + backward"):
        heading += [f"{what}: {PLAIN}, ms", LORA_EXT, COMPILED]
    return report.markdown(heading, cells)


def main() -> None:
    parser = report.parser(__doc__, "bottleneck")
    report.add_shapes(parser)
    parser.add_argument("--size", type=report.at_least(1), default=16, help="hidden features")
    args = parser.parse_args()
    run = Report(args, f"A bottleneck adapter of {args.size} hidden features, against two linear layers of PyTorch")
    rows = run.measure(run.shape_cases(SHAPES), lambda case: [measure(*case, run)], table)
    run.finish(rows, table(rows))


if __name__ == "__main__":
    main()
