"""Measures a batch whose rows belong to different adapters.

    python benchmarks/bench_grouped.py [--shapes 32x4096x4096] [--adapters 32] [--rank 16] [--device cpu] [--write]

A linear layer and its adapters, without autograd for few tokens (decoding) and forward plus backward for many. Each row
belongs to one of ``--adapters`` adapters, in random order; with fewer rows, each to one of its own. Contestants: the
layer with one adapter for all rows; the base layer and lora_grouped_ on a stack of slots (a pool), on a list of
matrices (parameters of their own), and on a stack after the base product of lora_linear; PEFT's layer with
``adapter_names``, which has no training. Contestants are timed only if they agree. Ratios are to the layer with one
adapter; overhead is what a stack costs beyond the frozen base layer, divided by what PEFT's layer costs beyond it. GB/s
are the bytes of the chosen factors, once each, by the time of the op alone on a stack; copied, by the time in which
PyTorch reads and writes as many bytes.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable

import torch
from harness import contestants, report
from harness.contestants import ALPHA_OVER_R, FROZEN
from harness.report import Report
from harness.shapes import Shape
from torch import Tensor, nn

from lora_ext import functional

ONE = "one adapter"
SHAPES = [
    Shape(1, 4096, 4096),
    Shape(8, 4096, 4096),
    Shape(32, 4096, 4096),
    Shape(64, 4096, 4096),
    Shape(32, 2048, 8192),
]
TRAINED_SHAPES = [Shape(2048, 1024, 1024), Shape(2048, 2048, 2048)]
TRAINED_ADAPTERS = 8


class Grouped(nn.Module):
    """A base layer, and one lora_grouped_ for all adapters."""

    def __init__(self, base: nn.Linear, As: list[Tensor], Bs: list[Tensor], groups: Tensor) -> None:
        super().__init__()
        self.base, self.groups = base, groups
        self.lora_As = nn.ParameterList(A.clone() for A in As)
        self.lora_Bs = nn.ParameterList(B.clone() for B in Bs)
        slots = sum(A.shape[0] if A.dim() == 3 else 1 for A in As)
        self.scalings = torch.full((slots,), ALPHA_OVER_R, dtype=torch.float64, device=As[0].device)

    @property
    def adapters(self) -> tuple:
        return list(self.lora_As), list(self.lora_Bs), self.groups, self.scalings

    def add(self, y: Tensor, x: Tensor) -> Tensor:
        return functional.lora_grouped_(y, x, *self.adapters)

    def forward(self, x: Tensor) -> Tensor:
        return self.add(self.base(x), x)


class OurBase(Grouped):
    """The same with our base product, by lora_grouped_linear."""

    def forward(self, x: Tensor) -> Tensor:
        return functional.lora_grouped_linear(x, self.base.weight, self.base.bias, *self.adapters)


class Peft(nn.Module):
    """PEFT's layer, which adapter_names tell the adapter of every row."""

    def __init__(self, base: nn.Linear, As: list[Tensor], Bs: list[Tensor], groups: Tensor) -> None:
        super().__init__()
        from peft import LoraConfig, inject_adapter_in_model

        config = LoraConfig(r=len(As[0]), lora_alpha=ALPHA_OVER_R * len(As[0]), target_modules=["0"])
        model = nn.Sequential(base)
        for i in range(len(As)):
            inject_adapter_in_model(config, model, adapter_name=f"a{i}")
        self.layer = model[0].to(As[0].dtype).eval().requires_grad_(False)
        with torch.no_grad():
            for i, (A, B) in enumerate(zip(As, Bs, strict=True)):
                self.layer.lora_A[f"a{i}"].weight.copy_(A), self.layer.lora_B[f"a{i}"].weight.copy_(B)
        self.names = [f"a{group}" for group in groups.tolist()]

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(x, adapter_names=self.names)


def stacked(kind: type[Grouped]) -> Callable[..., nn.Module]:
    return lambda base, As, Bs, groups: kind(base, [torch.stack(As)], [torch.stack(Bs)], groups)


TRAINED: dict[str, Callable[..., nn.Module]] = {"stack": stacked(Grouped), "list": Grouped}
CONTESTANTS = TRAINED | {"stack, our base": stacked(OurBase), "peft": Peft}


def check_outputs(modules: dict[str, nn.Module], x: Tensor) -> None:
    """Checks that all contestants except the frozen layer and that with one adapter agree.

    Raises:
        SystemExit: names the contestant and the error; nothing is timed.
    """
    with torch.no_grad():
        expected, *others = ((name, module(x)) for name, module in modules.items() if name not in (FROZEN, ONE))
    for name, y in others:
        contestants.check_close((name, expected[0]), y, expected[1], contestants.TOLERANCE[x.dtype])


def measure(dtype: torch.dtype, shape: Shape, trains: bool, run: Report) -> dict[str, object]:
    num_tokens, in_features, out_features = shape
    options = {"dtype": dtype, "device": run.args.device}
    adapters = min(TRAINED_ADAPTERS if trains else run.args.adapters, num_tokens)
    x = torch.randn(num_tokens, in_features, **options)
    groups = torch.randperm(num_tokens, device=run.args.device) % adapters
    base = nn.Linear(in_features, out_features, **options).requires_grad_(False)
    As = [torch.randn(run.args.rank, in_features, **options) * in_features**-0.5 for _ in range(adapters)]
    Bs = [torch.randn(out_features, run.args.rank, **options) * 0.1 for _ in range(adapters)]
    makes = TRAINED if trains else CONTESTANTS
    modules = {ONE: contestants.make_lora_ext(base, As[0], Bs[0], 0.0), FROZEN: base}
    modules |= {name: make(base, As, Bs, groups) for name, make in makes.items()}
    check_outputs(modules, x)

    facts: dict[str, object] = {}
    if trains:
        x.requires_grad_()
        grad_y = torch.randn(num_tokens, out_features, **options)
        seconds = run.interleaved(
            {name: lambda m=module: contestants.training_step(m, x, [grad_y]) for name, module in modules.items()}
        )
    else:
        stack, y = modules["stack"], base(x)
        factors = [*stack.lora_As, *stack.lora_Bs]
        copies = [torch.empty_like(factor) for factor in factors]
        calls = {name: lambda m=module: m(x) for name, module in modules.items()}
        calls["op alone"] = lambda: stack.add(y, x)
        calls["copy"] = lambda: [copy.copy_(factor) for copy, factor in zip(copies, factors, strict=True)]
        with torch.no_grad():
            seconds = run.interleaved(calls)
        alone, copied = (statistics.median(seconds.pop(name)) for name in ("op alone", "copy"))
        median = {name: statistics.median(times) for name, times in seconds.items()}
        num_bytes = sum(factor.nbytes for factor in factors)
        facts = {
            "overhead": (median["stack"] - median[FROZEN]) / (median["peft"] - median[FROZEN]),
            "gb_s": {"op alone": num_bytes / alone / 1e9, "copied": 2 * num_bytes / copied / 1e9},
        }
    return {
        "shape": list(shape),
        "dtype": report.dtype_name(dtype),
        "adapters": adapters,
        "pass": "forward + backward" if trains else "forward",
        **report.against(seconds, ONE),
        **facts,
    }


def table(rows: list[dict]) -> str:
    names = [FROZEN, *CONTESTANTS]
    cells = (
        [
            str(Shape(*row["shape"])),
            row["dtype"],
            str(row["adapters"]),
            row["pass"],
            report.milliseconds(row[f"{ONE}_ms"]),
        ]
        + report.ratio_cells(row, names)
        + [f"{row['overhead']:.2f}" if "overhead" in row else ""]
        + [f"{row['gb_s'][name]:.1f}" if "gb_s" in row else "" for name in ("op alone", "copied")]
        for row in rows
    )
    columns = [
        "tokens x in -> out",
        "dtype",
        "adapters",
        "pass",
        f"{ONE}, ms",
        *names,
        "overhead",
        "op alone, GB/s",
        "copied, GB/s",
    ]
    return report.markdown(columns, cells)


def main() -> None:
    parser = report.parser(__doc__, "grouped")
    report.add_shapes(parser)
    parser.add_argument("--adapters", type=report.at_least(1), default=32)
    parser.add_argument("--only", choices=["forward", "training"], help="measure one of the two passes")
    args = parser.parse_args()
    run = Report(args, f"Rows over several adapters against rows of one, r={args.rank}")
    passes = {False: SHAPES, True: TRAINED_SHAPES}
    if args.only:
        passes = {args.only == "training": passes[args.only == "training"]}
    cases = [(*case, trains) for trains, shapes in passes.items() for case in run.shape_cases(shapes)]
    rows = run.measure(cases, lambda case: [measure(*case, run)], table)
    run.finish(rows, table(rows))


if __name__ == "__main__":
    main()
