"""Measures how close every CUDA kernel is to the card's memory and product rates. Needs a GPU.

    python benchmarks/bench_kernels.py [--seconds 60] [--json kernels.json]

Both ceilings are measured in the same run: the rate of a large copy (bytes read plus bytes written) and that of a large
matrix product. PyTorch's profiler times the kernels inside the ops, on rotating inputs larger than the L2
cache. A stage is one step of the algorithm, with the second launches that add partial sums. Its bytes are those that it
must move (stage_bytes), so that moving more lowers its GB/s. Launches do not overlap here (LORA_EXT_OVERLAP=0).
"""

from __future__ import annotations

import argparse
import json
import os
import re
import statistics
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import NamedTuple

import torch
from harness import ceilings, report
from harness.shapes import CUDA_SHAPES, Shape
from harness.stages import Case, floor_seconds, stage_bytes, stage_flops
from harness.timing import CudaClock
from torch import Tensor, nn

from lora_ext import functional
from lora_ext.nn import LoraAdapter, LoraLinear

MAIN = CUDA_SHAPES[0]
# The most informative first, because a run that is short of time stops early.
CASES = [
    Case(MAIN),
    Case(MAIN, dtype=torch.float16),
    Case(MAIN, dropout=0.0),
    *(Case(MAIN, rank=rank) for rank in (4, 8, 64, 256)),
    *(Case(shape) for shape in CUDA_SHAPES[1:]),
    *(Case(Shape(tokens, 4096, 4096), dropout=0.0) for tokens in (1, 8, 64)),
]


# --- from kernels to stages -------------------------------------------------------------------------------------------


def is_ours(kernel: str) -> bool:
    return "lora_ext::" in kernel


def _short(kernel: str) -> str:
    return re.sub(r"^void |lora_ext::cuda::(mma::)?|\(.*", "", kernel)


def forward_stages(kernels: list[str]) -> list[str]:
    """Returns the stage of each kernel of one lora_linear, in launch order."""
    return [  # the rest is shrink, with its sums
        next((stage for stage in ("expand", "few_tokens") if name.startswith(stage)), "shrink")
        for name in map(_short, kernels)
    ]


def backward_stages(kernels: list[str]) -> list[str]:
    """Returns the stage of each kernel of one lora_linear_backward that computes all three gradients.

    grad_b and grad_a share kernels: grad_a starts at the last sum over tokens.
    """
    names = [_short(kernel) for kernel in kernels]
    sums = [i for i, name in enumerate(names) if re.match(r"token_sum|shrink_and_sum", name)]
    stages = []
    for i, name in enumerate(names):
        if name.startswith("expand"):
            stages.append("grad_x")
        else:
            stages.append("grad_a" if sums and i >= sums[-1] else "grad_b")
    return stages


def merge_stages(stage: str, kernels: list[str]) -> list[str]:
    """Returns the stages of one merge or unmerge: the last kernel writes the weight; one before it may plan the
    record."""
    return ["plan"] * (len(kernels) - 1) + [stage]


# --- measuring --------------------------------------------------------------------------------------------------------


def measure_ceilings() -> dict[str, float]:
    """Measures copy, bytes a second, read plus written; matrix_<dtype>, operations a second on random data."""
    clock, rates = CudaClock(), {}
    rates["copy"] = ceilings.copy_rate(2**30, "cuda", clock)
    for dtype, n in ((torch.bfloat16, 8192), (torch.float16, 8192), (torch.float32, 4096), (torch.float64, 2048)):
        rates[f"matrix_{report.dtype_name(dtype)}"] = ceilings.matrix_rate(dtype, n, "cuda", clock)
    return rates


class LostKernels(Exception):
    """The profiler saw other kernels than were launched."""


def profiled(calls: list[Callable[[], object]]) -> list[list[tuple[str, float]]]:
    """Returns (kernel, seconds) of our kernels for each call, in the order they ran; all calls launch alike."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
        # The profiler drops kernels that seem to precede its start, as CUPTI before 13.1 can be late
        # (pytorch/pytorch#192021).
        time.sleep(0.05)
        for call in calls:
            call()
        torch.cuda.synchronize()
    events = [event for event in profile.events() if event.device_type == torch.autograd.DeviceType.CUDA]
    events = sorted((event for event in events if is_ours(event.name)), key=lambda event: event.time_range.start)
    return split_evenly([(event.name, event.time_range.elapsed_us() * 1e-6) for event in events], len(calls))


def split_evenly(kernels: list, calls: int) -> list[list]:
    """Splits the kernels of several calls that launch alike into those of each call."""
    per_call, rest = divmod(len(kernels), calls)
    if rest or not per_call:
        raise LostKernels(f"the profiler saw {len(kernels)} kernels of lora_ext in {calls} equal calls")
    return [kernels[i : i + per_call] for i in range(0, len(kernels), per_call)]


def sums_by_stage(kernels: list[tuple[str, float]], stages: list[str]) -> dict[str, float]:
    total: dict[str, float] = {}
    for stage, (_, seconds) in zip(stages, kernels, strict=True):
        total[stage] = total.get(stage, 0.0) + seconds
    return total


class Timed(NamedTuple):
    """A stage of one call: the median of its time, and its launches."""

    seconds: float
    launches: int


def medians(rounds: list[dict[str, float]], stages: list[str]) -> dict[str, Timed]:
    """stages: of one call's kernels, in launch order."""
    counts = Counter(stages)
    return {stage: Timed(statistics.median(r[stage] for r in rounds), counts[stage]) for stage in rounds[0]}


def stage_seconds(
    calls: list[Callable[[], object]], stages_of: Callable[[list[str]], list[str]], repeats: int
) -> dict[str, Timed]:
    """Median time of each stage over the repeats, which cycle through the calls and so through their inputs."""
    for call in calls:
        call()
    torch.cuda.synchronize()
    rounds = profiled([calls[repeat % len(calls)] for repeat in range(repeats)])
    stages = stages_of([name for name, _ in rounds[0]])
    return medians([sums_by_stage(kernels, stages) for kernels in rounds], stages)


@dataclass
class Inputs:
    x: Tensor
    grad_y: Tensor
    weight: Tensor
    A: Tensor
    B: Tensor


def make_inputs(case: Case) -> Inputs:
    tokens, features, outputs = case.shape

    def random(*size: int) -> Tensor:
        return torch.randn(*size, device="cuda").to(case.dtype)

    return Inputs(
        x=random(tokens, features).requires_grad_(),
        grad_y=random(tokens, outputs),
        weight=random(outputs, features) / features**0.5,
        A=(random(case.rank, features) / features**0.5).requires_grad_(),
        B=random(outputs, case.rank).requires_grad_(),
    )


def count_of_sets(case: Case, cache_bytes: int) -> int:
    """Number of input sets such that a set has left the cache before its next turn."""
    tokens, features, outputs = case.shape
    set_bytes = (tokens * (features + outputs) + features * outputs) * case.dtype.itemsize
    return min(max(-(-4 * cache_bytes // set_bytes), 2), 16)


def measure(case: Case, repeats: int) -> dict[str, Timed]:
    """Measures the stages of a forward and a backward."""
    cache_bytes = torch.cuda.get_device_properties().L2_cache_size
    sets = [make_inputs(case) for _ in range(count_of_sets(case, cache_bytes))]
    seed = torch.tensor(7, device="cuda")

    def forward(i: Inputs) -> Tensor:
        return functional.lora_linear(i.x, i.weight, None, i.A, i.B, 2.0, case.dropout, seed)

    seconds = stage_seconds([lambda i=i: forward(i) for i in sets], forward_stages, repeats)
    outputs = [forward(i) for i in sets]
    backward = [
        lambda y=y, i=i: torch.autograd.grad(y, (i.x, i.A, i.B), i.grad_y, retain_graph=True)
        for y, i in zip(outputs, sets, strict=True)
    ]
    return seconds | stage_seconds(backward, backward_stages, repeats)


def measure_merge(case: Case, repeats: int) -> dict[str, Timed]:
    """Measures the stages of a merge and an unmerge."""
    _, features, outputs = case.shape
    layers = []
    for _ in range(count_of_sets(case, torch.cuda.get_device_properties().L2_cache_size)):
        base = nn.Linear(features, outputs, bias=False, dtype=case.dtype, device="cuda")
        adapter = LoraAdapter(features, outputs, case.rank, case.rank, dtype=case.dtype, device="cuda")
        nn.init.normal_(adapter.lora_B, std=0.02)
        layers.append(LoraLinear(base, adapter).eval())
    rounds: dict[str, list[dict[str, float]]] = {"merge": [], "unmerge": []}
    stages: dict[str, list[str]] = {}
    for repeat in range(-1, max(repeats // len(layers), 2)):  # -1 warms up
        for stage, seen in rounds.items():
            for kernels in profiled([getattr(layer, stage) for layer in layers]):
                if repeat >= 0:
                    stages[stage] = merge_stages(stage, [name for name, _ in kernels])
                    seen.append(sums_by_stage(kernels, stages[stage]))
    return {name: timed for stage, seen in rounds.items() for name, timed in medians(seen, stages[stage]).items()}


def rows_of(case: Case, measured: dict[str, Timed], rates: dict[str, float]) -> list[dict[str, object]]:
    matrix_rate = rates[f"matrix_{report.dtype_name(case.dtype)}"]
    rows = []
    for stage, (time_s, launches) in measured.items():
        row: dict[str, object] = {"case": str(case), "stage": stage, "us": 1e6 * time_s, "launches": launches}
        if stage in stage_bytes(case):
            row |= {"bytes": stage_bytes(case)[stage], "flops": stage_flops(case)[stage]}
            rate = row["bytes"] / time_s
            floor = floor_seconds(case, stage, rates["copy"], matrix_rate)
            row |= {"gb_s": rate / 1e9, "of_copy": rate / rates["copy"], "of_floor": floor / time_s}
        rows.append(row)
    return rows


def table(rows: list[dict]) -> str:
    cells = []
    for row in rows:
        rates = [f"{row['gb_s']:.0f}", f"{row['of_copy']:.0%}", f"{row['of_floor']:.0%}"] if "gb_s" in row else [""] * 3
        cells.append([row["case"], row["stage"], f"{row['us']:.1f}", *rates])
    columns = ["tokens x in -> out, rank, dtype", "stage", "us", "GB/s", "of copy", "of floor"]
    return report.markdown(columns, cells)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--repeats", type=int, default=15)
    parser.add_argument("--seconds", type=float, default=float("inf"), help="start no case after this time")
    parser.add_argument("--json", type=Path, help="also write each result to this file as soon as it is measured")
    args = parser.parse_args()
    begin = time.perf_counter()
    torch.manual_seed(0)
    # From sm_90 on a kernel starts early and waits: the profiler counts the time of the kernel before it, too.
    os.environ["LORA_EXT_OVERLAP"] = "0"

    rates = measure_ceilings()
    matrix = ", ".join(f"{k.removeprefix('matrix_')} {v / 1e12:.0f}" for k, v in rates.items() if k != "copy")
    print(f"{torch.cuda.get_device_name()}: copy {rates['copy'] / 1e9:.0f} GB/s, TFLOP/s {matrix}", flush=True)
    rows: list[dict] = []
    lost: list[str] = []
    measurements = [(measure, case) for case in CASES]
    measurements.insert(1, (measure_merge, Case(Shape(1, 8192, 8192), dropout=0.0)))
    measurements.append((measure_merge, Case(Shape(1, 4096, 4096), dropout=0.0, dtype=torch.float32)))
    for number, (measure_one, case) in enumerate(measurements):
        if time.perf_counter() - begin > args.seconds:
            print(f"out of time: {len(measurements) - number} cases are not measured", flush=True)
            break
        try:
            new = rows_of(case, measure_one(case, args.repeats), rates)
        except torch.cuda.OutOfMemoryError:
            print(f"{case}: not measured, too large for this card's memory", flush=True)
            continue
        except LostKernels as error:
            lost.append(f"{case}: not measured, {error}")
            print(lost[-1], flush=True)
            continue
        rows += new
        print("\n".join(table(new).splitlines()[2:]), flush=True)
        if args.json:
            cases = [asdict(case) | {"dtype": str(case.dtype), "shape": list(case.shape)} for _, case in measurements]
            args.json.write_text(json.dumps({"ceilings": rates, "rows": rows, "cases": cases}, indent=1) + "\n")
    if lost:
        raise SystemExit("\n".join(lost))


if __name__ == "__main__":
    main()
