"""Measures a linear layer with a DoRA adapter against its frozen base, next to PEFT's and to plain LoRA.

    python benchmarks/bench_dora.py [--device cpu] [--dropout 0.1] [--rank 16] [--shapes 512x768x3072] [--write]

Contestants: our layer with a LoRA adapter, our layer with a DoRA adapter (``use_dora=True``), PEFT's after
``accelerate``, and PEFT's; all on the same weights and inputs, with float32 factors. They are timed only if the DoRA
layers agree on outputs and gradients. The passes: forward plus backward (to x and the adapter) without and with
dropout, and the forward of one token without autograd. A ratio compares the median with the frozen layer's; the
quartiles of the round-by-round ratios follow. Peak memory is that of a training step without dropout beyond what
existed before it.
"""

from __future__ import annotations

import functools

import torch
from harness import contestants, memory, report
from harness.contestants import FROZEN, training_step
from harness.report import Report
from harness.shapes import Shape
from torch import Tensor, nn

import lora_ext

LORA, OURS, ACCELERATED, PEFT = "lora_ext, LoRA", "lora_ext", "peft accelerated", "peft"
SHAPES = (Shape(512, 768, 768), Shape(1024, 2048, 2048), Shape(2048, 4096, 4096))
ONE_TOKEN, TRAINING = "one token", "forward + backward"


def injected(base: nn.Linear, A: Tensor, B: Tensor, dropout: float, use_dora: bool) -> nn.Module:
    options = {"r": len(A), "lora_alpha": contestants.ALPHA_OVER_R * len(A), "lora_dropout": dropout}
    config = lora_ext.LoraConfig(**options, target_modules=["0"], use_dora=use_dora)
    layer = lora_ext.inject(nn.Sequential(base), config)[0]
    adapter = layer.adapters["default"]
    return with_factors(layer, adapter.lora_A, adapter.lora_B, A, B)


def make_peft(base: nn.Linear, A: Tensor, B: Tensor, dropout: float) -> nn.Module:
    from peft import LoraConfig, inject_adapter_in_model

    options = {"r": len(A), "lora_alpha": contestants.ALPHA_OVER_R * len(A), "lora_dropout": dropout}
    layer = inject_adapter_in_model(LoraConfig(**options, target_modules=["0"], use_dora=True), nn.Sequential(base))[0]
    for parameters in (layer.lora_A, layer.lora_B, layer.lora_magnitude_vector):
        parameters.float()  # as get_peft_model does
    return with_factors(layer, layer.lora_A.default.weight, layer.lora_B.default.weight, A, B)


def with_factors(layer: nn.Module, lora_A: Tensor, lora_B: Tensor, A: Tensor, B: Tensor) -> nn.Module:
    with torch.no_grad():
        lora_A.copy_(A), lora_B.copy_(B)
    return layer


def make_accelerated(base: nn.Linear, A: Tensor, B: Tensor, dropout: float) -> nn.Module:
    from lora_ext.integrations.peft import accelerate

    return accelerate(make_peft(base, A, B, dropout))


MAKES: dict[str, contestants.Make] = {
    LORA: functools.partial(injected, use_dora=False),
    OURS: functools.partial(injected, use_dora=True),
    ACCELERATED: make_accelerated,
    PEFT: make_peft,
}


def measure(dtype: torch.dtype, shape: Shape, run: Report) -> list[dict[str, object]]:
    dropouts = sorted({0.0, run.args.dropout})
    modules = contestants.on_same_weights(shape, dtype, run.args.device, run.args.rank, dropouts, MAKES)
    options = {"dtype": dtype, "device": run.args.device}
    x = torch.randn(shape.num_tokens, shape.in_features, **options).requires_grad_()
    grad_ys, one = [torch.randn(shape.num_tokens, shape.out_features, **options)], x.detach()[:1]
    contestants.check_agreement({name: m for name, m in modules[0.0].items() if name != LORA}, x, grad_ys)
    calls = {(ONE_TOKEN, 0.0): {name: lambda m=m: m(one) for name, m in modules[0.0].items()}}
    for p in dropouts:
        calls[TRAINING, p] = {name: lambda m=m: training_step(m, x, grad_ys) for name, m in modules[p].items()}
    peaks = {name: memory.peak_bytes(call, run.args.device) for name, call in calls[TRAINING, 0.0].items()}
    rows = []
    for (what, dropout), by_contestant in calls.items():
        with torch.set_grad_enabled(what == TRAINING):
            seconds = run.interleaved(by_contestant, parts=len(calls))
        row: dict[str, object] = {"pass": what, "dropout": dropout, "shape": list(shape)}
        row |= {"dtype": report.dtype_name(dtype), **report.against(seconds, FROZEN), "peak_bytes": peaks}
        rows.append(row)
    return rows


def table(rows: list[dict]) -> str:
    names = report.names_in(rows)
    cells = (
        [str(Shape(*row["shape"])), row["dtype"], what_of(row), report.milliseconds(row[f"{FROZEN}_ms"])]
        + report.ratio_cells(row, names)
        + [f"{row['peak_bytes'][name] / 2**20:.1f}" for name in (OURS, PEFT)]
        for row in rows
    )
    columns = ["tokens x in -> out", "dtype", "pass", f"{FROZEN}, ms", *names]
    return report.markdown([*columns, f"{OURS}, peak MiB", f"{PEFT}, peak MiB"], cells)


def what_of(row: dict) -> str:
    return f"{row['pass']}, dropout {row['dropout']:g}" if row["dropout"] else row["pass"]


def main() -> None:
    parser = report.parser(__doc__, "dora")
    report.add_shapes(parser)
    parser.add_argument("--dropout", type=float, default=0.1)
    args = parser.parse_args()
    run = Report(args, f"A layer with a DoRA adapter against the frozen layer, r={args.rank}")
    rows = run.measure(run.shape_cases(SHAPES), lambda case: measure(*case, run), table)
    run.finish(rows, table(rows))


if __name__ == "__main__":
    main()
