"""Measures the time to adapt a large model, to switch its adapters, and to import the package.

    python benchmarks/bench_inject.py [--layers 80] [--rounds 15] [--imports 5] [--write]

``inject`` adapts every linear layer of a decoder of 80 blocks with 7 linear layers each (Llama-3-70B's depth at
Llama-3-8B's widths), against PEFT's ``inject_adapter_in_model`` and ``get_peft_model``. The weights are on the meta
device, without memory, so the time is that of finding, checking, building and replacing modules. PEFT by default
initialises factors on the CPU for any device; with ``low_cpu_mem_usage`` it makes them on meta, as ``inject`` does.
Every call gets a new model; ratios are to ``inject``.

Switching alternates between two of the 2 or 8 adapters that the model holds; the time is that of one ``set_adapter``.

Importing is timed in new processes, in turn, after ``import torch``.
"""

from __future__ import annotations

import importlib.util
import os
import statistics
import subprocess
import sys
from collections.abc import Callable

import torch
from harness import report
from harness.contestants import ALPHA_OVER_R, LORA_EXT
from harness.report import Report
from harness.timing import interleaved, ratio, wall_clock
from torch import nn

import lora_ext

WIDTH, KEY_WIDTH, MLP_WIDTH = 4096, 1024, 14336
HAS_PEFT = importlib.util.find_spec("peft") is not None


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()

        def linear(in_features: int, out_features: int) -> nn.Linear:
            return nn.Linear(in_features, out_features, bias=False)

        self.self_attn = nn.ModuleDict(
            {name: linear(WIDTH, KEY_WIDTH if name in ("k_proj", "v_proj") else WIDTH) for name in ATTENTION}
        )
        self.mlp = nn.ModuleDict(
            {"gate_proj": linear(WIDTH, MLP_WIDTH), "up_proj": linear(WIDTH, MLP_WIDTH)}
            | {"down_proj": linear(MLP_WIDTH, WIDTH)}
        )


ATTENTION = ["q_proj", "k_proj", "v_proj", "o_proj"]
TARGETS = [*ATTENTION, "gate_proj", "up_proj", "down_proj"]


def make_model(layers: int) -> nn.Module:
    with torch.device("meta"):
        return nn.ModuleDict({"layers": nn.ModuleList(Block() for _ in range(layers))})


def injectors(rank: int) -> dict[str, Callable[[nn.Module], object]]:
    options = {"r": rank, "lora_alpha": ALPHA_OVER_R * rank, "lora_dropout": 0.1, "target_modules": TARGETS}
    result = {LORA_EXT: lambda model: lora_ext.inject(model, lora_ext.LoraConfig(**options))}
    if HAS_PEFT:
        import peft

        result["peft inject, meta"] = lambda model: peft.inject_adapter_in_model(
            peft.LoraConfig(**options), model, low_cpu_mem_usage=True
        )
        result["peft inject"] = lambda model: peft.inject_adapter_in_model(peft.LoraConfig(**options), model)
        result["get_peft_model"] = lambda model: peft.get_peft_model(model, peft.LoraConfig(**options))
    return result


def check(layers: int, rank: int) -> int:
    """Checks that all adapt the same layers with factors of the same sizes; returns the number of layers."""
    found: dict[str, list] = {}
    for name, inject in injectors(rank).items():
        model = make_model(layers)
        inject(model)
        trained = [list(parameter.shape) for parameter in model.parameters() if parameter.requires_grad]
        found[name] = sorted(trained)
    first = found[LORA_EXT]
    for name, shapes in found.items():
        if shapes != first:
            sys.exit(f"{name} and {LORA_EXT} train different parameters ({len(shapes)}, {len(first)}): not timed")
    return len(first) // 2


def measure_inject(run: Report) -> list[dict[str, object]]:
    args = run.args
    count = check(args.layers, args.rank)
    adapt = injectors(args.rank)

    def clock(call: Callable[[], object]) -> float:
        name, model = call(), make_model(args.layers)
        return wall_clock(lambda: adapt[name](model))  # no device takes part

    seconds = run.interleaved({name: lambda n=name: n for name in adapt}, clock=clock)
    return rows_of(f"adapt {count} layers", seconds)


def measure_switching(run: Report, held: int) -> list[dict[str, object]]:
    """Times a switch between two adapters (Python only): half of a switch there and back."""
    args = run.args
    options = {"r": args.rank, "lora_alpha": ALPHA_OVER_R * args.rank, "target_modules": TARGETS}
    ours = make_model(args.layers)
    for i in range(held):
        lora_ext.inject(ours, lora_ext.LoraConfig(**options), f"adapter{i}")
    switches = {LORA_EXT: lambda name: lora_ext.set_adapter(ours, name)}
    if HAS_PEFT:
        import peft

        theirs = peft.get_peft_model(make_model(args.layers), peft.LoraConfig(**options), "adapter0")
        for i in range(1, held):
            theirs.add_adapter(f"adapter{i}", peft.LoraConfig(**options), low_cpu_mem_usage=True)
        switches["peft"] = theirs.set_adapter

    def clock(call: Callable[[], object]) -> float:
        switch = switches[call()]
        switch("adapter0")
        return wall_clock(lambda: (switch("adapter1"), switch("adapter0"))) / 2

    return rows_of(
        f"switch 1 of {held} adapters", run.interleaved({name: lambda n=name: n for name in switches}, clock=clock)
    )


def rows_of(what: str, seconds: dict[str, list[float]]) -> list[dict[str, object]]:
    return [
        {
            "what": what,
            "contestant": name,
            "rounds": len(times),
            "ms": 1e3 * statistics.median(times),
            "ratio": ratio(times, seconds[LORA_EXT]),
        }
        for name, times in seconds.items()
    ]


def seconds_to_import(module: str) -> float:
    code = f"import time, torch; t = time.perf_counter(); import {module}; print(time.perf_counter() - t)"
    # Users import byte code, which the first run writes.
    environment = {key: value for key, value in os.environ.items() if key != "PYTHONDONTWRITEBYTECODE"}
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environment)
    if result.returncode != 0:
        sys.exit(f"import {module} failed: {result.stderr.strip().splitlines()[-1]}")
    return float(result.stdout.split()[-1])


def measure_imports(rounds: int) -> list[dict[str, object]]:
    modules = [LORA_EXT, *(["peft"] if HAS_PEFT else [])]
    calls = {name: lambda n=name: n for name in modules}
    seconds = interleaved(calls, rounds, least=rounds, warmup=1, clock=lambda call: seconds_to_import(call()))
    return rows_of("import, after torch", seconds)


def table(rows: list[dict]) -> str:
    cells = (
        [row["what"], row["contestant"], report.milliseconds(row["ms"]), report.ratio_cell(row["ratio"])]
        for row in rows
    )
    return report.markdown(["what", "by", "ms", f"times {LORA_EXT}'s"], cells)


def main() -> None:
    parser = report.parser(__doc__, "inject")
    parser.add_argument("--layers", type=int, default=80, help="blocks of 7 linear layers each")
    parser.add_argument("--imports", type=report.rounds, default=5, help="rounds of importing, in new processes")
    args = parser.parse_args()
    run = Report(
        args, f"Adapting {7 * args.layers} linear layers on the meta device, switching, importing, r={args.rank}"
    )
    measures = [
        measure_inject,
        lambda run: measure_switching(run, 2),
        lambda run: measure_switching(run, 8),
        lambda run: measure_imports(args.imports),
    ]
    rows = run.measure(measures, lambda measure: measure(run), table)
    run.finish(rows, table(rows))


if __name__ == "__main__":
    main()
