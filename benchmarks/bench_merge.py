"""Measures a merge that can be undone bit by bit against addmm_ and PEFT, which cannot.

    python benchmarks/bench_merge.py [--device cpu] [--rank 16] [--size 0.03] [--rounds 60] [--write]

The times are for one weight, with Python: LoraLinear.merge() and .unmerge(), the same merge without a record (as in
merge_and_unload), 16-bit weights rounded stochastically (with a record), ``W.addmm_(B, A, alpha=s)`` and the same with
-s, and PEFT's layer. ``--size`` is the ratio of the update's standard deviation to the weight's. Factors are float32,
as usual, for weights of either dtype; addmm_ takes one dtype, so its factors have the weight's. Contestants are timed
only if they agree on the merged weight and unmerge restores every bit. A contestant's next merge starts from the result
of its unmerge.

A ratio compares the median with addmm_'s; the quartiles of the round-by-round ratios follow. A record's bytes are per
element of the weight, without the copies of the factors. The last column is the largest difference that PEFT's unmerge
leaves, in units of the weight's standard deviation. On a GPU the time is between two CUDA events.
"""

from __future__ import annotations

import argparse
import copy
import importlib.util
import statistics
import sys
from collections.abc import Callable

import torch
from harness import report
from harness.contestants import ALPHA_OVER_R, make_lora_ext, make_peft
from harness.shapes import CPU_SHAPES, CUDA_SHAPES, Shape
from harness.timing import Clock, interleaved, ratio
from torch import Tensor, nn

from lora_ext import functional

HAS_PEFT = importlib.util.find_spec("peft") is not None


def widths(shapes: list[Shape]) -> list[tuple[int, int]]:
    """Returns the distinct ``(in_features, out_features)`` of the shapes, and a decoder's."""
    return list(dict.fromkeys([(shape.in_features, shape.out_features) for shape in shapes] + [(4096, 4096)]))


class Layers:
    """Every contestant's copy of one base weight."""

    def __init__(self, base: nn.Linear, A: Tensor, B: Tensor) -> None:
        self.pristine = base.weight.detach().clone()
        self.ours = make_lora_ext(copy.deepcopy(base), A, B, 0.0).eval()
        self.peft = make_peft(copy.deepcopy(base), A, B, 0.0) if HAS_PEFT else None
        if self.peft:
            self.peft.base_layer.to(base.weight.dtype)  # make_peft converts it to the factors' dtype
        self.plain, self.once, self.drawn = (self.pristine.clone() for _ in range(3))
        self.factors = A, B
        self.A, self.B = A.to(self.plain.dtype), B.to(self.plain.dtype)

    def addmm(self, sign: float) -> None:
        self.plain.addmm_(self.B, self.A, alpha=sign * ALPHA_OVER_R)

    def merge_without_record(self) -> None:
        functional.lora_merge_(self.once, *self.factors, ALPHA_OVER_R, record=False)

    def merge_stochastically(self) -> None:
        self.record = functional.lora_merge_(self.drawn, *self.factors, ALPHA_OVER_R, seed=1)

    def unmerge_stochastically(self) -> None:
        functional.lora_unmerge_(self.drawn, self.record)

    def check(self) -> tuple[float, float]:
        """Checks that all agree; returns record bytes per element, and the largest difference after PEFT's unmerge."""
        self.ours.merge(), self.merge_without_record(), self.addmm(1.0)
        merged = {"without record": self.once, "addmm_": self.plain}
        if self.peft:
            self.peft.merge()
            merged["peft"] = self.peft.base_layer.weight
            assert merged["peft"].dtype == self.plain.dtype
        exact = self.pristine.double() + ALPHA_OVER_R * (self.factors[1].double() @ self.factors[0].double())
        tolerance = {torch.float32: 1e-6, torch.bfloat16: 8e-3, torch.float16: 1e-3}[self.plain.dtype]
        for name, weight in {"lora_ext": self.ours.weight, **merged}.items():
            error = ((weight.double() - exact).norm() / exact.norm()).item()
            if error > tolerance:
                sys.exit(f"{name} is off by {error:.2e} on {tuple(weight.shape)}: not timed")
        if not torch.equal(self.once, self.ours.weight):
            sys.exit("merging with and without a record differ: not timed")
        record = self.ours._merged.matrices["weight"].record
        extra = (record.nbytes - record.lora_A.nbytes - record.lora_B.nbytes) / self.plain.numel()
        self.ours.unmerge(), self.once.copy_(self.pristine), self.addmm(-1.0)
        integers = torch.int16 if self.plain.element_size() == 2 else torch.int32
        if not torch.equal(self.ours.weight.view(integers), self.pristine.view(integers)):
            sys.exit("unmerge did not restore every bit: not timed")
        peft_leaves = float("nan")
        if self.peft:
            self.peft.unmerge()
            error = self.peft.base_layer.weight.double() - self.pristine.double()
            peft_leaves = (error.abs().max() / self.pristine.double().std()).item()
        return extra, peft_leaves


def measure(widths: tuple[int, int], dtype: torch.dtype, args: argparse.Namespace, clock: Clock) -> dict[str, object]:
    in_features, out_features = widths
    base = nn.Linear(in_features, out_features, bias=False, dtype=dtype, device=args.device).requires_grad_(False)
    base.weight.normal_(std=in_features**-0.5)
    A = torch.randn(args.rank, in_features, device=args.device) * in_features**-0.5
    B = torch.randn(out_features, args.rank, device=args.device) * args.size / ALPHA_OVER_R / args.rank**0.5
    layers = Layers(base, A, B)
    extra, peft_leaves = layers.check()

    # A round is a merge and an unmerge of each contestant, timed separately.
    pairs: dict[str, tuple[Callable[[], object], Callable[[], object]]] = {
        "addmm_": (lambda: layers.addmm(1.0), lambda: layers.addmm(-1.0)),
        "lora_ext": (layers.ours.merge, layers.ours.unmerge),
        "no record": (layers.merge_without_record, lambda: layers.once.copy_(layers.pristine)),
    }
    if dtype.itemsize == 2:
        pairs["stochastic"] = layers.merge_stochastically, layers.unmerge_stochastically
    if layers.peft:
        pairs["peft"] = layers.peft.merge, layers.peft.unmerge
    unmerges: dict[str, list[float]] = {name: [] for name in pairs}

    def round_trip(name: str) -> float:
        merge, unmerge = pairs[name]
        seconds = clock(merge)
        unmerges[name].append(clock(unmerge))
        return seconds

    calls = {name: lambda n=name: n for name in pairs}
    merges = interleaved(calls, args.rounds, clock=lambda call: round_trip(call()))
    unmerges = {name: seconds[-len(merges[name]) :] for name, seconds in unmerges.items()}  # without the warm-up
    reference = merges["addmm_"]
    columns = {f"merge, {name}": seconds for name, seconds in merges.items() if name != "addmm_"}
    columns |= {f"unmerge, {name}": unmerges[name] for name in ("lora_ext", "stochastic", "peft") if name in unmerges}
    return {
        "shape": [in_features, out_features],
        "dtype": report.dtype_name(dtype),
        "rounds": len(reference),
        "addmm_ms": 1e3 * statistics.median(reference),
        "ms": {name: 1e3 * statistics.median(seconds) for name, seconds in columns.items()},
        "ratio": {name: ratio(seconds, reference) for name, seconds in columns.items()},
        "record_bytes_per_element": extra,
        "peft_leaves": peft_leaves,
    }


def table(rows: list[dict]) -> str:
    names = max((list(row["ratio"]) for row in rows), key=len)
    cells = (
        ["{} -> {}".format(*row["shape"]), row["dtype"], f"{row['addmm_ms']:.3f}", *report.ratio_cells(row, names)]
        + [f"{row['record_bytes_per_element']:.3f}", f"{row['peft_leaves']:.1e}"]
        for row in rows
    )
    columns = ["in -> out", "dtype", "addmm_, ms", *names, "record, bytes/element", "PEFT leaves"]
    return report.markdown(columns, cells)


def main() -> None:
    parser = report.parser(__doc__, "merge")
    parser.add_argument("--size", type=float, default=0.03, help="of the update, relative to the weight")
    args = parser.parse_args()
    title = (
        f"Merging and unmerging one weight against addmm_, r={args.rank}, updates {args.size:g} of the weight's size"
    )
    run = report.Report(args, title)
    sizes = widths(CUDA_SHAPES if run.on_cuda else CPU_SHAPES)
    cases = [(size, dtype) for dtype in (torch.float32, torch.bfloat16) for size in sizes]
    rows = run.measure(cases, lambda case: [measure(*case, args, run.clock)], table)
    run.finish(rows, table(rows))


if __name__ == "__main__":
    main()
