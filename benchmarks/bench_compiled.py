"""Measures compiled LoRA layers that read one x, with and without shared inputs, against their compiled frozen bases.

    python benchmarks/bench_compiled.py [--dropout 0.1] [--rank 16] [--backend inductor] [--write]

``lora_ext.inject`` adapts linear layers of one module on the same x, and ``torch.compile`` compiles the module: with
``share_inputs``, or with the backend itself. Forward plus backward to x and the adapters. Timed only if both agree on
outputs and gradients (without dropout). A ratio compares the median with that of the frozen layers; the quartiles of
the round-by-round ratios follow. The last columns are the bytes that autograd keeps for the backward.
"""

from __future__ import annotations

import copy

import torch
from harness import contestants, report
from harness.contestants import ALPHA_OVER_R, FROZEN, training_step
from harness.memory import activation_bytes
from harness.report import Report
from harness.shapes import LLAMA_SIBLINGS, SIBLING_SHAPES, SiblingShape
from torch import Tensor, nn

from lora_ext import LoraConfig, inject
from lora_ext.compiling import share_inputs


class Siblings(nn.Module):
    def __init__(self, in_features: int, widths: tuple[int, ...], **kwargs: object) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(in_features, width, **kwargs) for width in widths).requires_grad_(False)

    def forward(self, x: Tensor) -> list[Tensor]:
        return [layer(x) for layer in self.layers]


def adapted(bases: Siblings, rank: int, dropout: float) -> Siblings:
    config = LoraConfig(r=rank, lora_alpha=ALPHA_OVER_R * rank, lora_dropout=dropout, target_modules="all-linear")
    model = inject(copy.deepcopy(bases), config)
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            nn.init.normal_(parameter, std=0.1)
    return model


def measure(dtype: torch.dtype, shape: SiblingShape, run: Report) -> dict[str, object]:
    num_tokens, in_features, widths = shape
    args = run.args
    kwargs = {"dtype": dtype, "device": args.device}
    x = torch.randn(num_tokens, in_features, **kwargs).requires_grad_()
    grad_ys = [torch.randn(num_tokens, width, **kwargs) for width in widths]
    bases = Siblings(in_features, widths, **kwargs)

    exact = adapted(bases, args.rank, 0.0)
    some, grads = x[:16].detach(), [grad_y[:16] for grad_y in grad_ys]
    tried = {"single": exact, "shared": torch.compile(exact, backend=share_inputs("eager"), fullgraph=True)}
    contestants.check_agreement(tried, some, grads)

    torch._dynamo.reset()  # or another dropout than before would be no constant in the graph
    model = adapted(bases, args.rank, args.dropout)
    modules = {
        FROZEN: torch.compile(bases, backend=args.backend, fullgraph=True),
        "shared": torch.compile(model, backend=share_inputs(args.backend), fullgraph=True),
        "single": torch.compile(copy.deepcopy(model), backend=args.backend, fullgraph=True),
    }
    for module in modules.values():
        for _ in range(2):  # compiles
            training_step(module, x, grad_ys)
    kept = {name: activation_bytes(modules[name], lambda m=modules[name]: m(x)) for name in ("shared", "single")}
    seconds = run.interleaved({name: lambda m=module: training_step(m, x, grad_ys) for name, module in modules.items()})
    return {
        "shape": [num_tokens, in_features, *widths],
        "dropout": args.dropout,
        "dtype": report.dtype_name(dtype),
        "backend": args.backend,
        **report.against(seconds, FROZEN),
        "activation_bytes": kept,
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
        + [f"{kept / 2**20:.2f}" for kept in row["activation_bytes"].values()]
        for row in rows
    )
    kept = [f"{name}, MiB kept" for name in ("shared", "single")]
    return report.markdown(["tokens x in -> out of each", "dtype", "frozen, ms", *names, *kept], cells)


def main() -> None:
    parser = report.parser(__doc__, "compiled")
    report.add_shapes(parser, SiblingShape.parse, "TOKENSxINxOUT+OUT+OUT")
    parser.add_argument("--dropout", type=float, default=0.1)
    parser.add_argument("--backend", default="inductor", help="of torch.compile")
    args = parser.parse_args()
    title = f"Layers on one x under torch.compile ({args.backend}), forward + backward against the frozen layers"
    run = Report(args, f"{title}, r={args.rank}, dropout {args.dropout}")
    cases = run.shape_cases(SIBLING_SHAPES)
    if run.on_cuda and not args.shapes:
        cases = [(torch.bfloat16, shape) for shape in LLAMA_SIBLINGS]
    rows = run.measure(cases, lambda case: [measure(*case, run)], table)
    run.finish(rows, table(rows))


if __name__ == "__main__":
    main()
