"""What does a LoRA linear layer cost beyond its frozen base? Forward and backward, against it and the peers.

    python benchmarks/bench_layer.py [--device cpu] [--dropout 0.1] [--rank 16] [--rounds 60] [--write]

Every contestant goes through its public module, autograd and Python included, on the same weights and inputs. They must
agree on outputs and gradients (without dropout) before any is timed. Time is that of forward plus backward to x and the
adapter; a ratio is that of the medians to the frozen layer's (forward plus backward to x), with the quartiles of the
round-by-round ratios behind it.

On a GPU a shape's time is the one between two CUDA events with the second-level cache flushed before (timing.py), and
torch.compile of the hand-written layer is a contestant at the first shape.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path

import report
import torch
from shapes import CPU_SHAPES, CUDA_SHAPES, Shape
from timing import Clock, interleaved, ratio
from torch import Tensor, nn

from lora_ext.nn import LoraAdapter, LoraLinear

ALPHA_OVER_R = 2.0


class HandWritten(nn.Module):
    """What a careful PyTorch user writes: F.linear, F.dropout, and one addmm onto the output."""

    def __init__(self, base: nn.Linear, A: Tensor, B: Tensor, dropout: float) -> None:
        super().__init__()
        self.base, self.dropout = base, dropout
        self.lora_A, self.lora_B = nn.Parameter(A.clone()), nn.Parameter(B.clone())

    def forward(self, x: Tensor) -> Tensor:
        xa = nn.functional.dropout(x, self.dropout) @ self.lora_A.T
        return torch.addmm(self.base(x), xa, self.lora_B.T, alpha=ALPHA_OVER_R)


def make_lora_ext(base: nn.Linear, A: Tensor, B: Tensor, dropout: float) -> nn.Module:
    features, r = (A.shape[1], B.shape[0]), A.shape[0]
    adapter = LoraAdapter(*features, r, ALPHA_OVER_R * r, dropout, dtype=A.dtype, device=A.device)
    with torch.no_grad():
        adapter.lora_A.copy_(A), adapter.lora_B.copy_(B)
    return LoraLinear(base, adapter)


def make_peft(base: nn.Linear, A: Tensor, B: Tensor, dropout: float) -> nn.Module:
    from peft import LoraConfig, inject_adapter_in_model

    config = LoraConfig(r=A.shape[0], lora_alpha=ALPHA_OVER_R * A.shape[0], lora_dropout=dropout, target_modules=["0"])
    layer = inject_adapter_in_model(config, nn.Sequential(base))[0]
    with torch.no_grad():
        layer.lora_A.default.weight.copy_(A), layer.lora_B.default.weight.copy_(B)
    return layer.to(A.dtype)


CONTESTANTS: dict[str, Callable[..., nn.Module]] = {
    "lora_ext": make_lora_ext,
    "peft": make_peft,
    "hand-written": HandWritten,
}
if importlib.util.find_spec("peft") is None:
    del CONTESTANTS["peft"]
COMPILED = "compiled"


def check_agreement(modules: dict[str, nn.Module], x: Tensor, grad_y: Tensor) -> None:
    """Outputs and gradients of all contestants agree with float64 to the dtype's rounding, or nothing is timed."""
    tolerance = {torch.float32: 1e-4, torch.bfloat16: 3e-2, torch.float16: 1e-2}[x.dtype]
    results = {}
    for name, module in modules.items():
        leaf = x.detach().clone().requires_grad_()
        y = module(leaf)
        factors = [p for key, p in module.named_parameters() if "lora_" in key]
        results[name] = [y, *torch.autograd.grad(y, [leaf, *factors], grad_y)]
    first = results["lora_ext"]
    for name, values in results.items():
        for ours, theirs in zip(first, values, strict=True):
            error = ((ours.double() - theirs.double()).norm() / theirs.double().norm()).item()
            if error > tolerance:
                sys.exit(f"{name} and lora_ext disagree by {error:.2e} on {tuple(ours.shape)}: not timed")


def measure(
    shape: Shape, dtype: torch.dtype, args: argparse.Namespace, clock: Clock, with_compile: bool
) -> dict[str, object]:
    def random(*size: int, scale: float = 1.0) -> Tensor:
        return (torch.randn(*size, device=args.device) * scale).to(dtype)

    x = random(shape.num_tokens, shape.in_features).requires_grad_()
    grad_y = random(shape.num_tokens, shape.out_features)
    A = random(args.rank, shape.in_features, scale=shape.in_features**-0.5)
    B = random(shape.out_features, args.rank, scale=0.1)
    base = nn.Linear(shape.in_features, shape.out_features, dtype=dtype, device=args.device).requires_grad_(False)

    check_agreement({name: make(base, A, B, 0.0) for name, make in CONTESTANTS.items()}, x, grad_y)
    modules = {"frozen": base} | {name: make(base, A, B, args.dropout) for name, make in CONTESTANTS.items()}
    if with_compile:
        modules[COMPILED] = torch.compile(HandWritten(base, A, B, args.dropout))

    def step(module: nn.Module) -> None:
        x.grad = None
        module.zero_grad(set_to_none=True)
        module(x).backward(grad_y)

    calls = {name: lambda m=module: step(m) for name, module in modules.items()}
    seconds = interleaved(calls, args.rounds, clock=clock)
    row: dict[str, object] = {"shape": list(shape), "dtype": str(dtype).removeprefix("torch.")}
    row["rounds"] = len(seconds["frozen"])
    row["frozen_ms"] = 1e3 * statistics.median(seconds["frozen"])
    row["ratio"] = {name: ratio(seconds[name], seconds["frozen"]) for name in modules if name != "frozen"}
    return row


def table(rows: list[dict]) -> str:
    names = list(dict.fromkeys(name for row in rows for name in row["ratio"]))
    lines = ["| tokens x in -> out | dtype | frozen, ms | " + " | ".join(names) + " |"]
    lines.append("|" + "---|" * (3 + len(names)))
    for row in rows:
        ratios = [row["ratio"].get(name) for name in names]
        ratios = ["{:.2f} ({:.2f}-{:.2f})".format(*values) if values else "" for values in ratios]
        cells = [
            str(Shape(*row["shape"])),
            row["dtype"],
            f"{row['frozen_ms']:.{2 if row['frozen_ms'] >= 1 else 3}f}",
            *ratios,
        ]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def main() -> None:
    parser = report.parser(__doc__, "layer")
    parser.add_argument("--dropout", type=float, default=0.1)
    parser.add_argument("--seconds", type=float, default=float("inf"), help="begin no shape after so many")
    parser.add_argument("--json", type=Path, help="also write the rows there, each as soon as it is measured")
    args = parser.parse_args()
    begin = time.perf_counter()
    run = report.Report(args, f"Forward + backward against the frozen layer, r={args.rank}, dropout {args.dropout}")
    # The second dtype only at the first shapes of a GPU: there time is short, and the 16-bit types are what is used.
    cases = [(dtype, shape) for dtype in (torch.float32, torch.bfloat16) for shape in CPU_SHAPES]
    if run.on_cuda:
        cases = [(torch.bfloat16, CUDA_SHAPES[0]), (torch.float16, CUDA_SHAPES[0]), (torch.float32, CUDA_SHAPES[0])]
        cases += [(torch.bfloat16, shape) for shape in CUDA_SHAPES[1:]]
    rows: list[dict] = []
    for dtype, shape in cases:
        if time.perf_counter() - begin > args.seconds:
            print(f"out of time: {len(cases) - len(rows)} cases are not measured", flush=True)
            break
        rows.append(measure(shape, dtype, args, run.clock, with_compile=run.on_cuda and not rows))
        print(table(rows).splitlines()[-1], flush=True)
        if args.json:
            args.json.write_text(json.dumps(rows, indent=1) + "\n")
    run.finish(rows, table(rows))


if __name__ == "__main__":
    main()
