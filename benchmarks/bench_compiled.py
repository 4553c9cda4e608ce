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
from harness import contestants, siblings
from harness.contestants import ALPHA_OVER_R, FROZEN, training_step
from harness.memory import activation_bytes
from harness.report import Report
from harness.shapes import SiblingShape
from harness.siblings import Row, Separate
from torch import nn

from lora_ext import LoraConfig, inject
from lora_ext.compiling import share_inputs


def adapted(bases: Separate, rank: int, dropout: float) -> Separate:
    config = LoraConfig(r=rank, lora_alpha=ALPHA_OVER_R * rank, lora_dropout=dropout, target_modules="all-linear")
    model = inject(copy.deepcopy(bases), config)
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            nn.init.normal_(parameter, std=0.1)
    return model


def measure(dtype: torch.dtype, shape: SiblingShape, run: Report) -> Row:
    args = run.args
    bases, x, grad_ys = siblings.frozen_case(dtype, shape, args.device)

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
    seconds = siblings.training_seconds(run, modules, x, grad_ys)
    return siblings.row(dtype, shape, run, seconds) | {"backend": args.backend, "activation_bytes": kept}


def table(rows: list[Row]) -> str:
    columns = ["shared, MiB kept", "single, MiB kept"]
    return siblings.table(
        rows, columns, lambda row: [f"{kept / 2**20:.2f}" for kept in row["activation_bytes"].values()]
    )


def main() -> None:
    parser = siblings.parser(__doc__, "compiled")
    parser.add_argument("--backend", default="inductor", help="of torch.compile")
    args = parser.parse_args()
    title = f"Layers on one x under torch.compile ({args.backend}), forward + backward against the frozen layers"
    siblings.run_cases(args, title, measure, table)


if __name__ == "__main__":
    main()
