"""Predicts what layers with adapters cost on a GPU, from bytes, products and launches; nothing is measured.

    python benchmarks/predictions.py [--write]      # prints the tables, or writes the one of docs/results.md

A step takes as long as its bytes at the rate of a large copy, or as its products at the rate of a large matrix product,
whichever is longer, and a gap for each launch; steps do not overlap. harness/stages.py has the bytes and the launches.
scripts/gpu_check.sh prints what it measures next to these predictions.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from harness import report, stages
from harness.shapes import LLAMA_SIBLINGS, Shape, SiblingShape
from harness.stages import Case, stage_bytes, stage_flops

DOCUMENT = Path(__file__).parents[1] / "docs" / "results.md"
MARKS = ("<!-- predictions: begin -->\n", "<!-- predictions: end -->\n")


@dataclass(frozen=True)
class Card:
    """Rates that are assumed of a card: about nine tenths of its memory's, eight tenths of its tensor cores' rate."""

    name: str
    bytes_s: float
    flops_s: float  # 16-bit, dense


CARDS = [Card("H100", 3.0e12, 790e12), Card("A100", 1.75e12, 260e12)]  # SXM, 80 GB

# Assumed, too. Kernels that follow each other in a stream leave a gap; the host needs time for a launch (the library's
# products included), for an allocation from PyTorch's cache, and for Python, autograd and the dispatcher. These last
# were measured on a CPU (docs/results.md, host time): a forward without autograd; the rest of a training step.
GAP_US = 2.0
HOST_LAUNCH_US, HOST_ALLOCATION_US = 4.0, 1.0
HOST_CALL_US = {"forward": 14.0, "backward": 100.0}
FROZEN_CALL_US = {"forward": 6.0, "backward": 21.0}

# A kernel of a skinny product reads a tall matrix at this share of a large copy's rate.
SKINNY_SHARE = 0.85

MAIN = Case(Shape(8192, 4096, 4096))
DOWN = replace(MAIN, shape=Shape(8192, 14336, 4096))
# The linear layers of a Llama-3-8B layer, by the tensor that they read.
LLAMA_LAYER = [
    SiblingShape(8192, 4096, (4096, 1024, 1024)),
    SiblingShape(8192, 4096, (4096,)),
    SiblingShape(8192, 4096, (14336, 14336)),
    SiblingShape(8192, 14336, (4096,)),
]
FEW_ROWS = 64  # csrc/cuda/grouped/tile_sizes.h
ROWS_OVER_ADAPTERS = [(1, 1), (16, 1), (16, 16), (64, 8), (64, 64)]
DECODING = [replace(MAIN, shape=Shape(tokens, 4096, 4096), dropout=0.0) for tokens in (1, 16, 64)]


@dataclass(frozen=True)
class Step:
    """One step of a call.

    Attributes:
        hidden: its bytes may be read while something else runs, at best without taking time.
        skinny: a kernel of ours reads a tall matrix, at :data:`SKINNY_SHARE` of the copy's rate.
    """

    phase: str  # forward or backward
    name: str
    bytes: int
    flops: int = 0
    launches: int = 0
    allocations: int = 0
    hidden: bool = False
    skinny: bool = False

    def microseconds(self, card: Card) -> float:
        bytes_s = card.bytes_s * (SKINNY_SHARE if self.skinny else 1.0)
        return 1e6 * max(self.bytes / bytes_s, self.flops / card.flops_s) + GAP_US * self.launches

    def host_microseconds(self) -> float:
        return HOST_LAUNCH_US * self.launches + HOST_ALLOCATION_US * self.allocations


def layers_of(case: Case | SiblingShape) -> list[Case]:
    """Returns a case for each layer that reads x."""
    if isinstance(case, Case):
        return [case]
    shapes = [Shape(case.num_tokens, case.in_features, width) for width in case.out_features]
    return [replace(MAIN, shape=shape) for shape in shapes]


def products(layers: list[Case], phase: str) -> tuple[int, int]:
    """Bytes and floating-point operations of the frozen layers' products in one phase."""
    moved = sum(case.dtype.itemsize * (m * k + k * n + m * n) for case in layers for m, k, n in [case.shape])
    return moved, sum(2 * m * k * n for case in layers for m, k, n in [case.shape])


def frozen_steps(layers: list[Case], training: bool) -> list[Step]:
    """The frozen layers, called one after the other; autograd adds their gradients of x."""
    steps = [Step("forward", "product", *products(layers, "forward"), launches=len(layers), allocations=len(layers))]
    if training:
        moved, flops = products(layers, "backward")
        steps.append(Step("backward", "product", moved, flops, len(layers), len(layers)))
        x = layers[0].shape.num_tokens * layers[0].shape.in_features * layers[0].dtype.itemsize
        if additions := len(layers) - 1:
            steps.append(Step("backward", "autograd's additions", 3 * x * additions, 0, additions, additions))
    return steps


def steps_of(layers: list[Case], training: bool, wide_factors: bool = True) -> list[Step]:
    """The steps of one call of the layers with adapters, in the order of the launches.

    Args:
        layers: they read one x; their adapters have one rank.
        wide_factors: the factors are float32, as by default.
    """
    layers = [replace(case, factor_dtype=torch.float32) for case in layers] if wide_factors else layers
    first = layers[0]
    tokens, features, _ = first.shape
    few = tokens <= stages.FEW_TOKENS
    forward = stages.FEW_TOKENS_LAUNCHES if few else stages.FORWARD_LAUNCHES
    together = replace(first, shape=Shape(tokens, features, 0), rank=first.rank * len(layers))

    def step(phase: str, name: str) -> Step:
        launches = (forward if phase == "forward" else stages.BACKWARD_LAUNCHES)[name]
        launches *= len(layers) if name in stages.PER_LAYER else 1
        if name == "product":
            return Step(phase, name, *products(layers, phase), launches)
        if name not in stage_bytes(first):
            return Step(phase, name, 0, 0, launches)
        cases = [together] if name in ("shrink", "grad_a", "grad_x") else layers
        moved, flops = (sum(count(case)[name] for case in cases) for count in (stage_bytes, stage_flops))
        allocations = stages.ALLOCATIONS[phase] if name in ("shrink", "grad_b") else 0
        return Step(phase, name, moved, flops, launches, allocations, skinny=True)

    steps = [step("forward", "seed")] if first.dropout else []
    steps += [step("forward", name) for name in forward if name != "seed"]
    element = first.dtype.itemsize
    y = sum(case.shape.num_tokens * case.shape.out_features * element for case in layers)
    if "product" in forward:
        steps.append(Step("forward", "product reads y", y, hidden=True))
    if training:
        steps += [step("backward", name) for name in stages.BACKWARD_LAUNCHES]
        steps.append(Step("backward", "product reads grad_x", tokens * features * element * len(layers), hidden=True))
    return steps


def rows_steps(case: Case, adapters: int) -> list[Step]:
    """The steps of a frozen layer in a mixed batch of so many adapters (csrc/cuda/grouped), without autograd."""
    tokens, features, out_features = case.shape
    element, sums = case.dtype.itemsize, 4 * tokens * case.rank
    factor, flops = adapters * case.rank * element, 2 * tokens * case.rank
    few = tokens <= FEW_ROWS
    index = [] if few else [Step("forward", "index", 0, launches=1)]
    return [
        *frozen_steps([case], False),
        *index,
        Step(
            "forward",
            "shrink",
            factor * features + element * tokens * features + sums,
            flops * features,
            launches=1,
            allocations=3,
            skinny=True,
        ),
        Step(
            "forward",
            "expand",
            factor * out_features + 2 * element * tokens * out_features + sums,
            flops * out_features,
            launches=1,
            skinny=True,
        ),
    ]


def rows_ratio(case: Case, adapters: int, card: Card) -> float:
    """Predicts the time of :func:`rows_steps` as a multiple of the frozen layer's."""
    return total(rows_steps(case, adapters), card, True) / total(frozen_steps([case], False), card, True)


def total(steps: Iterable[Step], card: Card, hidden: bool) -> float:
    """Microseconds of the steps. hidden: count those that may run while something else does."""
    return sum(step.microseconds(card) for step in steps if hidden or not step.hidden)


def ratio(layers: list[Case], card: Card, training: bool, wide_factors: bool = True) -> tuple[float, float]:
    """Predicts the time with adapters as a multiple of the frozen layers': at best and at worst."""
    return ratio_of_calls([layers], card, training, wide_factors)


def ratio_of_calls(calls: Sequence[list[Case]], card: Card, training: bool, wide_factors: bool) -> tuple[float, float]:
    """The same for several calls, one after the other."""
    frozen = sum(total(frozen_steps(layers, training), card, True) for layers in calls)
    times = (sum(total(steps_of(c, training, wide_factors), card, hidden) for c in calls) for hidden in (False, True))
    return tuple(time / frozen for time in times)


def host(steps: Iterable[Step], calls: dict[str, float], phase: str) -> float:
    """Predicts the host's microseconds in a phase. calls: those of Python, autograd and the dispatcher."""
    return calls[phase] + sum(step.host_microseconds() for step in steps if step.phase == phase)


def card_named(name: str, rates: dict[str, float] | None = None) -> Card | None:
    """Returns the card of that name; for another one, the rates that a run measured (bench_kernels.py), or None."""
    found = next((card for card in CARDS if card.name in name), None)
    if found or not rates:
        return found
    return Card(name, rates["copy"], rates["matrix_bfloat16"])


# --- the document -----------------------------------------------------------------------------------------------------


def range_text(low: float, high: float) -> str:
    return f"{low:.2f}-{high:.2f}" if f"{low:.2f}" != f"{high:.2f}" else f"{low:.2f}"


def steps_table() -> str:
    """Formats the steps of a forward and a backward of one layer, and of the frozen layer."""
    rows = []
    for kind, steps in (("frozen", frozen_steps([MAIN], True)), ("adapter", steps_of([MAIN], True))):
        for step in steps:
            times = [f"{step.microseconds(card):.1f}" for card in CARDS]
            cells = [f"{kind}: {step.phase}, {step.name}", f"{step.bytes / 1e6:.1f}", *times, str(step.launches)]
            rows.append([*cells, f"{step.host_microseconds():.0f}"])
        calls = FROZEN_CALL_US if kind == "frozen" else HOST_CALL_US
        for phase in calls:
            own = [step for step in steps if step.phase == phase]
            times = [f"{total(own, card, True):.1f}" for card in CARDS]
            sums = [f"{sum(s.bytes for s in own) / 1e6:.1f}", *times, str(sum(s.launches for s in own))]
            rows.append([f"**{kind}: {phase}**", *sums, f"{host(steps, calls, phase):.0f}"])
    columns = ["step", "MB", *(f"{card.name}, us" for card in CARDS), "launches", "host, us"]
    return report.markdown(columns, rows)


def ratios_table() -> str:
    """Formats the predicted ratios of whole calls."""
    cases: list[tuple[str, list[list[Case]], bool]] = [
        ("**a Llama-3-8B layer, 8192 tokens, p=0.1: training**", [layers_of(shape) for shape in LLAMA_LAYER], True)
    ]
    cases += [(f"one layer, {case}: training", [[case]], True) for case in (MAIN, DOWN)]
    cases += [(f"{siblings}, p=0.1: training", [layers_of(siblings)], True) for siblings in LLAMA_SIBLINGS]
    cases += [(f"decoding, {case}", [[case]], False) for case in DECODING]
    rows = []
    for name, calls, training in cases:
        numbers = [range_text(*ratio_of_calls(calls, card, training, wide)) for card in CARDS for wide in (True, False)]
        rows.append([name, *numbers])
    for tokens, adapters in ROWS_OVER_ADAPTERS:
        case = replace(MAIN, shape=Shape(tokens, 4096, 4096), dropout=0.0)
        numbers = [text for card in CARDS for text in ("-", f"{rows_ratio(case, adapters, card):.2f}")]
        rows.append([f"decoding over {adapters} adapter{'s' * (adapters > 1)}, {case}", *numbers])
    factors = [f"{card.name}, {kind} factors" for card in CARDS for kind in ("float32", "16-bit")]
    return report.markdown(["predicted, times the frozen layers", *factors], rows)


def document_part() -> str:
    """Formats what docs/results.md holds between the marks."""
    rates = "; ".join(f"{c.name} {c.bytes_s / 1e12:g} TB/s, {c.flops_s / 1e12:.0f} TFLOP/s" for c in CARDS)
    return (
        f"Predicted for {MAIN}, from assumed rates\n({rates}) and a gap of {GAP_US:g} us a launch.\n"
        f"Kernels of skinny products read at {SKINNY_SHARE:.0%} of a copy's rate. Factors are float32, the default, "
        "where nothing else is said.\n"
        f"The host's {HOST_LAUNCH_US:g} us a launch and {HOST_ALLOCATION_US:g} us an allocation are assumed, too; "
        "its sums also have\nwhat Python, autograd and the dispatcher take, as measured on a CPU "
        "([host time](#host-time)).\n\n"
        f"{ratios_table()}\n"
    )


def write_document(path: Path = DOCUMENT) -> None:
    before, _, rest = path.read_text().partition(MARKS[0])
    _, _, after = rest.partition(MARKS[1])
    path.write_text(f"{before}{MARKS[0]}{document_part()}{MARKS[1]}{after}")


# --- next to measurements ---------------------------------------------------------------------------------------------


def beside_stages(rows: Sequence[dict], card: Card) -> str:
    """Formats bench_kernels' rows with predictions: rows have the stage's bytes, flops and launches."""
    cells = []
    for row in rows:
        if not row.get("bytes"):
            continue
        counts = stages.FEW_TOKENS_LAUNCHES | stages.FORWARD_LAUNCHES | stages.BACKWARD_LAUNCHES
        # The profiler's time of a kernel has no gaps.
        predicted = Step("", row["stage"], row["bytes"], row["flops"]).microseconds(card)
        launches = f"{row['launches']:g} ({counts.get(row['stage'], '-')})"
        cells.append([row["case"], row["stage"], f"{predicted:.1f}", f"{row['us']:.1f}"])
        cells[-1] += [f"{row['us'] / predicted:.2f}", launches]
    columns = ["tokens x in -> out, rank, dtype", "stage", "predicted, us", "measured, us", "measured / predicted"]
    return report.markdown([*columns, "launches (predicted)"], cells)


def beside_ratios(layer_rows: Sequence[dict], sibling_rows: Sequence[dict], rank: int, card: Card) -> str:
    """Formats the ratios that bench_layer.py and bench_siblings.py measured, with predictions for 16-bit layers."""
    cells = []
    found = [(row, "lora_ext", [Shape(*row["shape"])], row["pass"], row["dropout"]) for row in layer_rows]
    for row in sibling_rows:
        tokens, features, *widths = row["shape"]
        shapes = [Shape(tokens, features, width) for width in widths]
        found.append((row, "siblings", shapes, "forward + backward", row["dropout"]))
    for row, name, shapes, what, dropout in found:
        if row["dtype"] not in ("bfloat16", "float16") or name not in row["ratio"]:
            continue
        layers = [Case(shape, rank, getattr(torch, row["dtype"]), dropout) for shape in shapes]
        low, high = ratio(layers, card, what != "forward")
        measured = row["ratio"][name][0]
        title = f"{what}, {' and '.join(map(str, layers))}"
        cells.append([title, range_text(low, high), f"{measured:.2f}", verdict(low, high, measured)])
    return report.markdown(["times the frozen layers", "predicted", "measured", ""], cells)


def beside_rows(rows: Sequence[dict], rank: int, card: Card) -> str:
    """Formats the forwards of bench_grouped.py on a stack with predictions: times the frozen layer."""
    cells = []
    for row in rows:
        if row["dtype"] not in ("bfloat16", "float16") or row["pass"] != "forward":
            continue
        case = Case(Shape(*row["shape"]), rank, getattr(torch, row["dtype"]), 0.0)
        expected = rows_ratio(case, row["adapters"], card)
        measured = row["ratio"]["stack"][0] / row["ratio"]["frozen"][0]
        name = f"{row['adapters']} adapters, {case}"
        cells.append([name, f"{expected:.2f}", f"{measured:.2f}", verdict(expected, expected, measured)])
    return report.markdown(["times the frozen layer", "predicted", "measured", ""], cells)


def verdict(low: float, high: float, measured: float) -> str:
    """Says whether a measured ratio is the predicted one, to a twentieth."""
    if measured > 1.05 * high:
        return "slower than predicted"
    return "faster than predicted" if measured < low / 1.05 else "as predicted"


def beside_host(rows: Sequence[dict]) -> str:
    """Formats bench_host.py's rows with predictions."""
    predicted = {"forward": {}, "forward + backward": {}, "forward + backward, dropout 0.1": {}}
    for what, by_contestant in predicted.items():
        case = replace(MAIN, dropout=0.1 if "dropout" in what else 0.0)
        phases = ("forward", "backward") if "backward" in what else ("forward",)
        for name, steps, calls in (
            ("frozen", frozen_steps([case], True), FROZEN_CALL_US),
            ("lora_ext", steps_of([case], True), HOST_CALL_US),
        ):
            by_contestant[name] = sum(host(steps, calls, phase) for phase in phases)
    cells = []
    for row in rows:
        for name, expected in predicted.get(row["pass"], {}).items():
            measured = row["microseconds"][name]
            cells.append([row["pass"], name, f"{expected:.0f}", f"{measured:.0f}", f"{measured / expected:.2f}"])
    return report.markdown(["host", "", "predicted, us", "measured, us", "measured / predicted"], cells)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--write", action="store_true", help=f"write them into {DOCUMENT.name}")
    if parser.parse_args().write:
        write_document()
    else:
        print(f"{document_part()}\n{steps_table()}")


if __name__ == "__main__":
    sys.exit(main())
