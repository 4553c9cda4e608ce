"""The command line of the fuzzers.

    PYTHONPATH=tests python -m fuzz [AREA ...] [--seconds S | --cases N] [--seed FIRST] [--processes 2]
    PYTHONPATH=tests python -m fuzz AREA --replay 3,0,12

Prints each kind of finding as a minimised program; then how often each function was called, with which outcomes. The
exit status is 1 if anything was found.
"""

from __future__ import annotations

import argparse
import itertools
import random
import sys
import tempfile
import time

from . import campaign
from .areas import AREAS
from .processes import Worker


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m fuzz", description=__doc__.splitlines()[0])
    parser.add_argument("areas", nargs="*", metavar="AREA", help=", ".join(f"{k}: {v}" for k, v in AREAS.items()))
    parser.add_argument("--seconds", type=float, help="for all areas together")
    parser.add_argument("--cases", type=int, help="for each area, instead of a time")
    parser.add_argument("--seed", type=int, help="of the first case; the others follow. Default: random")
    parser.add_argument("--processes", type=int, default=2)
    parser.add_argument("--replay", help="the choices of one case, from a finding")
    parser.add_argument("--as-found", action="store_true", help="do not minimise findings")
    parser.add_argument("--only", nargs="+", metavar="KIND", help="report only these kinds of findings, such as crash")
    arguments = parser.parse_args()
    areas = arguments.areas or list(AREAS)
    if unknown := [area for area in areas if area not in (*AREAS, "planted")]:
        parser.error(f"there is no area {unknown[0]!r}, want some of {', '.join(AREAS)}")
    if arguments.replay is not None:
        return replay(areas[0], [int(choice) for choice in arguments.replay.split(",")])
    if arguments.seconds is None and arguments.cases is None:
        arguments.seconds = 60.0
    first = random.SystemRandom().randrange(1 << 40) if arguments.seed is None else arguments.seed
    found = 0
    for area in areas:
        begin = time.monotonic()
        seeds = itertools.count(first) if arguments.cases is None else range(first, first + arguments.cases)
        seconds = None if arguments.seconds is None else arguments.seconds / len(areas)
        print(f"{area}: seeds from {first} on", flush=True)
        result = campaign.run(
            area,
            seeds,
            arguments.processes,
            seconds,
            lambda text: print(f"FOUND {text}", flush=True),
            not arguments.as_found,
            arguments.only,
        )
        print(f"{result.table()}\n\n{result.summary(time.monotonic() - begin)}\n", flush=True)
        found += len(result.found)
    return 1 if found else 0


def replay(area: str, choices: list[int]) -> int:
    with tempfile.TemporaryDirectory(prefix="fuzz-") as folder, Worker(area, folder) as worker:
        report = worker.run(choices=choices)
    print(f"{report.source}\n{report.function}: {report.kind}")
    for finding in report.findings:
        print(f"FOUND {finding.signature}\n  {finding.detail}")
    return 1 if report.findings else 0


if __name__ == "__main__":
    sys.exit(main())
