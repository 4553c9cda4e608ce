"""The command line of the fuzzer.

    PYTHONPATH=tests python -m fuzz [FUNCTION ...] [--seconds S | --cases N] [--seed FIRST]

A FUNCTION is one of lora_ext.functional or a compiled op, such as lora_linear; default: all. Prints how often each was
called, with which outcomes, and each kind of finding with a small call, and the command that finds it again. The exit
status is 1 if anything was found.
"""

from __future__ import annotations

import argparse
import itertools
import random
import sys
import time

from . import campaign, planted
from .calls import NAMES

_CASES = 500  # with each seed


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m fuzz", description=__doc__.splitlines()[0])
    parser.add_argument("functions", nargs="*", metavar="FUNCTION", help="such as lora_linear; default: all")
    parser.add_argument("--seconds", type=float, default=60.0, help="for all functions together; default: 60")
    parser.add_argument("--cases", type=int, help="for each function, with one seed, instead of a time")
    parser.add_argument("--seed", type=int, help="the first one; default: random")
    parser.add_argument("--only", nargs="+", metavar="KIND", help="report only these kinds of findings, such as crash")
    arguments = parser.parse_args()
    functions = arguments.functions or [""]
    for function in functions:
        if function and not any(f".{name}".endswith(f".{function}") for name in (*NAMES, *planted.FUNCTIONS)):
            parser.error(f"there is no function {function!r}, want some of {', '.join(NAMES)}")
    first = random.SystemRandom().randrange(1 << 40) if arguments.seed is None else arguments.seed
    found = 0
    for function in functions:
        end = time.monotonic() + arguments.seconds / len(functions)
        for seed in itertools.count(first):
            print(f"{function}: seed {seed}", flush=True)
            result = campaign.run(function, arguments.cases or _CASES, seed, arguments.only)
            print(f"{result.table()}\n{result.total()} cases, {len(result.found)} kinds of findings\n")
            found += len(result.found)
            if result.found or arguments.cases or time.monotonic() > end:
                break
    return 1 if found else 0


if __name__ == "__main__":
    sys.exit(main())
