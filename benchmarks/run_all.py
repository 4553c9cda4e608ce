"""Runs every benchmark of this folder, then draws the pictures, in about twelve minutes; `make bench` calls it.

    python benchmarks/run_all.py [--device cpu] [--machine-isa avx2] [--only layer,decode] [--results DIR]

Each script runs in its own process, prints its table and writes its result files. A failure does not stop the others;
at the end the failed scripts are named, and the exit status is 1.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

from harness import machine_isa, report

HERE = Path(__file__).parent
# No case starts after this number of seconds; with start-up times, all take about twelve minutes on two cores.
SCRIPTS = {
    "layer": ["bench_layer.py", "--seconds", "75"],
    "siblings": ["bench_siblings.py", "--seconds", "20"],
    "dora": ["bench_dora.py", "--shapes", "512x768x768,1024x2048x2048", "--seconds", "30"],
    "grouped": ["bench_grouped.py", "--seconds", "40"],
    "rows": ["bench_rows.py", "--seconds", "40"],
    "experts": ["bench_experts.py", "--experts", "16", "--tokens", "256", "--rounds", "5", "--seconds", "30"],
    "bottleneck": ["bench_bottleneck.py", "--seconds", "25"],
    "decode": ["bench_decode.py", "--seconds", "75"],
    "merge": ["bench_merge.py", "--rounds", "20"],
    "inject": ["bench_inject.py", "--rounds", "7", "--imports", "3"],
    "finetune": ["bench_finetune.py", "--seconds", "330"],
}


def run_all(commands: dict[str, list[str]], say: Callable[[str], None] = print) -> list[str]:
    """Runs the commands; returns the names of those that failed."""
    failed = []
    for name, command in commands.items():
        say(f"\n=== {' '.join(['python', Path(command[1]).name, *command[2:]])}")
        begin = time.perf_counter()
        try:
            status = subprocess.run(command).returncode
        except OSError as error:
            status = error
        if status != 0:
            failed.append(name)
        say(f"=== {name}: {'done' if status == 0 else f'FAILED ({status})'}, {time.perf_counter() - begin:.0f} s")
    return failed


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    parser.add_argument("--machine-isa", choices=list(machine_isa.LIMITS), help="see bench_layer.py --help")
    parser.add_argument("--results", type=Path, help="folder of the result files; this machine's in benchmarks/results")
    parser.add_argument("--only", help=f"of {','.join(SCRIPTS)}; separated by commas")
    args = parser.parse_args()
    names = args.only.split(",") if args.only else list(SCRIPTS)
    if unknown := [name for name in names if name not in SCRIPTS]:
        sys.exit(f"--only: no benchmark {', '.join(unknown)}; there are {', '.join(SCRIPTS)}")
    report.check_device(args.device)

    options = ["--device", args.device, "--write"]
    options += ["--machine-isa", args.machine_isa] if args.machine_isa else []
    options += ["--results", str(args.results)] if args.results else []
    begin = time.perf_counter()
    commands = {name: [sys.executable, str(HERE / SCRIPTS[name][0]), *SCRIPTS[name][1:], *options] for name in names}
    failed = run_all(commands, say=lambda text: print(text, flush=True))
    picture_options = [word for word in options if word != "--write"]
    failed += run_all({"plots": [sys.executable, str(HERE / "plots.py"), *picture_options]})
    print(f"\n{time.perf_counter() - begin:.0f} s; results in {args.results or report.results_folder(args.device)}")
    if failed:
        print(f"FAILED: {', '.join(failed)}")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
