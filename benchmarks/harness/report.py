"""The benchmarks' frame: options, time budget, a heading that names the machine, result files."""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from datetime import date
from pathlib import Path
from typing import TypeVar

import torch

import lora_ext
from harness import machine_isa
from harness.machine_folder import machine_folder
from harness.machine_load import MachineLoad
from harness.shapes import Shape
from harness.timing import Clock, CudaClock, interleaved, ratio, wall_clock
from lora_ext import info

RESULTS = Path(__file__).parents[1] / "results"
MOST_SECONDS_PER_CASE = 20.0
Case = TypeVar("Case")


def at_least(least: int) -> Callable[[str], int]:
    """Returns the type of an option that counts something."""

    def count(text: str) -> int:
        if not text.isdecimal() or int(text) < least:
            raise argparse.ArgumentTypeError(f"{text!r}, want an integer of at least {least}")
        return int(text)

    return count


rounds = at_least(2)  # quartiles need two


def parser(description: str, name: str) -> argparse.ArgumentParser:
    """Makes a parser with the common options. name: of the result files, <results>/<name>_<device>.{json,md}."""
    result = argparse.ArgumentParser(description=description.splitlines()[0])
    result.set_defaults(name=name)
    result.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    result.add_argument("--rank", type=int, default=16)
    result.add_argument("--rounds", type=rounds, default=60, help="maximum; slow cases get fewer, at least 5")
    result.add_argument("--seconds", type=float, default=float("inf"), help="shared by the cases; none starts later")
    result.add_argument("--threads", type=int, default=torch.get_num_threads())
    result.add_argument(
        "--machine-isa",
        choices=list(machine_isa.LIMITS),
        help="restrict the whole process, contestants included, to this instruction set, and name the results by it",
    )
    result.add_argument("--json", type=Path, help="also write the rows to this file as soon as they are measured")
    result.add_argument("--write", action="store_true", help=f"also write <results>/{name}_<device>.{{json,md}}")
    result.add_argument("--results", type=Path, help="folder of the result files; this machine's in benchmarks/results")
    return result


def add_shapes(
    parser: argparse.ArgumentParser, parse: Callable[[str], object] = Shape.parse, form: str = "TOKENSxINxOUT"
) -> None:
    """Adds ``--shapes``, which replaces the built-in shapes. form: for the help."""

    def shapes(text: str) -> list:
        try:
            return [parse(part) for part in text.split(",")]
        except ValueError as error:
            raise argparse.ArgumentTypeError(str(error)) from error

    parser.add_argument("--shapes", type=shapes, help=f"{form}, separated by commas")


def check_device(device: str) -> None:
    """Raises SystemExit if there is no such device."""
    if device == "cuda" and not torch.cuda.is_available():
        sys.exit(f"--device cuda: torch {torch.__version__} finds no GPU here; leave it out to measure the CPU")


def machine_name(device: str) -> str:
    """Name of the GPU or the processor."""
    return torch.cuda.get_device_name() if device == "cuda" else info.cpu_model()


def results_folder(device: str) -> Path:
    """Folder of this machine's results."""
    return RESULTS / machine_folder(machine_name(device))


class Report:
    """One run of a benchmark: its clock, time budget, machine and heading, which is printed at once."""

    def __init__(self, args: argparse.Namespace, title: str, most_case_s: float = MOST_SECONDS_PER_CASE) -> None:
        machine_isa.restrict(args.machine_isa)
        self.args, self.on_cuda = args, args.device == "cuda"
        check_device(args.device)
        torch.set_num_threads(args.threads)
        torch.manual_seed(0)
        self.facts = info.gather() | {"torch_cpu": machine_isa.facts()}
        self.facts["libraries"] = [Path(path).name for path in self.facts["libraries"]]  # no folder of this machine
        self.clock: Clock = CudaClock() if self.on_cuda else wall_clock
        self.machine = machine_name(args.device)
        kernels = "CUDA kernels"
        if not self.on_cuda:
            kernels = f"{args.threads} threads, {self.facts['cpu']['isa']} kernels, "
            kernels += machine_isa.describe(self.facts["torch_cpu"])
        self.heading = (
            f"{title}; {self.machine}, {kernels}; lora_ext {lora_ext.__version__}, torch {torch.__version__}; "
            f"{date.today()}; medians (quartiles)"
        )
        self.begin = time.perf_counter()
        self.load = MachineLoad()
        self.case_s = self.most_case_s = most_case_s
        print(self.heading, flush=True)

    def elapsed(self) -> float:
        """Seconds since the heading was printed."""
        return time.perf_counter() - self.begin

    def cases(self, cases: Sequence[Case]) -> Iterator[Case]:
        """Yields the cases, each with its share of the remaining time (``case_s``); reports cases without time."""
        for number, case in enumerate(cases):
            remaining = self.args.seconds - self.elapsed()
            if remaining < 0:
                print(f"out of time: {len(cases) - number} cases are not measured", flush=True)
                return
            self.case_s = min(remaining / (len(cases) - number), self.most_case_s)
            yield case

    def interleaved(
        self, calls: dict[str, Callable[[], object]], parts: int = 1, clock: Clock | None = None
    ) -> dict[str, list[float]]:
        """Runs :func:`timing.interleaved` in this case's time. parts: number of measurements of the case."""
        return interleaved(calls, self.args.rounds, budget_s=self.case_s / parts, clock=clock or self.clock)

    def shape_cases(self, shapes: Iterable[Shape]) -> list[tuple[torch.dtype, Shape]]:
        """Returns the shapes, or those of ``--shapes``, first all in float32, then all in bfloat16."""
        shapes = self.args.shapes or list(shapes)
        return [(dtype, shape) for dtype in (torch.float32, torch.bfloat16) for shape in shapes]

    def save(self, rows: list[dict]) -> None:
        """Writes the rows that are there so far to the file of ``--json``."""
        if self.args.json:
            self.args.json.write_text(json.dumps(rows, indent=1) + "\n")

    def measure(
        self, cases: Sequence[Case], rows_of: Callable[[Case], list[dict]], table: Callable[[list[dict]], str]
    ) -> list[dict]:
        """Measures the cases; returns their rows, of which each is printed as soon as it is measured."""
        rows: list[dict] = []
        for case in self.cases(cases):
            rows += (measured := rows_of(case))
            self.save(rows)
            print("\n".join(table(measured).splitlines()[-len(measured) :]), flush=True)
        return rows

    def finish(self, rows: object, table: str, **more: object) -> None:
        """Prints the whole table; with --write, writes the result files. more: further entries of the JSON."""
        others = self.load.of_others()
        if others is not None:
            table += f"\n\nOther processes used {others:.0%} of the processors meanwhile."
        print(f"\n{table}", flush=True)
        if not self.args.write:
            return
        folder = self.args.results or results_folder(self.args.device)
        folder.mkdir(parents=True, exist_ok=True)
        # No folders of this machine.
        given = [Path(argument).name if Path(argument).is_absolute() else argument for argument in sys.argv[1:]]
        command = " ".join([f"python benchmarks/{Path(sys.argv[0]).name}", *given])
        isa = f"_{self.args.machine_isa}" if self.args.machine_isa else ""
        path = folder / f"{self.args.name}_{self.args.device}{isa}"
        result = {"command": command, "date": str(date.today()), "heading": self.heading}
        result |= {self.args.device: self.machine, "info": self.facts, "load_of_others": others}
        result |= {"rows": rows, **more}
        path.with_suffix(".md").write_text(f"{self.heading}\n\n    {command}\n\n{table}\n")
        path.with_suffix(".json").write_text(json.dumps(result, indent=1) + "\n")


def against(seconds: dict[str, list[float]], baseline: str) -> dict[str, object]:
    """Returns a row's entries on times: how often they were measured, the baseline's, and the others' ratios to it."""
    return {
        "rounds": len(seconds[baseline]),
        f"{baseline}_ms": 1e3 * statistics.median(seconds[baseline]),
        "ratio": {name: ratio(times, seconds[baseline]) for name, times in seconds.items() if name != baseline},
    }


# --- tables -----------------------------------------------------------------------------------------------------------


def markdown(columns: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    lines = [f"| {' | '.join(columns)} |", "|" + "---|" * len(columns)]
    return "\n".join(lines + [f"| {' | '.join(row)} |" for row in rows])


def names_in(rows: Iterable[dict], key: str = "ratio") -> list[str]:
    """Returns the contestants of all rows, in their order; a row can lack some."""
    return list(dict.fromkeys(name for row in rows for name in row[key]))


def ratio_cell(values: Sequence[float]) -> str:
    """Formats a ratio and its quartiles."""
    return "{:.2f} ({:.2f}-{:.2f})".format(*values)


def ratio_cells(row: dict, names: Iterable[str]) -> list[str]:
    return [ratio_cell(row["ratio"][name]) if name in row["ratio"] else "" for name in names]


def milliseconds(value: float) -> str:
    return f"{value:.{2 if value >= 1 else 3}f}"


def dtype_name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
