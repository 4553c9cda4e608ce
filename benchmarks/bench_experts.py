"""Compares time and memory of adapters of a mixture's experts (target_parameters), here and in PEFT.

    python benchmarks/bench_experts.py [--experts 128] [--tokens 2048] [--implementation grouped_mm] [--dtype float32]

The experts of Qwen3-MoE (Transformers) with adapters on gate_up_proj and down_proj, forward plus backward to x and the
adapters; every token chooses ``--top`` experts. Contestants: the frozen experts (forward plus backward to x), our
layers, PEFT's, and PEFT's after ``accelerate``. They are timed only if they agree on outputs and gradients. A ratio
compares the median with PEFT's; the quartiles of the round-by-round ratios follow. Peak memory is that of one step
beyond what existed before it: weights and adapters are not counted, gradients of the adapters are. ``--implementation
compiled`` is ``grouped_mm`` with every contestant compiled by ``torch.compile``; PEFT's graphs are compiled again in
every call, until PyTorch's limit leaves them uncompiled.
"""

from __future__ import annotations

import itertools
import statistics
from collections.abc import Callable

import torch
from harness import contestants, memory, report, timing
from harness.contestants import ALPHA_OVER_R, FROZEN
from harness.report import Report
from torch import Tensor, nn

PARAMETERS = ["experts.gate_up_proj", "experts.down_proj"]
PEFT, ACCELERATED, OURS = "peft", "peft accelerated", "lora_ext"
COMPILED = "compiled"
IMPLEMENTATIONS = ("grouped_mm", "eager", COMPILED)


class Block(nn.Module):
    """Experts, and the choices and weights of a router; ``x`` is ``[tokens, hidden]``."""

    def __init__(self, experts: nn.Module, choices: Tensor, weights: Tensor) -> None:
        super().__init__()
        self.experts, self.choices, self.weights = experts, choices, weights

    def forward(self, x: Tensor) -> Tensor:
        return self.experts(x, self.choices, self.weights)


def make_experts(args, implementation: str, **options) -> nn.Module:
    from transformers import Qwen3MoeConfig
    from transformers.models.qwen3_moe.modeling_qwen3_moe import Qwen3MoeExperts

    config = Qwen3MoeConfig(
        hidden_size=args.hidden,
        moe_intermediate_size=args.intermediate,
        num_experts=args.experts,
        num_experts_per_tok=args.top,
        experts_implementation=implementation,
    )
    with torch.device(args.device):
        experts = Qwen3MoeExperts(config).to(**options).requires_grad_(False)
    for parameter in experts.parameters():
        parameter.normal_(std=parameter.shape[2] ** -0.5)
    return experts


def make_peft(base: Block, rank: int) -> nn.Module:
    import peft

    config = peft.LoraConfig(
        r=rank,
        lora_alpha=ALPHA_OVER_R * rank,
        target_modules=[],
        target_parameters=PARAMETERS,
        init_lora_weights=False,
    )
    return peft.get_peft_model(base, config)


def shallow(block: Block) -> Block:
    """Another block whose experts share the parameters: each library wraps modules of its own."""
    experts = type(block.experts).__new__(type(block.experts))
    experts.__dict__ = {**block.experts.__dict__, "_parameters": dict(block.experts._parameters)}
    return Block(experts, block.choices, block.weights)


def make_contestants(block: Block, rank: int) -> dict[str, nn.Module]:
    """The frozen block, and blocks with adapters of the same values, which share its weights."""
    import lora_ext
    from lora_ext.integrations.peft import accelerate

    settings = {"r": rank, "lora_alpha": ALPHA_OVER_R * rank, "target_modules": []}
    config = lora_ext.LoraConfig(**settings, target_parameters=PARAMETERS)
    modules: dict[str, nn.Module] = {
        FROZEN: block,
        PEFT: make_peft(shallow(block), rank),
        ACCELERATED: accelerate(make_peft(shallow(block), rank)),
        OURS: lora_ext.inject(shallow(block), config),
    }
    with torch.no_grad():
        values = trained(modules[PEFT])
        for name in (ACCELERATED, OURS):
            for parameter, value in zip(trained(modules[name]), values, strict=True):
                parameter.copy_(value)
    return modules


def trained(module: nn.Module) -> list[nn.Parameter]:
    """The adapters' parameters, in an order that the libraries share: by shape."""
    return sorted((p for p in module.parameters() if p.requires_grad), key=lambda p: tuple(p.shape))


def gradients(module: nn.Module, x: Tensor, grad_y: Tensor) -> list[Tensor]:
    y = module(x)
    return [y.detach(), *torch.autograd.grad(y, [x, *trained(module)], grad_y)]


def check_agreement(modules: dict[str, nn.Module], x: Tensor, grad_y: Tensor) -> None:
    """Raises SystemExit if outputs or gradients differ from PEFT's beyond rounding; nothing is timed then."""
    wanted = gradients(modules[PEFT], x, grad_y)
    for name, module in modules.items():
        if name in (FROZEN, PEFT):
            continue
        for found, expected in zip(gradients(module, x, grad_y), wanted, strict=True):
            contestants.check_close((name, PEFT), found, expected, contestants.TOLERANCE[x.dtype])


def step(module: nn.Module, x: Tensor, grad_y: Tensor) -> Callable[[], object]:
    return lambda: gradients(module, x, grad_y) and None


def measure(dtype: str, implementation: str, run: Report) -> dict[str, object]:
    args = run.args
    options = {"dtype": getattr(torch, dtype), "device": args.device}
    scores = torch.rand(args.tokens, args.experts, device=args.device)
    weights, choices = scores.topk(args.top)
    experts = make_experts(args, "grouped_mm" if implementation == COMPILED else implementation, **options)
    block = Block(experts, choices, weights.softmax(-1).to(options["dtype"]))
    x = torch.randn(args.tokens, args.hidden, **options).requires_grad_()
    grad_y = torch.randn(args.tokens, args.hidden, **options)
    modules = make_contestants(block, args.rank)
    if implementation == COMPILED:
        modules = {name: torch.compile(module, dynamic=False) for name, module in modules.items()}
    check_agreement(modules, x, grad_y)
    steps = {name: step(module, x, grad_y) for name, module in modules.items()}
    peaks = {name: memory.peak_bytes(call, args.device) for name, call in steps.items()}
    seconds = timing.interleaved(steps, args.rounds, budget_s=run.case_s, least=3, warmup=0, clock=run.clock)
    return {
        "implementation": implementation,
        "dtype": dtype,
        "experts": [args.experts, args.hidden, args.intermediate],
        "tokens": [args.tokens, args.top],
        **report.against(seconds, PEFT),
        "peak_bytes": peaks,
        "peak_ratio": {name: peak / peaks[PEFT] for name, peak in peaks.items() if name != PEFT},
        "seconds": {name: statistics.median(times) for name, times in seconds.items()},
    }


def table(rows: list[dict]) -> str:
    names = report.names_in(rows)
    cells = (
        ["{} x {} x {}".format(*row["experts"]), "{}, top {}".format(*row["tokens"]), row["dtype"]]
        + [row["implementation"], report.milliseconds(row[f"{PEFT}_ms"])]
        + report.ratio_cells(row, names)
        + [f"{row['peak_bytes'][PEFT] / 2**20:.0f}"]
        + [f"{row['peak_ratio'][name]:.2f}" for name in names]
        for row in rows
    )
    columns = ["experts", "tokens", "dtype", "implementation", f"{PEFT}, ms", *names, f"{PEFT}, peak MiB"]
    return report.markdown([*columns, *(f"{name}, peak" for name in names)], cells)


def main() -> None:
    parser = report.parser(__doc__, "experts")
    for option, default in (("experts", 128), ("hidden", 2048), ("intermediate", 768), ("tokens", 2048), ("top", 8)):
        parser.add_argument(f"--{option}", type=report.at_least(1), default=default)
    parser.add_argument("--dtype", choices=["float32", "bfloat16"], action="append", help="repeat for both")
    parser.add_argument("--implementation", choices=IMPLEMENTATIONS, action="append", help="repeat for several")
    args = parser.parse_args()
    run = Report(args, f"Adapters of experts against PEFT's, forward + backward, r={args.rank}")
    cases = list(itertools.product(args.dtype or ["float32"], args.implementation or ["grouped_mm"]))
    rows = run.measure(cases, lambda case: [measure(*case, run)], table)
    run.finish(rows, table(rows))


if __name__ == "__main__":
    main()
