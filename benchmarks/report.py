"""What the benchmarks share around their measurements: options, a heading that says where, and result files."""

from __future__ import annotations

import argparse
import json
import sys
from datetime import date
from pathlib import Path

import torch
from timing import Clock, CudaClock, wall_clock

import lora_ext
from lora_ext import info

RESULTS = Path(__file__).parent / "results"


def parser(description: str, name: str) -> argparse.ArgumentParser:
    """name: of the result files, results/<name>_<device>.{json,md}."""
    result = argparse.ArgumentParser(description=description.splitlines()[0])
    result.set_defaults(name=name)
    result.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    result.add_argument("--rank", type=int, default=16)
    result.add_argument("--rounds", type=int, default=60, help="at most; slow shapes get fewer, at least 11")
    result.add_argument("--threads", type=int, default=torch.get_num_threads())
    result.add_argument("--write", action="store_true", help=f"also write results/{name}_<device>.{{json,md}}")
    return result


class Report:
    """One run of a benchmark: its clock, its machine, its heading, printed at once."""

    def __init__(self, args: argparse.Namespace, title: str) -> None:
        torch.set_num_threads(args.threads)
        torch.manual_seed(0)
        self.args, self.on_cuda, self.facts = args, args.device == "cuda", info.gather()
        self.clock: Clock = CudaClock() if self.on_cuda else wall_clock
        self.machine = torch.cuda.get_device_name() if self.on_cuda else info.cpu_model()
        kernels = "CUDA" if self.on_cuda else f"{args.threads} threads, {self.facts['cpu']['isa']}"
        self.heading = (
            f"{title}; {self.machine}, {kernels} kernels; lora_ext {lora_ext.__version__}, torch {torch.__version__}; "
            f"{date.today()}; medians (quartiles)"
        )
        print(self.heading, flush=True)

    def finish(self, rows: list[dict], table: str) -> None:
        """Prints the whole table, and writes the result files where --write asks for them."""
        print(f"\n{table}")
        if not self.args.write:
            return
        RESULTS.mkdir(exist_ok=True)
        command = " ".join([f"python benchmarks/{Path(sys.argv[0]).name}", *sys.argv[1:]])
        path = RESULTS / f"{self.args.name}_{self.args.device}"
        result = {"command": command, "date": str(date.today()), self.args.device: self.machine}
        result |= {"info": self.facts, "rows": rows}
        path.with_suffix(".md").write_text(f"{self.heading}\n\n    {command}\n\n{table}\n")
        path.with_suffix(".json").write_text(json.dumps(result, indent=1) + "\n")
