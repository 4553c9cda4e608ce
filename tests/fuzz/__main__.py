"""The command line of the fuzzers.

    PYTHONPATH=tests python -m fuzz [AREA ...] [--seconds S | --cases N] [--seed FIRST]

An AREA can be one function, such as ops.lora_linear. Prints how often each function was called, with which outcomes,
and each kind of finding as a small program. The exit status is 1 if anything was found; --seed finds it again.
"""

from __future__ import annotations

import argparse
import itertools
import random
import sys
import time

from . import campaign
from .cases import AREAS

_CASES = 500  # with each seed


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m fuzz", description=__doc__.splitlines()[0])
    parser.add_argument("areas", nargs="*", metavar="AREA", help=", ".join(f"{k}: {v}" for k, v in AREAS.items()))
    parser.add_argument("--seconds", type=float, default=60.0, help="for all areas together; default: 60")
    parser.add_argument("--cases", type=int, help="for each area, with one seed, instead of a time")
    parser.add_argument("--seed", type=int, help="the first one; default: random")
    parser.add_argument("--only", nargs="+", metavar="KIND", help="report only these kinds of findings, such as crash")
    arguments = parser.parse_args()
    areas = arguments.areas or list(AREAS)
    if unknown := [area for area in areas if area.partition(".")[0] not in (*AREAS, "planted")]:
        parser.error(f"there is no area {unknown[0]!r}, want some of {', '.join(AREAS)}")
    first = random.SystemRandom().randrange(1 << 40) if arguments.seed is None else arguments.seed
    found = 0
    for area in areas:
        end = time.monotonic() + arguments.seconds / len(areas)
        for seed in itertools.count(first):
            print(f"{area}: seed {seed}", flush=True)
            result = campaign.run(area, arguments.cases or _CASES, seed, arguments.only)
            print(f"{result.table()}\n{area}: {result.total()} cases, {len(result.found)} kinds of findings\n")
            found += len(result.found)
            if result.found or arguments.cases or time.monotonic() > end:
                break
    return 1 if found else 0


if __name__ == "__main__":
    sys.exit(main())
