"""Builds, tests and measures lora_ext on the GPU of this machine; see gpu_check.sh.

    python scripts/gpu_check.py [--seconds 470] [--only ops,layer] [--continue] [--library WHEEL] [--results DIR]

Each part is a process with its own time limit, so that a part that fails or hangs does not take time from later ones. A
part that runs out of time is interrupted, prints what it found, and keeps what it measured. Each part writes its entry
of benchmarks/results/<card>/gpu_check.json as soon as it ends: run the rest later with --only or --continue. Prints the
tables at the end, measured figures next to predicted ones, and keeps each part's output in build/gpu_check/.

--dry runs what needs no GPU, for the arch of --arch: does it compile, are all tests collected where optional packages
are missing, do the benchmarks run?

Exit status 0: every part passed, except optional ones that cannot run here (compute-sanitizer, rivals), and sanitizers
that found nothing in their time. 2: something has to be installed first; the command is printed.
"""

from __future__ import annotations

import argparse
import os
import re
import signal
import subprocess
import sys
from datetime import datetime, timezone
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent))
import gpu_parts
import gpu_report
import gpu_toolkit
import timed_parts
from timed_parts import FAILED, INTERRUPTED, LOGS, ROOT, TIMED_OUT

RESULTS = ROOT / "benchmarks" / "results"
SECONDS = 465.0  # that the limits of the parts are made for


def say_what_is_missing(builds: bool) -> None:
    """SystemExit(2): packages or tools are missing; prints how to install them, before anything else is done."""
    lines = [gpu_toolkit.missing_compiler()] if builds else []
    if missing := gpu_toolkit.missing_packages(builds):
        requirements = " ".join(f"'{requirement}'" for requirement in missing.values())
        lines.append(f"{', '.join(missing)}: {sys.executable} -m pip install {requirements}")
    if lines := list(filter(None, lines)):
        print("\n".join(f"gpu_check: {line}" for line in lines), file=sys.stderr)
        sys.exit(2)


def gather_facts(dry_arch: str = "") -> dict[str, str]:
    """dry_arch: the architecture to compile for where no GPU is used."""
    import torch

    if not dry_arch and not torch.cuda.is_available():
        sys.exit(f"gpu_check: torch {torch.__version__} finds no GPU; --dry runs what needs none")

    def says(*command: str) -> str:
        try:
            return subprocess.run(command, capture_output=True, text=True, cwd=ROOT, check=True).stdout.strip()
        except (OSError, subprocess.CalledProcessError):
            return ""

    commit = says("git", "rev-parse", "HEAD") or "unknown"
    changed = "+changes" if says("git", "status", "--porcelain", "--untracked-files=no") else ""
    return {
        "card": "no GPU (--dry)" if dry_arch else torch.cuda.get_device_name(),
        "arch": dry_arch or gpu_parts.arch_of(torch.cuda.get_device_capability()),
        "driver": says("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader").split("\n")[0],
        "torch": torch.__version__,
        "cuda": torch.version.cuda or "",
        "python": sys.version.split()[0],
        "commit": commit + changed,
        "date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
    }


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "--seconds", type=float, default=SECONDS, help="for all parts together; twice as many double the limit of each"
    )
    parser.add_argument("--only", default="", help="these parts, separated by commas")
    parser.add_argument(
        "--continue", dest="resume", action="store_true", help="only parts that have not passed at this commit"
    )
    parser.add_argument(
        "--library", type=Path, help="a wheel, or a folder with the two libraries, instead of building (needs no nvcc)"
    )
    parser.add_argument("--dry", action="store_true", help="only what needs no GPU")
    parser.add_argument("--arch", default="90a", help="architecture to compile for with --dry")
    parser.add_argument("--results", type=Path, help="folder of gpu_check.json; the card's in benchmarks/results")
    parser.add_argument("--golden", nargs=2, metavar=("CUDA_HOME", "ARCH"), help=argparse.SUPPRESS)
    parser.add_argument("--check-library", nargs="?", const=Path(), type=Path, help=argparse.SUPPRESS)
    return parser.parse_args()


def stop(signum: int, frame: object) -> None:
    raise KeyboardInterrupt


def main() -> int:
    args = parse_arguments()
    # Also where the shell ignores Ctrl-C (background jobs): parts inherit that, and could not be interrupted.
    signal.signal(signal.SIGINT, signal.default_int_handler)
    signal.signal(signal.SIGTERM, stop)
    LOGS.mkdir(parents=True, exist_ok=True)
    if args.golden:
        return gpu_toolkit.golden(Path(args.golden[0]), args.golden[1], LOGS / "golden.so", args.dry)
    if args.check_library is not None:
        if args.check_library != Path():
            gpu_toolkit.install_library(args.check_library)
        return gpu_toolkit.check_library()

    if args.library:
        args.library = args.library.resolve()
    homes = gpu_toolkit.cuda_home_candidates()
    can_build = not args.dry and args.library is None and gpu_toolkit.first_home(homes) is not None
    say_what_is_missing(builds=can_build and (not args.only or "build" in args.only.split(",")))
    facts = gather_facts(args.arch if args.dry else "")
    # Without a GPU, torch may be a build without CUDA: any toolkit compiles.
    home = gpu_toolkit.find_cuda_home(facts["cuda"], homes) if facts["cuda"] else gpu_toolkit.first_home(homes)
    nvcc = re.search(r"V(\d+\.\d+\.\d+)", gpu_toolkit.nvcc_says(home)) if home else None
    facts["nvcc"] = nvcc[1] if nvcc else "none"
    if args.dry:
        every = gpu_parts.list_dry_parts(facts, home)
    else:
        every = gpu_parts.list_parts(facts, home, len(os.sched_getaffinity(0)), args.library)
    print(f"{facts['card']}: sm_{facts['arch']}, {home or 'no toolkit'}; first part: {every[0].name}", flush=True)

    from harness.machine_folder import machine_folder

    folder = LOGS / "dry" if args.dry else RESULTS / machine_folder(facts["card"])
    path = (args.results or folder) / "gpu_check.json"
    parts = gpu_parts.chosen(every, args.only) if args.only else every
    if args.resume:
        parts = gpu_report.not_yet_passed(parts, gpu_report.read_result(path), facts)
    parts = timed_parts.stretched(parts, args.seconds / SECONDS)
    measures = {part.name: part.measures for part in parts}

    def ready(name: str) -> str:
        if gpu_parts.library_is_there():
            return ""
        return f"there is no CUDA library: run the part {name} before, or give --library"

    outcomes = timed_parts.run_all(
        parts, args.seconds, lambda outcome: gpu_report.add_outcome(path, facts, outcome, measures[outcome.name]), ready
    )
    for outcome in outcomes:
        log = LOGS / f"{outcome.name}.log"
        if outcome.status in (FAILED, TIMED_OUT, INTERRUPTED) and outcome.seconds and log.exists():
            print(f"\n--- {outcome.name}: the end of {log.relative_to(ROOT)}")
            print("\n".join(log.read_text(errors="replace").splitlines()[-30:]))
    order = [part.name for part in every]
    print(f"\n{gpu_report.format_report(gpu_report.read_result(path), facts, order)}\n\n-> {path}")
    return timed_parts.exit_status(parts, outcomes)


if __name__ == "__main__":
    sys.exit(main())
