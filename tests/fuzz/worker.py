"""A process that runs the cases whose numbers come on its standard input, a list a line.

    python -m fuzz.worker FUNCTION

Answers each with two lines of JSON: the function and the call in words, before it runs; then the outcome. The kernel
ends the process at a case that crashes, takes all memory, computes for too long or waits for too long.
"""

from __future__ import annotations

import contextlib
import ctypes
import dataclasses
import faulthandler
import json
import os
import resource
import signal
import sys
import time
import warnings
from collections.abc import Iterator

POISON = 0xFE
"""Value of every byte of new memory; malloc_fill_byte sets it under a sanitizer."""
_M_PERTURB = -6  # of malloc.h
_ADDRESS_SPACE = 2 << 30  # bytes beyond python and torch; larger requests are refused
# The limits of a case. Other processes can delay it, so what it computes is limited by the processor's time; the clock
# ends a case that waits.
_PROCESSOR_SECONDS, _CLOCK_SECONDS = 30, 120


def is_sanitized() -> bool:
    return "san.so" in os.environ.get("LD_PRELOAD", "")


def poison(value: int = POISON) -> None:
    """Makes new memory hold a value in every byte."""
    ctypes.CDLL(None).mallopt(_M_PERTURB, value ^ 0xFF)  # new memory holds its complement


@contextlib.contextmanager
def poisoned(value: int) -> Iterator[None]:
    poison(value)
    try:
        yield
    finally:
        poison()


def _limit_memory() -> None:
    if is_sanitized():
        return  # a sanitizer's own tables take terabytes of address space
    poison()
    with open("/proc/self/statm") as file:
        used = int(file.read().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (used + _ADDRESS_SPACE, resource.RLIM_INFINITY))


def main() -> None:
    function = sys.argv[1]
    out = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)  # keeps printed text out of the replies
    warnings.simplefilter("ignore")

    import torch

    from . import judge
    from .calls import make

    torch.set_num_threads(2)
    _limit_memory()
    for limit in (signal.SIGXCPU, signal.SIGALRM):
        faulthandler.register(limit, chain=True)  # prints the stack
    for line in sys.stdin:
        numbers = json.loads(line)
        used = int(time.process_time()) + 1
        resource.setrlimit(resource.RLIMIT_CPU, (used + _PROCESSOR_SECONDS, resource.RLIM_INFINITY))
        signal.alarm(_CLOCK_SECONDS)
        call = make(function, numbers)
        out.write(json.dumps([call.function, call.text()]) + "\n")
        outcome = judge.confirmed(judge.run(call), function, numbers)
        if outcome.kind == "compared" and not outcome.findings and numbers[-1] % 10 == 0:
            outcome = judge.run_twice(function, numbers)
        signal.alarm(0)
        out.write(json.dumps(dataclasses.asdict(outcome)) + "\n")


if __name__ == "__main__":
    main()
