"""The command line of the fuzzers.

    PYTHONPATH=tests python -m fuzz [AREA ...] [--seconds S | --cases N] [--seed FIRST] [--processes 2]

Prints each kind of finding as a program with its seed; then how often each function was called, with which outcomes.
``--seed`` and ``--cases 1`` run one case again. The exit status is 1 if anything was found.
"""

from __future__ import annotations

import argparse
import itertools
import random
import sys
import time
from concurrent.futures import ThreadPoolExecutor

from . import campaign
from .cases import AREAS


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m fuzz", description=__doc__.splitlines()[0])
    parser.add_argument("areas", nargs="*", metavar="AREA", help=", ".join(f"{k}: {v}" for k, v in AREAS.items()))
    parser.add_argument("--seconds", type=float, default=60.0, help="for all areas together; default: 60")
    parser.add_argument("--cases", type=int, help="for each area, instead of a time")
    parser.add_argument("--seed", type=int, help="of the first case; the others follow. Default: random")
    parser.add_argument("--processes", type=int, default=2)
    parser.add_argument("--only", nargs="+", metavar="KIND", help="report only these kinds of findings, such as crash")
    arguments = parser.parse_args()
    areas = arguments.areas or list(AREAS)
    if unknown := [area for area in areas if area not in (*AREAS, "planted")]:
        parser.error(f"there is no area {unknown[0]!r}, want some of {', '.join(AREAS)}")
    first = random.SystemRandom().randrange(1 << 40) if arguments.seed is None else arguments.seed
    step, found = arguments.processes, 0
    for area in areas:
        print(f"{area}: seeds from {first} on", flush=True)
        stop = None if arguments.cases is None else arguments.cases
        end = float("inf") if stop else time.monotonic() + arguments.seconds / len(areas)

        def part(i: int, area: str = area, stop: int | None = stop, end: float = end) -> campaign.Campaign:
            seeds = itertools.islice(itertools.count(first), i, stop, step)
            return campaign.run(area, seeds, lambda text: print(f"FOUND {text}", flush=True), arguments.only, end)

        with ThreadPoolExecutor(step) as pool:
            parts = list(pool.map(part, range(step)))
        for result in parts:
            print(f"{result.table()}\n{area}: {result.total()} cases, {len(result.found)} kinds of findings\n")
            found += len(result.found)
    return 1 if found else 0


if __name__ == "__main__":
    sys.exit(main())
