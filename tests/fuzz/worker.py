"""A process that runs the cases requested on its standard input.

    python -m fuzz.worker AREA

A request is a line of JSON, {"seed": ...} or {"choices": [...]}. A line before the run describes the case; a line after
it gives the outcome. The imports take seconds, so the process only forks, and a child runs the cases. A case that ends
its child has {"ended": exit code} as its outcome, and the next child says {"ready": its process id}.
"""

from __future__ import annotations

import ctypes
import gc
import json
import os
import resource
import select
import sys
import traceback
import warnings
from typing import Any

_M_PERTURB = -6  # of malloc.h
_ADDRESS_SPACE = 2 << 30  # bytes beyond python and torch; larger requests are refused


def is_sanitized() -> bool:
    return "san.so" in os.environ.get("LD_PRELOAD", "")


def _limit_memory() -> None:
    if is_sanitized():
        return  # a sanitizer's own tables take terabytes of address space
    with open("/proc/self/statm") as file:
        used = int(file.read().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (used + _ADDRESS_SPACE, resource.RLIM_INFINITY))


def _input_ended() -> bool:
    poll = select.poll()
    poll.register(sys.stdin, 0)
    return any(events & select.POLLHUP for _, events in poll.poll(0))


def main() -> None:
    area = sys.argv[1]
    out = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)  # keeps printed text out of the replies
    warnings.simplefilter("ignore")
    import torch

    from .areas import make_case
    from .choices import Choices

    if not is_sanitized():
        ctypes.CDLL(None).mallopt(_M_PERTURB, int(os.environ["MALLOC_PERTURB_"]))  # which is read when Python starts
    torch.set_num_threads(1)  # a process that has started threads cannot fork
    make_case(area, Choices(0))  # imports the area's modules

    def say(**reply: Any) -> None:
        out.write(json.dumps(reply) + "\n")

    gc.freeze()  # a child's collections leave these objects alone, and so share their memory
    while child := os.fork():
        code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
        if code == 0 or _input_ended():
            sys.exit(code)
        say(ended=code)
    torch.set_num_threads(2)
    _limit_memory()
    say(ready=os.getpid())
    for line in sys.stdin:
        request = json.loads(line)
        choices = Choices(request.get("seed", 0), request.get("choices"))
        try:
            case = make_case(area, choices)
            say(function=case.function, source=case.source, choices=choices.made)
            outcome = case.run()
            say(kind=outcome.kind, findings=[finding.as_json() for finding in outcome.findings])
        except Exception:  # a bug of the fuzzer
            say(error=traceback.format_exc())


if __name__ == "__main__":
    main()
