"""What does a LoRA linear layer cost beyond its frozen base? Forward and backward, against it and the peers.

    python benchmarks/bench_layer.py [--dropout 0.1] [--rank 16] [--rounds 60] [--write]

Every contestant goes through its public module, autograd and Python included, on the same weights and inputs. They must
agree on outputs and gradients (without dropout) before any is timed. Time is that of forward plus backward to x and the
adapter; a ratio is that of the medians to the frozen layer's (forward plus backward to x), with the quartiles of the
round-by-round ratios behind it.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
from collections.abc import Callable
from datetime import date
from pathlib import Path

import torch
from shapes import CPU_SHAPES, Shape
from timing import interleaved, ratio
from torch import Tensor, nn

import lora_ext
from lora_ext import info
from lora_ext.nn import LoraAdapter, LoraLinear

RESULTS = Path(__file__).parent / "results"
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
    adapter = LoraAdapter(A.shape[1], B.shape[0], A.shape[0], ALPHA_OVER_R * A.shape[0], dropout, dtype=A.dtype)
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


def check_agreement(modules: dict[str, nn.Module], x: Tensor, grad_y: Tensor) -> None:
    """Outputs and gradients of all contestants agree with float64 to the dtype's rounding, or nothing is timed."""
    tolerance = {torch.float32: 1e-4, torch.bfloat16: 3e-2}[x.dtype]
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


def measure(shape: Shape, dtype: torch.dtype, rank: int, dropout: float, rounds: int) -> dict[str, object]:
    x = torch.randn(shape.num_tokens, shape.in_features, dtype=dtype, requires_grad=True)
    grad_y = torch.randn(shape.num_tokens, shape.out_features, dtype=dtype)
    A = (torch.randn(rank, shape.in_features) / shape.in_features**0.5).to(dtype)
    B = (torch.randn(shape.out_features, rank) * 0.1).to(dtype)
    base = nn.Linear(shape.in_features, shape.out_features, dtype=dtype).requires_grad_(False)

    check_agreement({name: make(base, A, B, 0.0) for name, make in CONTESTANTS.items()}, x, grad_y)
    modules = {"frozen": base} | {name: make(base, A, B, dropout) for name, make in CONTESTANTS.items()}

    def step(module: nn.Module) -> None:
        x.grad = None
        module.zero_grad(set_to_none=True)
        module(x).backward(grad_y)

    seconds = interleaved({name: lambda m=module: step(m) for name, module in modules.items()}, rounds)
    row: dict[str, object] = {"shape": list(shape), "dtype": str(dtype).removeprefix("torch.")}
    row["rounds"] = len(seconds["frozen"])
    row["frozen_ms"] = 1e3 * statistics.median(seconds["frozen"])
    row["ratio"] = {name: ratio(seconds[name], seconds["frozen"]) for name in CONTESTANTS}
    return row


def table(rows: list[dict]) -> str:
    lines = ["| tokens x in -> out | dtype | frozen, ms | " + " | ".join(CONTESTANTS) + " |"]
    lines.append("|" + "---|" * (3 + len(CONTESTANTS)))
    for row in rows:
        ratios = [f"{r:.2f} ({low:.2f}-{high:.2f})" for r, low, high in row["ratio"].values()]
        cells = [str(Shape(*row["shape"])), row["dtype"], f"{row['frozen_ms']:.2f}", *ratios]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rank", type=int, default=16)
    parser.add_argument("--dropout", type=float, default=0.1)
    parser.add_argument("--rounds", type=int, default=60, help="at most; slow shapes get fewer, at least 11")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--write", action="store_true", help="also write benchmarks/results/layer_cpu.{json,md}")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    torch.manual_seed(0)

    facts = info.gather()
    cpu_model = info.cpu_model()
    heading = (
        f"Forward + backward against the frozen layer, r={args.rank}, dropout {args.dropout}; {cpu_model}, "
        f"{args.threads} threads, {facts['cpu']['isa']} kernels; lora_ext {lora_ext.__version__}, torch "
        f"{torch.__version__}; {date.today()}; medians (quartiles)"
    )
    print(heading, flush=True)
    rows = []
    for dtype in (torch.float32, torch.bfloat16):
        for shape in CPU_SHAPES:
            rows.append(measure(shape, dtype, args.rank, args.dropout, args.rounds))
            print(table(rows).splitlines()[-1], flush=True)
    print(f"\n{table(rows)}")
    if args.write:
        RESULTS.mkdir(exist_ok=True)
        command = " ".join(["python benchmarks/bench_layer.py", *sys.argv[1:]])
        (RESULTS / "layer_cpu.md").write_text(f"{heading}\n\n    {command}\n\n{table(rows)}\n")
        result = {"command": command, "date": str(date.today()), "cpu": cpu_model, "info": facts, "rows": rows}
        (RESULTS / "layer_cpu.json").write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
